"""The folder of one artifact on this machine: opened, checked, begun, deleted to make room.

    KEY/              the files, and manifest.json with their sizes and checksums
    KEY/used          touched whenever the artifact is opened
    KEY.partial/      one that is being made, or what a killed process left of it
    KEY.lock          held by whoever makes or deletes it

Whoever has an artifact open holds a shared lock on its manifest, and only one that nobody has open makes room for
another: on one machine a deleted file stays readable where it is mapped, but over NFS the reader would be killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import sys
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from refilled.errors import UserError
from refilled.storage.files import json_bytes, read_json
from refilled.storage.storage import lock_path

MANIFEST, USED, PARTIAL = "manifest.json", "used", ".partial"
_CHUNK_BYTES = 2**22
_verified: set[tuple[int, int, int, int]] = set()  # device, inode, time and size of the files this process has checked
_log = logging.getLogger(__name__)


class NoRoomError(OSError):
    """Artifacts that are open or being made leave too little of what all of a kind may take together."""


class DamagedError(ValueError):
    """An artifact's files are not what was written; the message says what is wrong."""


class Artifact:
    """A whole artifact; while this lives it is not deleted to make room.

    Attributes:
        path: Its folder.
        about: What its maker said of it.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], manifest: int) -> None:
        self.path = path
        self.about = about
        self._manifest = manifest  # the shared lock is of the open file, a number: no other finalizer closes it first

    def __del__(self) -> None:
        os.close(self._manifest)


def open_whole(folder: Path, *, quiet: bool = False) -> Artifact | None:
    """The artifact in a folder; none, after a warning unless it is given already, where it is damaged."""
    try:
        return _open(folder)
    except (DamagedError, UserError, OSError) as error:
        if not quiet:
            _log.warning("%s is damaged and is not used (%s).", folder, error)
        return None


def _open(folder: Path) -> Artifact | None:
    """The artifact in a folder; checksums are compared once for each process and file.

    Raises:
        DamagedError, UserError: There is something else.
        OSError: It cannot be read.
    """
    try:
        manifest = os.open(folder / MANIFEST, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        if not folder.exists():
            return None
        raise DamagedError(f"{MANIFEST} is missing") from None
    try:
        fcntl.flock(manifest, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if not _is_at(folder / MANIFEST, manifest):  # deleted before it was locked
            raise BlockingIOError
        about = verify(folder)
    except BlockingIOError:  # just being deleted
        os.close(manifest)
        return None
    except BaseException:
        os.close(manifest)
        raise
    with contextlib.suppress(OSError):  # one that can only be read can be used
        (folder / USED).touch()
    return Artifact(folder, about, manifest)


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def files_of(manifest: Any) -> dict[str, tuple[int, int]]:
    """Sizes and checksums by name.

    Raises:
        DamagedError: The manifest is not what was written.
    """
    try:
        files = {name: (int(each["bytes"]), int(each["crc32"])) for name, each in manifest["files"].items()}
        if manifest["crc32"] != _checksum_of_manifest(manifest["files"], manifest["about"]):
            raise ValueError
        if any(name != Path(name).name for name in files):  # outside of the folder
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DamagedError(f"{MANIFEST} does not say what there is") from None
    return files


def verify(folder: Path) -> Mapping[str, Any]:
    """What the maker said of the artifact whose files lie in a folder, and are what was written.

    Raises:
        DamagedError, UserError: They are not.
        OSError: They cannot be read.
    """
    content = read_json(folder / MANIFEST)
    for name, (size, checksum) in files_of(content).items():
        _verify_file(folder / name, size, checksum)
    about: Mapping[str, Any] = content["about"]
    return about


def _verify_file(path: Path, size: int, checksum: int) -> None:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise DamagedError(f"{path.name} is missing") from None
    identity = status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
    if status.st_size != size:
        raise DamagedError(f"{path.name} has {status.st_size} bytes instead of {size}")
    if identity not in _verified:
        if _checksum(path) != checksum:
            raise DamagedError(f"{path.name} does not have the checksum that {MANIFEST} says")
        _verified.add(identity)


def _checksum_of_manifest(files: Mapping[str, Any], about: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps([files, about], sort_keys=True).encode())


def _checksum(path: Path) -> int:
    """CRC-32 of a whole file: of what the standard library has, the fastest everywhere, and damage is no attack."""
    value, buffer = 0, memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb") as file:
        while count := file.readinto(buffer):
            value = zlib.crc32(buffer[:count], value)
    return value


def start(folder: Path, reserve: Mapping[str, int], max_bytes: int | None) -> Path:
    """A folder to write an artifact into, instead of what may be there damaged or half done. The lock is held.

    Args:
        folder: Where the artifact will be.
        reserve: Sizes of files to make in it.
        max_bytes: What all of the kind may take, this one included; none: any size.

    Raises:
        NoRoomError: The others of the kind are all open, or being made.
        OSError: The file system does not have the room.
    """
    discard(folder)
    partial = partial_of(folder)
    with FileLock(folder.with_name("room.lock")):  # two makers must not count on the same room
        shutil.rmtree(partial, ignore_errors=True)
        if max_bytes is not None:
            _make_room(folder.parent, max_bytes - sum(reserve.values()))
        partial.mkdir()
        for name, size in reserve.items():
            with (partial / name).open("wb") as file:
                if sys.platform == "linux" and size:
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
    return partial


def partial_of(folder: Path) -> Path:
    """Where an artifact is while it is being made."""
    return folder.with_name(f"{folder.name}{PARTIAL}")


def seal(folder: Path, about: Mapping[str, Any]) -> list[str]:
    """Turn the files that were written for an artifact into it; their names. The lock is held."""
    partial = partial_of(folder)
    names = sorted(each.name for each in partial.iterdir())
    files = {name: {"bytes": (partial / name).stat().st_size, "crc32": _checksum(partial / name)} for name in names}
    checksum = _checksum_of_manifest(files, about)
    (partial / MANIFEST).write_bytes(json_bytes({"files": files, "about": dict(about), "crc32": checksum}))
    (partial / USED).touch()
    os.rename(partial, folder)
    return names


def discard(folder: Path) -> None:
    """Delete an artifact so that a kill in between leaves no damaged one. The lock is held."""
    trash = partial_of(folder.with_name(f"{folder.name}.{uuid.uuid4().hex}"))
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, trash)
        shutil.rmtree(trash)


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Hold an artifact's lock on this machine, for this process alone; whether it is held, always where it waits."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_path(folder))
    with contextlib.suppress(Timeout):
        lock.acquire(timeout=-1 if wait else 0)
    try:
        yield lock.is_locked
    finally:
        lock.release()


def make_room(kind: Path, limit_bytes: int) -> None:
    """Delete what killed makers left, then the least recently used artifacts, until a kind takes at most the limit.

    Raises:
        NoRoomError: The others of the kind are all open, or being made.
    """
    with FileLock(kind / "room.lock"):
        _make_room(kind, limit_bytes)


def _make_room(kind: Path, limit_bytes: int) -> None:
    for partial in kind.glob(f"*{PARTIAL}"):
        with locked(partial.with_name(partial.name.removesuffix(PARTIAL)), wait=False) as here:
            if here:
                shutil.rmtree(partial, ignore_errors=True)
    folders = [each for each in kind.iterdir() if each.is_dir()]
    total = sum(map(_num_bytes, folders))
    for folder in sorted((each for each in folders if each.suffix != PARTIAL), key=_last_used_ns):
        if total <= limit_bytes:
            break
        size = _num_bytes(folder)
        if _discard_unless_open(folder):
            total -= size
    if total > limit_bytes:
        raise NoRoomError(f"{kind.name} that are in use take {total / 2**30:.2f} GiB")


def _discard_unless_open(folder: Path) -> bool:
    with locked(folder, wait=False) as here:
        if not here:
            return False
        try:
            with (folder / MANIFEST).open("r+b") as file:  # over NFS an exclusive lock needs a file open for writing
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                discard(folder)
        except BlockingIOError:
            return False
        except FileNotFoundError:
            discard(folder)  # damaged: nobody can have opened it
        return True


def _num_bytes(folder: Path) -> int:
    """Size of a folder's files, 0 of those that go away meanwhile."""
    total = 0
    for each in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += each.stat().st_size
    return total


def _last_used_ns(folder: Path) -> int:
    """When an artifact was opened last, in nanoseconds; 0 where nothing says."""
    try:
        return (folder / USED).stat().st_mtime_ns
    except FileNotFoundError:
        return 0
