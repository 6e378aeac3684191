"""A finished stage embedding, from which runs that differ only in their classifier settings go on.

`STORAGE/embeddings/KEY/` holds the student at the end of the stage (`stage.pt`) and the stage's rows (`stage.json`). It
takes as much room as the student's weights, like a run's `model.pt`: 0.04 MB for convnet-8, 0.7 MB for wrn-16-1 and
9 MB for wrn-40-2. There is one for every different embedding stage that was finished, and nothing but a person removes
it; a run that misses it trains the stage.

The optimiser is not kept: every stage begins with its own. Nobody waits for another run that is training the same
stage: both train it, and whoever ends second leaves the files as they are.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refilled import distributed
from refilled.errors import UserError
from refilled.storage import mirror
from refilled.storage.run_folder import Row, RunFolder
from refilled.storage.store import only_here, read_json, write_json
from refilled.storage.tensor_file import load_tensors, save_tensors

_log = logging.getLogger(__name__)


def embeddings_of(storage: Path) -> Path:
    """Where finished embedding stages are kept."""
    return storage / "embeddings"


@dataclass(frozen=True)
class FinishedStage:
    """The student at the end of stage embedding, and the stage's rows, the last of which is the state's."""

    student: dict[str, Tensor]
    rows: list[Row]


@dataclass(frozen=True)
class SharedStage:
    """The folder of one embedding stage, as one run sees it.

    Attributes:
        path: that folder, named by `refilled.identity.stage_key`; it need not exist.
        num_epochs: of the stage.
        teacher: identity of the run's teacher; what was learned from another one is not taken.
        run: folder of the run, which has the rows of the stage once it has trained it.
        device: where the group's collectives happen.
    """

    path: Path
    num_epochs: int
    teacher: str
    run: RunFolder
    device: torch.device

    @property
    def weights_path(self) -> Path:
        """The student's state_dict."""
        return self.path / "stage.pt"

    @property
    def about_path(self) -> Path:
        """The rows, the teacher, the run that trained the stage, and a digest; written last."""
        return self.path / "stage.json"

    def load(self, student: nn.Module) -> FinishedStage | None:
        """The finished stage, if there is a whole one that fits the student; the workers of a group decide alike.

        Each worker reads the files for itself, and all train the stage where one of them cannot.
        """
        found = None
        try:
            found = self._read(student)
        except UserError as error:
            _log.warning("%s Stage embedding is trained.", error)
        missing = torch.tensor(int(found is None), device=self.device)
        return found if int(distributed.sum_over_workers(missing)) == 0 else None

    def keep(self, student: nn.Module) -> None:
        """Write the stage that this run, or this group of workers, has just finished, unless it is there already.

        Files that cannot be written are a warning: the run has what it needs.
        """
        with only_here(self.path, wait=False) as is_free:  # whoever holds it is writing the same
            if not is_free or distributed.rank() != 0 or self._is_kept(student):
                return
            rows = [_as_trained(row) for row in self.run.rows()[: self.num_epochs]]
            if not self._are_all(rows):
                _log.warning("%s must hold every row of stage embedding to share it.", self.run.metrics_path)
                return
            about = {"rows": rows, "teacher": self.teacher, "run": self.run.path.name}
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                save_tensors(self.weights_path, {name: tensor.cpu() for name, tensor in student.state_dict().items()})
                write_json(self.about_path, about | {"digest": _digest(about, self.weights_path.read_bytes())})
            except OSError as error:
                _log.warning("Stage embedding %s cannot be kept (%s).", self.path.name, error.strerror or error)

    def _is_kept(self, student: nn.Module) -> bool:
        try:
            return self._read(student) is not None
        except UserError:  # warned about when the run began, unless it was damaged since
            return False

    def _read(self, student: nn.Module) -> FinishedStage | None:
        """What the files hold, or none where one is not there.

        Raises:
            UserError: they are damaged, or not of this student, teacher and stage.
        """
        damaged = f"{self.path} must hold a whole embedding stage of this student, but does not."
        mirror.fetch(self.weights_path)
        try:
            about, content = read_json(self.about_path), self.weights_path.read_bytes()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(damaged) from error
        # Before the weights are unpickled: torch reads most files in which a byte has changed without a complaint.
        if not isinstance(about, dict) or about.pop("digest", None) != _digest(about, content):
            raise UserError(damaged)
        if about["teacher"] != self.teacher:
            raise UserError(f"{self.path} must come from the teacher in the same storage, but comes from another.")
        weights = load_tensors(self.weights_path)
        if _shapes(weights) != _shapes(student.state_dict()) or not self._are_all(about["rows"]):
            raise UserError(damaged)
        return FinishedStage(student=weights, rows=about["rows"])

    def _are_all(self, rows: list[Row]) -> bool:
        expected = [(epoch, "embedding") for epoch in range(1, self.num_epochs + 1)]
        return [(row["epoch"], row["stage"]) for row in rows] == expected


def _as_trained(row: Row) -> Row:
    """A row without the mark of one that was taken over."""
    return {name: value for name, value in row.items() if name != "shared"}


def _shapes(weights: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}


def _digest(about: dict[str, Any], content: bytes) -> str:
    """SHA-256 of both files, of the first without its digest."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode() + content).hexdigest()
