"""The folder of one run: all that is needed to continue, report or reproduce it.

config.json      what the run is, with its class lists and data digest
classes.json     the student's classes; a label is the position in this list
metrics.jsonl    one row an epoch, from which MLflow is given them
checkpoint.pt    the whole state at the last epoch border; checkpoint.previous.pt: at the one before
model.pt         the student at the end, with what is needed to use it
result.json      the last row; there only when the run is finished
test.json        what a refit read from the test set, once

Beside them lie a winner's files for others to take: see `refilled.student_files`, and `model/`, MLflow's.

Every worker of a group reads the folder, which on machines without a common one is a copy; only rank 0 writes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refilled import distributed
from refilled.errors import UserError
from refilled.metrics import EpochMetrics
from refilled.storage.storage import Storage
from refilled.storage.tensor_file import load_tensors, tensor_bytes

# `rows`: of all epochs so far, as dicts; `student`, `terms` (of the present stage) and `optimizer`: their state_dicts.
# The teacher is found by the run's configuration, and schedules and draws are functions of the epoch.
STATE = frozenset({"rows", "student", "terms", "optimizer"})

_log = logging.getLogger(__name__)


class RunFolder:
    """Reads and writes the files above; every method leaves them whole.

    Args:
        storage: Where it lies.
        path: The folder, which need not exist.
    """

    def __init__(self, storage: Storage, path: Path) -> None:
        self.storage = storage
        self.path = path

    @property
    def metrics_path(self) -> Path:
        """The rows, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def model_path(self) -> Path:
        """The finished student."""
        return self.path / "model.pt"

    def create(self, about: Mapping[str, Any], classes: Sequence[str]) -> None:
        """Make the folder and say what the run is.

        Args:
            about: Its configuration, class lists and data digest, as plain data.
            classes: The student's classes.
        """
        if distributed.rank() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            self.storage.write_json(self.path / "config.json", dict(about))
            self.storage.write_json(self.path / "classes.json", list(classes))

    def rows(self) -> list[EpochMetrics]:
        """All whole rows up to the first that is damaged, in order; a warning names a damaged one."""
        if not self.metrics_path.exists():
            return []
        rows: list[EpochMetrics] = []
        # What follows the last newline is a row half written.
        for line in self.metrics_path.read_bytes().split(b"\n")[:-1]:
            row = _row(line)
            if row is None or row.epoch != len(rows) + 1:
                _log.warning("%s is damaged after %d rows, which are kept.", self.metrics_path, len(rows))
                break
            rows.append(row)
        return rows

    def append_row(self, row: EpochMetrics) -> None:
        """Add an epoch's row, unless the file has that epoch already, as after a resume.

        Raises:
            StorageFullError: There is no room; the file stays as it was.
        """
        if distributed.rank() != 0:
            return
        rows = self.rows()
        if row.epoch <= len(rows):
            return
        whole = b"".join(map(_line, rows))
        if self.metrics_path.exists() and self.metrics_path.stat().st_size != len(whole):
            self.storage.write(self.metrics_path, whole)  # without the row that a killed process half wrote
        self.storage.append(self.metrics_path, _line(row))

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Keep the state of an epoch border, and the one before in case the newest is damaged.

        A kill at any moment leaves at least one whole one, once there was one.

        Raises:
            StorageFullError: There is no room; what was there stays.
        """
        assert state.keys() == STATE
        if distributed.rank() != 0:
            return
        newest, previous = self._checkpoints
        if newest.exists():
            self.storage.rename(newest, previous)
        self.storage.write(newest, tensor_bytes(dict(state)))

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The newest state that rank 0 can read, for all workers: another might see an older or a newer one."""
        return distributed.from_rank_zero(self._newest_state() if distributed.rank() == 0 else None)

    def _newest_state(self) -> dict[str, Any] | None:
        newest, previous = self._checkpoints
        for path, instead in ((newest, "the one before is used"), (previous, "the run begins anew")):
            if not path.exists():
                continue
            try:
                state = load_tensors(path)
                if state.keys() != STATE or not state["rows"]:
                    raise UserError(f"{path} must hold a run's state, but does not.")
            except UserError as error:
                _log.warning("%s Instead %s.", error, instead if previous.exists() else "the run begins anew")
                continue
            return state
        return None

    @property
    def _checkpoints(self) -> tuple[Path, Path]:
        """The newest and the one before."""
        return self.path / "checkpoint.pt", self.path / "checkpoint.previous.pt"

    def finish(self, row: EpochMetrics, model: dict[str, Any]) -> None:
        """Keep the student and the last row, and drop the checkpoints, which nobody needs any more."""
        if distributed.rank() == 0:
            self.storage.write(self.model_path, tensor_bytes(model))
            self.storage.write_json(self.path / "result.json", row.to_dict())
            for path in self._checkpoints:
                self.storage.remove(path)
        distributed.barrier()  # nobody goes on before the folder is whole

    def complete(self) -> None:
        """Let an object store have the whole finished run, should a kill have come between a file and its upload."""
        if distributed.rank() == 0:
            self.storage.complete(self.path, last="result.json")

    def result(self) -> EpochMetrics | None:
        """The last row of a finished run; none, after a warning, where one of its files is damaged."""
        path = self.path / "result.json"
        if not path.exists():
            self.storage.pull(self.path)  # with the checkpoint of a run that another machine began
        if not path.exists():
            return None
        try:
            row = _as_row(self.storage.read_json(path))
            self.storage.fetch(self.model_path)
            load_tensors(self.model_path)
        except UserError as error:
            _log.warning("%s The run is done again.", error)
            return None
        if row is None or row.epoch != len(self.rows()):
            _log.warning("%s must have a row for every epoch, but has not. The run is done again.", self.metrics_path)
            return None
        return row

    def test(self) -> dict[str, Any] | None:
        """What a refit read from the test set: `test_accuracy`, and of which images (`num_images`, `test_digest`).

        None where it has not, or, after a warning, the file is damaged.
        """
        path = self.path / "test.json"
        if not self.storage.fetch(path):
            return None
        try:
            found = dict(self.storage.read_json(path))
            if not 0 <= float(found["test_accuracy"]) <= 1:
                raise ValueError(f"{found['test_accuracy']} is no share")
            if not isinstance(found["test_digest"], str):
                raise ValueError(f"{found['test_digest']} is no digest")
        except (UserError, KeyError, TypeError, ValueError) as error:
            _log.warning("%s must hold a test accuracy, but does not (%s).", path, error)
            return None
        return found

    def test_accuracy(self) -> float | None:
        """What a refit read from the test set, whichever that was; none as of `test`."""
        found = self.test()
        return None if found is None else float(found["test_accuracy"])

    def keep_test(self, about: Mapping[str, Any]) -> None:
        """Keep what a refit read from the test set: `test_accuracy`, and of which images."""
        if distributed.rank() == 0:
            self.storage.write_json(self.path / "test.json", dict(about))
        distributed.barrier()  # nobody reads the file before it is there


def _line(row: EpochMetrics) -> bytes:
    return (json.dumps(row.to_dict()) + "\n").encode()


def _row(line: bytes) -> EpochMetrics | None:
    """A line's row, none where it is damaged."""
    try:
        return _as_row(json.loads(line))
    except ValueError:  # which bytes that are not text raise too
        return None


def _as_row(values: Any) -> EpochMetrics | None:
    try:
        return EpochMetrics.from_dict(values)
    except ValueError:
        return None
