"""The rows of a run, read while they are being written, here or on another machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from refilled.storage import Storage
from refilled.storage.run_folder import RunFolder

_LOOK_S = 10.0  # between looks into an object store, which is asked for every run that is open


@dataclass(frozen=True)
class Row:
    """The numbers of an epoch, and after how many seconds of training it ended."""

    epoch: int
    elapsed_s: float
    numbers: dict[str, float]


class Rows:
    """The rows of one run folder, which need not exist yet, and whose file a run that resumes may replace."""

    def __init__(self, storage: Storage, folder: Path) -> None:
        self._folder = RunFolder(storage, folder)
        self._seen: tuple[int, int, int] | None = None
        self._next_look_s = 0.0

    def read(self, *, look: bool = False) -> Iterator[Row]:
        """All whole rows, if the file is another one than at the last call; `look`: also in an object store, now."""
        path = self._folder.metrics_path
        if look or time.monotonic() >= self._next_look_s:
            self._folder.storage.refresh(path)
            self._next_look_s = time.monotonic() + _LOOK_S
        try:
            status = path.stat()
        except FileNotFoundError:
            return
        seen = status.st_ino, status.st_size, status.st_mtime_ns
        if seen == self._seen:
            return
        self._seen, elapsed_s = seen, 0.0
        for row in self._folder.rows():
            elapsed_s += row.epoch_s
            found = numbers({name: value for name, value in row.to_dict().items() if name != "epoch"})
            yield Row(row.epoch, elapsed_s, found)


def last_written_ms(storage: Storage, folder: Path) -> int:
    """When a run's last row was written, in milliseconds since 1970; 0 where there is none."""
    path = RunFolder(storage, folder).metrics_path
    storage.refresh(path)
    return int(path.stat().st_mtime * 1000) if path.exists() else 0


def numbers(values: Mapping[str, object]) -> dict[str, float]:
    """The numeric fields as floats; infinities become the largest float, which is what MLflow can store."""
    largest = sys.float_info.max
    return {
        name: min(max(float(value), -largest), largest) if value == value else float("nan")
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
