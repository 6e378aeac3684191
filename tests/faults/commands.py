"""A command of the platform in processes of its own, and what can befall it."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from processes import SHARED_MEMORY, TITLES, abandoned_since, belonging, kill, left_over, working_as

ROOT = Path(__file__).parents[2]
LONGEST_S = 600.0  # for a command to end that nobody disturbs any more
QUIET_S = 240.0  # for a command to train (again)
TRAINING = {"tune/search.py": ("trial", "helper"), "tune/train.py": ("train worker",)}


class EndedBadlyError(Exception):
    """A command that should have recovered did not."""


class Place:
    """Where a command runs: a Ray of its own, or a cluster that is there already."""

    def __init__(self) -> None:
        # Sockets' paths have at most 107 characters, and Ray appends many.
        self.folder = Path(tempfile.mkdtemp(prefix="rf-"))
        self._shared_memory = set(os.listdir(SHARED_MEMORY))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for pid in belonging(self.folder):
            kill(pid)

    @property
    def environment(self) -> dict[str, str]:
        """Of the commands that run here."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
        return own | {"RAY_TMPDIR": str(self.folder)}

    @property
    def prefix(self) -> list[str]:
        """What commands that run here begin with."""
        return []

    def lose_node(self) -> bool:
        """Take a node away; whether there was one."""
        raise NotImplementedError

    def left_over(self, storage: Path) -> list[str]:
        """Processes that outlived their command, and files that it left in shared memory."""
        found = list((left_over(storage) | left_over(self.folder)).values())
        return found + abandoned_since(self._shared_memory)


class LocalPlace(Place):
    """Every command starts a Ray that ends with it."""


class NodesPlace(Place):
    """Nodes of a Ray cluster that asks for a token, each in processes of its own."""

    @property
    def address(self) -> str:
        """Of the head, as drivers name it."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self._token = self.folder / "token"
        self._token.touch(mode=0o600)
        self._token.write_text(secrets.token_hex(32))
        self._started: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        """With the cluster's address and token."""
        return super().environment | {
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token),
        }

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        for process in self._started:
            process.wait()

    def start(self, *flags: str, prefix: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """A node, in a process group of its own; returns when it is there."""
        number = len(self._started)
        environment = self.environment | {"REFILLED_WORK_FOLDER": str(self.folder / f"work{number}")}
        del environment["RAY_ADDRESS"]
        ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
        command = [*prefix, *ray, *flags]
        log = self.folder / f"{number}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        self._started.append(process)
        deadline = time.monotonic() + QUIET_S
        while "Ray runtime started" not in log.read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise EndedBadlyError(f"no node: {log.read_text(errors='replace')}")
            time.sleep(0.2)
        return process


class ClusterPlace(NodesPlace):
    """A head without CPUs, and nodes that have two together; one that is lost is replaced, as an autoscaler would.

    Args:
        num_nodes: 1 or 2.
        away_s: how long the cluster is smaller when a node is lost.
    """

    def __init__(self, num_nodes: int = 1, away_s: float = 0.0) -> None:
        super().__init__()
        self._num_nodes = num_nodes
        self._away_s = away_s
        self._port = free_port()
        self._nodes: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> str:
        """Of the head."""
        return f"127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        flags = ["--head", "--num-cpus=0", f"--port={self._port}", f"--dashboard-port={free_port()}"]
        self.start(*flags, f"--temp-dir={self.folder}", "--node-ip-address=127.0.0.1")
        self._nodes = [self._add_node() for _ in range(self._num_nodes)]
        return self

    def lose_node(self) -> bool:
        """SIGKILL to the oldest node's raylet and workers; a new node comes."""
        node = self._nodes.pop(0)
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()
        time.sleep(self._away_s)
        self._nodes.append(self._add_node())
        return True

    def left_over(self, storage: Path) -> list[str]:
        """What works for a driver that is gone; the cluster itself stays."""
        deadline = time.monotonic() + 40.0
        while (found := self._at_work()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return found

    def _at_work(self) -> list[str]:
        return [title for title in belonging(self.folder).values() if title.startswith(tuple(TITLES.values()))]

    def _add_node(self) -> subprocess.Popen[bytes]:
        return self.start(
            f"--address={self.address}", f"--num-cpus={2 // self._num_nodes}", "--node-ip-address=127.0.0.1"
        )


class Command:
    """A command on one storage, started as often as it takes.

    Args:
        text: the script and its flags.
        storage: folder; the command's output goes to a file beside it.
        place: where it runs.
        url: of the storage, where that is no folder.
    """

    def __init__(self, text: str, storage: Path, place: Place, url: str | None = None) -> None:
        self._script, *self._flags = text.split()
        self._storage = storage
        self._url = url or str(storage)
        self._place = place
        self._process: subprocess.Popen[bytes] | None = None
        self.was_restarted = False  # by the last fault

    def start(self) -> None:
        """In a process group of its own, its output in a file beside the storage."""
        self._storage.mkdir(parents=True, exist_ok=True)
        script = [sys.executable, str(ROOT / self._script)]
        command = [*self._place.prefix, *script, *self._flags, "--storage", self._url]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self._place.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_until_it_trains(self) -> bool:
        """Wait until workers are there; whether they are, or the command has come to its end before."""
        deadline = time.monotonic() + QUIET_S
        while not self._is_over:
            if any(working_as(role, self._place.folder) for role in TRAINING[self._script]):
                return True
            if time.monotonic() > deadline:
                raise EndedBadlyError(f"no worker within {QUIET_S:g} s: {self._tail}")
            time.sleep(0.1)
        return False

    def suffer(self, fault: str) -> bool:
        """Do the fault, and start the command again where that has ended it; whether there was something to hit."""
        assert self._process is not None
        self.was_restarted = False
        if self._is_over:
            return False
        if fault == "node":
            return self._place.lose_node()
        if fault in TITLES:
            pids = working_as(fault, self._place.folder)
            return bool(pids) and kill(pids[-1])
        if fault == "process group":
            os.killpg(self._process.pid, signal.SIGKILL)
        else:
            kill(self._process.pid, signal.SIGTERM if fault == "SIGTERM" else signal.SIGKILL)
        self._process.wait(LONGEST_S)
        self.was_restarted = True
        self.start()
        return True

    def finish(self) -> None:
        """Start the command unless it runs, and wait for its end.

        Raises:
            EndedBadlyError: it did not end with 0, or not at all.
        """
        if self._process is None:
            self.start()
        assert self._process is not None
        try:
            code = self._process.wait(LONGEST_S)
        except subprocess.TimeoutExpired as error:
            os.killpg(self._process.pid, signal.SIGKILL)
            raise EndedBadlyError(f"not over after {LONGEST_S:g} s: {self._tail}") from error
        if code != 0:
            raise EndedBadlyError(f"ended with {code}: {self._tail}")

    def end(self) -> None:
        """SIGKILL, if it still runs."""
        if self._process is not None and not self._is_over:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    @property
    def _log(self) -> Path:
        return self._storage.with_suffix(".log")

    @property
    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]

    @property
    def _is_over(self) -> bool:
        assert self._process is not None
        return self._process.poll() is not None


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
