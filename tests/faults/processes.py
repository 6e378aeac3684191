"""Processes of a search: which belong to it, and which of them does what."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

SHARED_MEMORY = "/dev/shm"
# Ray gives its processes these titles while they work.
TITLES = {
    "trial": "ray::ImplicitFunc",
    "helper": "ray::Helper",
    "train worker": "ray::RayTrainWorker",
    "controller": "ray::TrainController",
}


def belonging(folder: Path) -> dict[int, str]:
    """Processes, by id, with their command lines, that have `folder` in it, or a file below it open, or work there.

    Ray's processes rewrite their command line and environment, but they all log to files below Ray's own folder.
    """
    found = {}
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            title = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            places = [os.readlink(process / "cwd"), *(os.readlink(each) for each in (process / "fd").iterdir())]
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended meanwhile
        if str(folder) in title or any(place.startswith(f"{folder}/") for place in places):
            found[int(process.name)] = title
    return found


def working_as(role: str, folder: Path) -> list[int]:
    """Ids of the processes of one of the `TITLES`."""
    return sorted(pid for pid, title in belonging(folder).items() if title.startswith(TITLES[role]))


def kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal; whether there was still somebody to receive it."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def left_over(folder: Path, wait_s: float = 40.0) -> dict[int, str]:
    """What still belongs to a folder `wait_s` after everything should have ended; empty as soon as nothing does."""
    deadline = time.monotonic() + wait_s
    while (found := belonging(folder)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def mapped_by_living() -> set[str]:
    """Names of the files below /dev/shm that a living process has in its memory."""
    found = set()
    for process in Path("/proc").iterdir():
        try:
            maps = (process / "maps").read_text() if process.name.isdigit() else ""
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended meanwhile, or is not ours
        found |= {line.rpartition(f"{SHARED_MEMORY}/")[2] for line in maps.splitlines() if f"{SHARED_MEMORY}/" in line}
    return found


def abandoned_since(before: set[str]) -> list[str]:
    """Files in shared memory that are new and that no living process uses.

    What a living one uses belongs to other work on this machine: it is asked when all of a command's processes ended.
    """
    return sorted(set(os.listdir(SHARED_MEMORY)) - before - mapped_by_living())
