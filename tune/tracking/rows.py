"""Reading the rows of a `metrics.jsonl` that is still being written."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from refilled.storage import mirror

METRICS_FILE = "metrics.jsonl"
LOOK_S = 10.0  # between looks into an object store, which is asked for every run that is open

_logger = logging.getLogger(__name__)


class RowTail:
    """The rows of one file, each given once as (epoch, numbers) as soon as its line is complete.

    The file may not exist yet, may end in half a line, and may be cut or replaced when its run resumes; then it is
    read again from its start, and the reader sees rows a second time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._inode = 0
        self._warned = False
        self._next_look_s = 0.0

    def new_rows(self, *, final: bool = False) -> Iterator[tuple[int, dict[str, float]]]:
        """Rows written since the last call.

        Args:
            final: Nothing more will be written, so that a last line without its newline counts if it is complete.

        Yields:
            The row's `epoch` and its other numeric fields.

        Raises:
            OSError: The file exists and cannot be read.
        """
        if final or time.monotonic() >= self._next_look_s:
            mirror.refresh(self._path)
            self._next_look_s = time.monotonic() + LOOK_S
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return
        if stat.st_size < self._offset or stat.st_ino != self._inode:
            self._offset, self._inode = 0, stat.st_ino
        if stat.st_size == self._offset:
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            block = file.read()
        complete = block.rfind(b"\n") + 1
        self._offset += complete
        lines = block[:complete].splitlines()
        for line in lines:
            if line.strip():
                yield from self._parsed(line, final=False)
        if final and block[complete:].strip():
            yield from self._parsed(block[complete:], final=True)

    def _parsed(self, line: bytes, *, final: bool) -> Iterator[tuple[int, dict[str, float]]]:
        try:
            row = json.loads(line)
        except ValueError:  # also what undecodable bytes raise
            row = None
        epoch = row.get("epoch") if isinstance(row, dict) else None
        if isinstance(row, dict) and isinstance(epoch, int) and not isinstance(epoch, bool):
            yield epoch, numbers({name: value for name, value in row.items() if name != "epoch"})
        elif not final and not self._warned:
            self._warned = True
            _logger.warning("%s: left out a line that is not a row with an epoch: %.80r", self._path, line)


def numbers(values: Mapping[str, object]) -> dict[str, float]:
    """The numeric fields as floats; infinities become the largest float, which is what MLflow can store."""
    largest = sys.float_info.max
    return {
        name: min(max(float(value), -largest), largest) if value == value else float("nan")
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
