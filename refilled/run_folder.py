"""The folder of one run: all that is needed to continue, report or reproduce it.

config.json      what the run is, with its class lists and data digest
classes.json     the student's classes; a label is the position in this list
metrics.jsonl    one row an epoch, the record that MLflow mirrors
checkpoint.pt    the whole state at the last epoch border
model.pt         the student at the end, with what is needed to use it
result.json      the last row; there only when the run is finished
test.json        what a refit read from the test set, once
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch

from refilled.config import METHODS_WITH_EMBEDDING_STAGE, RunConfig, content_hash
from refilled.data.label_space import LabelSpaces
from refilled.data.task import Task
from refilled.errors import UserError
from refilled.methods import needs_teacher
from refilled.store import read_json, write_bytes, write_json

Row = dict[str, Any]
FORMAT = 1  # part of every run's identity: raise it when the method's numbers change


def run_key(config: RunConfig, spaces: LabelSpaces, data_digest: str) -> str:
    """Content hash of everything that determines a run's numbers, followed by its seed.

    Where the data lies and how its class order is named do not count; its digest and the class lists do. What a method
    does not use does not count either, so the vanilla students of all teachers are one. Of the bank only the type
    counts: what the teacher says is rounded to it whether it comes from a bank or not.
    """
    determined = config.to_dict() | {
        "data": data_digest,
        "student_classes": spaces.student,
        "teacher_classes": spaces.teacher,
        "format": FORMAT,
        "bank": config.bank.dtype,
    }
    unused = ["class_order", "num_teacher_classes", "num_student_classes", "overlap"]
    if not needs_teacher(config):
        unused += ["teacher", "teacher_classes", "teacher_epochs", "pretraining", "bank"]
    if config.method not in METHODS_WITH_EMBEDDING_STAGE:
        unused += ["embedding", "ncm_images_per_class"]
        determined["epochs"] = (0, config.epochs[1])
    for name in unused:
        del determined[name]
    return f"{content_hash(determined)}-{config.seed}"


class RunFolder:
    """Reads and writes the files above; every method leaves them whole."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def metrics_path(self) -> Path:
        """The rows, one JSON object a line."""
        return self.path / "metrics.jsonl"

    def create(self, config: RunConfig, task: Task) -> None:
        """Make the folder and say what the run is."""
        self.path.mkdir(parents=True, exist_ok=True)
        about = {
            "config": config.to_dict(),
            "teacher_classes": task.spaces.teacher,
            "student_classes": task.spaces.student,
            "data_digest": task.data_digest,
        }
        write_json(self.path / "config.json", about)
        write_json(self.path / "classes.json", task.spaces.student)

    def rows(self) -> list[Row]:
        """All whole rows, in order."""
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is a row half written

    def append_row(self, row: Row) -> None:
        """Add an epoch's row, unless the file has that epoch already, as after a resume."""
        rows = self.rows()
        if not rows and not self.metrics_path.exists():
            self.metrics_path.touch()
        if any(known["epoch"] == row["epoch"] for known in rows):
            return
        text = self.metrics_path.read_text(encoding="utf-8")
        if text and not text.endswith("\n"):  # drop a half-written row of a killed process
            write_bytes(self.metrics_path, text[: text.rfind("\n") + 1].encode())
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint."""
        save_tensors(self.path / "checkpoint.pt", state)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, if there is one."""
        path = self.path / "checkpoint.pt"
        return load_tensors(path) if path.exists() else None

    def finish(self, row: Row, model: dict[str, Any]) -> None:
        """Keep the student and the last row, and drop the checkpoint, which nobody needs any more."""
        save_tensors(self.path / "model.pt", model)
        write_json(self.path / "result.json", row)
        (self.path / "checkpoint.pt").unlink(missing_ok=True)

    def result(self) -> Row | None:
        """The last row of a finished run."""
        path = self.path / "result.json"
        return read_json(path) if path.exists() else None


def save_tensors(path: Path, value: dict[str, Any]) -> None:
    """Write tensors and plain values atomically."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_bytes(path, buffer.getvalue())


def load_tensors(path: Path) -> dict[str, Any]:
    """Read tensors and plain values to the CPU, without executing anything from the file.

    Raises:
        UserError: naming the file, when it is missing, damaged or holds other things.
    """
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} must be a whole file of tensors and plain values, but cannot be read.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a dictionary, got {type(value).__name__}.")
    return value
