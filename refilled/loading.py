"""From whatever names a trained student to the student: a file, a run's folder, a search's storage, a URI of MLflow."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from refilled.config import Precision
from refilled.errors import UserError
from refilled.storage.files import folder_name, read_json
from refilled.student import Student
from refilled.training.evaluation import EVALUATION_BATCH_SIZE

_SCHEMES = ("runs:/", "models:/")
_MODEL, _SUMMARY = "model.pt", "summary.json"
_MOST_NAMED = 12


def load(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    precision: Precision | None = None,
    batch_size: int = EVALUATION_BATCH_SIZE,
    tracking_uri: str | None = None,
) -> Student:
    """A trained student, ready to be asked.

    Args:
        source: A run's folder (`STORAGE/runs/KEY`); its `model.pt`; the storage folder of a search of one cell, whose
            best student it is: of the method with the best validation accuracy, the refit with the first seed; or a URI
            of MLflow: `runs:/RUN_ID`, or `models:/NAME@champion` and `models:/NAME/VERSION` of a registered student.
        device: Where to compute, such as `cuda`.
        precision: How precisely; none: as the student was tested.
        batch_size: The most images that are decoded and asked about at a time.
        tracking_uri: Where MLflow is; none: as its own variable `MLFLOW_TRACKING_URI` says. For URIs alone.

    Raises:
        UserError: There is no such student, or there are several: then the sentence names their folders.
    """
    if str(source).startswith(_SCHEMES):
        with tempfile.TemporaryDirectory(prefix="refilled-") as folder:
            # By name: this package knows no MLflow, and needs none but for these URIs.
            importlib.import_module("tune.tracking.students").download(str(source), tracking_uri, Path(folder))
            return Student.open(Path(folder) / _MODEL, device=device, precision=precision, batch_size=batch_size)
    path = model_file(Path(source).expanduser())
    return Student.open(path, device=device, precision=precision, batch_size=batch_size)


def model_file(source: Path) -> Path:
    """The `model.pt` that a path stands for; see `load`.

    Raises:
        UserError: There is none, or several.
    """
    if source.is_file():
        return source
    if (source / _MODEL).is_file():
        return source / _MODEL
    if (source / "config.json").is_file():
        raise UserError(f"{source} must be the folder of a finished run, but has no {_MODEL} yet.")
    if (source / _SUMMARY).is_file():
        return _best_of_search(source)
    finished = sorted(path.parent for path in source.glob("runs/*/test.json") if path.with_name(_MODEL).is_file())
    if len(finished) == 1:
        return finished[0] / _MODEL
    if finished:
        raise UserError(f"{source} has {len(finished)} tested students; name one of their folders: {_list(finished)}.")
    raise UserError(
        f"{source} must be a {_MODEL}, the folder of a finished run, the storage folder of a search, or a URI of "
        "MLflow (runs:/RUN_ID), but there is no student there."
    )


def _best_of_search(storage: Path) -> Path:
    rows = read_json(storage / _SUMMARY)
    try:
        best: dict[tuple[Any, ...], Mapping[str, Any]] = {}
        for row in rows:
            cell = row["overlap"], row["teacher"], row["student"], row.get("images_per_class")
            if cell not in best or row["val_accuracy"] > best[cell]["val_accuracy"]:
                best[cell] = row
        folders = {cell: storage / "runs" / folder_name(row["run_keys"][0]) for cell, row in best.items()}
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{storage / _SUMMARY} must be a search's summary, but is not.") from error
    if not folders:
        raise UserError(f"{storage / _SUMMARY} has no student: every cell's trials or refits failed.")
    if len(folders) > 1:
        said = [f"{_shown(cell)}: {folder}" for cell, folder in folders.items()]
        raise UserError(f"{storage} has the students of {len(folders)} cells; name the folder of one: {_list(said)}.")
    (folder,) = folders.values()
    if not (folder / _MODEL).is_file():
        raise UserError(f"{storage / _SUMMARY} names {folder}, which must have a {_MODEL}, but has not.")
    return folder / _MODEL


def _shown(cell: Sequence[object]) -> str:
    overlap, teacher, student, images = cell
    return f"overlap {overlap:g} {teacher}>{student}" + ("" if images is None else f" {images} a class")


def _list(names: Sequence[object]) -> str:
    more = f", and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(map(str, names[:_MOST_NAMED])) + more
