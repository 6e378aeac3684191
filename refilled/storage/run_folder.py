"""The folder of one run: all that is needed to continue, report or reproduce it.

config.json      what the run is, with its class lists and data digest
classes.json     the student's classes; a label is the position in this list
metrics.jsonl    one row an epoch, the record that MLflow mirrors
checkpoint.pt    the whole state at the last epoch border; checkpoint.previous.pt: at the one before
model.pt         the student at the end, with what is needed to use it
result.json      the last row; there only when the run is finished
test.json        what a refit read from the test set, once
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refilled import distributed
from refilled.errors import UserError
from refilled.storage import mirror
from refilled.storage.checkpoint import Checkpoints
from refilled.storage.store import append_bytes, read_json, write_bytes, write_json
from refilled.storage.tensor_file import load_tensors, save_tensors

Row = dict[str, Any]
_log = logging.getLogger(__name__)


class RunFolder:
    """Reads and writes the files above; every method leaves them whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checkpoints = Checkpoints(path)

    @property
    def metrics_path(self) -> Path:
        """The rows, one JSON object a line."""
        return self.path / "metrics.jsonl"

    def create(self, about: Mapping[str, Any], classes: Sequence[str]) -> None:
        """Make the folder and say what the run is.

        Args:
            about: Its configuration, class lists and data digest, as plain data.
            classes: The student's classes.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "config.json", dict(about))
        write_json(self.path / "classes.json", list(classes))

    def rows(self) -> list[Row]:
        """All whole rows up to the first that is damaged, in order; a warning names a damaged one."""
        if not self.metrics_path.exists():
            return []
        rows: list[Row] = []
        # What follows the last newline is a row half written.
        for line in self.metrics_path.read_bytes().split(b"\n")[:-1]:
            row = _row(line)
            if row is None or row["epoch"] != len(rows) + 1:
                _log.warning("%s is damaged after %d rows, which are kept.", self.metrics_path, len(rows))
                break
            rows.append(row)
        return rows

    def append_row(self, row: Row) -> None:
        """Add an epoch's row, unless the file has that epoch already, as after a resume.

        Raises:
            StorageFullError: there is no room; the file stays as it was.
        """
        rows = self.rows()
        if any(known["epoch"] == row["epoch"] for known in rows):
            return
        whole = "".join(json.dumps(known) + "\n" for known in rows).encode()
        if self.metrics_path.exists() and self.metrics_path.stat().st_size != len(whole):
            write_bytes(self.metrics_path, whole)  # without the row that a killed process half wrote
        append_bytes(self.metrics_path, (json.dumps(row) + "\n").encode())

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Keep the state of an epoch border (see `Checkpoints`)."""
        self._checkpoints.save(state)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last whole checkpoint, if there is one."""
        return self._checkpoints.load()

    def finish(self, row: Row, model: dict[str, Any]) -> None:
        """Keep the student and the last row, and drop the checkpoint, which nobody needs any more."""
        save_tensors(self.path / "model.pt", model)
        write_json(self.path / "result.json", row)
        self._checkpoints.remove()

    def complete(self) -> None:
        """Let an object store have the whole finished run, should a kill have come between a file and its upload."""
        if distributed.rank() == 0:
            mirror.complete(self.path, last="result.json")

    def result(self) -> Row | None:
        """The last row of a finished run; none, after a warning, where one of its files is damaged."""
        path = self.path / "result.json"
        if not path.exists():
            mirror.pull(self.path)  # with the checkpoint of a run that another machine began
        if not path.exists():
            return None
        try:
            row = read_json(path)
            load_tensors(self.path / "model.pt")
        except UserError as error:
            _log.warning("%s The run is done again.", error)
            return None
        if not isinstance(row, dict) or row.get("epoch") != len(self.rows()):
            _log.warning("%s must have a row for every epoch, but has not. The run is done again.", self.metrics_path)
            return None
        return row


def _row(line: bytes) -> Row | None:
    """A line's row, none where it is damaged."""
    try:
        row = json.loads(line)
    except ValueError:  # which bytes that are not text raise too
        return None
    is_row = isinstance(row, dict) and type(row.get("epoch")) is int
    return row if is_row else None
