"""A group of workers on several hosts has the numbers of one host."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from commands import Command, LocalPlace, NodesPlace
from end_state import differences, end_state
from hosts import Hosts, missing
from processes import working_as

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
TRAIN = "tune/train.py --overlap 0.4 --teacher-epochs 4 --epochs 6 10 --workers 2 --precision float64"


class HostsPlace(NodesPlace):
    """Ray's head on one host, and a node of one CPU on each of two others."""

    def __init__(self) -> None:
        super().__init__()
        self.hosts = Hosts(3)

    def __enter__(self) -> Self:
        self.hosts.__enter__()
        try:
            self.start_node(0, "--head", "--num-cpus=0", "--port=6379", f"--temp-dir={self.folder}")
            for number in (1, 2):
                self.add_node(number)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, traceback)
        finally:
            self.hosts.__exit__(kind, error, traceback)

    @property
    def address(self) -> str:
        return f"{self.hosts.address(0)}:6379"

    @property
    def prefix(self) -> list[str]:
        return self.hosts.on(0)

    def add_node(self, number: int) -> None:
        self.start_node(number, f"--address={self.address}", "--num-cpus=1")

    def start_node(self, number: int, *flags: str) -> None:
        self.start(*flags, f"--node-ip-address={self.hosts.address(number)}", prefix=self.hosts.on(number))

    def hosts_of_workers(self, num: int, deadline_s: float = 120.0) -> set[int]:
        """Networks of the training workers, as soon as there are `num` of them."""
        deadline = time.monotonic() + deadline_s
        found: list[int] = []
        while len(found) < num:
            assert time.monotonic() < deadline
            time.sleep(0.1)
            pids = working_as("train worker", self.folder)
            found = [os.stat(f"/proc/{pid}/ns/net").st_ino for pid in pids if Path(f"/proc/{pid}").exists()]
        return set(found)


@pytest.fixture(autouse=True)
def _can_have_hosts() -> None:
    if reason := missing():
        pytest.skip(reason)


def test_two_hosts_give_the_numbers_of_one(tmp_path: Path) -> None:
    with LocalPlace() as place:
        Command(TRAIN, tmp_path / "one host", place).finish()
    with HostsPlace() as place:
        command = Command(TRAIN, tmp_path / "two hosts", place)
        command.start()
        assert place.hosts_of_workers(2) == {place.hosts.namespace(1), place.hosts.namespace(2)}
        command.finish()
    assert differences(end_state(tmp_path / "one host"), end_state(tmp_path / "two hosts"), 1e-9) == []
