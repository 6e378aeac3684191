"""A student as an MLflow model that is loaded where this package is not: `runs:/RUN_ID/model`."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refilled.export import write
from refilled.storage.run_folder import RunFolder
from refilled.student import Student
from refilled.student_files import export_path
from tune.tracking.store import quiet_mlflow
from tune.tracking.students import MODEL

_LAST = "MLmodel"  # the file that is written last, and says that the others are there
_SERVED = "tune.tracking.served_student"
_REQUIREMENTS = ("mlflow", "torch", "numpy", "pillow", "pandas")


def write_mlflow_model(folder: RunFolder, metadata: Mapping[str, Any]) -> None:
    """Write a refit's student as an MLflow model, unless it is there with the same metadata.

    Args:
        folder: The refit's.
        metadata: Plain data that the model carries, its weights' digest among it.

    Raises:
        ExportError: The network cannot be exported.
    """
    storage, target = folder.storage, folder.path / MODEL
    if storage.fetch(target / _LAST) and _metadata_of(target / _LAST) == dict(metadata):
        return
    with tempfile.TemporaryDirectory(prefix="refilled-") as temporary:
        made = Path(temporary) / MODEL
        _save(folder, dict(metadata), Path(temporary), made)
        files = sorted((each for each in made.rglob("*") if each.is_file()), key=lambda path: path.name == _LAST)
        storage.remove(target / _LAST)
        for file in files:
            path = target / file.relative_to(made)
            path.parent.mkdir(parents=True, exist_ok=True)
            storage.write(path, file.read_bytes())


def _save(folder: RunFolder, metadata: dict[str, Any], temporary: Path, made: Path) -> None:
    student = Student.open(folder.model_path)
    program, about = temporary / "student.pt2", temporary / "student.json"
    exported = export_path(folder, "torch")
    if folder.storage.fetch(exported):
        shutil.copyfile(exported, program)
    else:
        write("torch", student, program)
    about.write_text(json.dumps({"classes": student.classes, "image_shape": student.image_shape}), encoding="utf-8")
    pyfunc = _pyfunc()
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import Array

    file = importlib.util.find_spec(_SERVED)
    assert file is not None, "it is a neighbour"
    scores = Array(DataType.double)
    output = [ColSpec("string", "class_name"), ColSpec("double", "probability"), ColSpec(scores, "probabilities")]
    # The one type that MLflow hands on as it comes, be it a column of texts or bytes, or an array of any shape.
    anything = TensorSpec(np.dtype("O"), (-1,), "image")
    pyfunc.save_model(
        made,
        python_model=str(file.origin),
        artifacts={"program": str(program), "about": str(about)},
        signature=ModelSignature(inputs=Schema([anything]), outputs=Schema(output)),
        input_example={"image": _example(student.image_shape)},
        pip_requirements=[f"{name}=={_public(importlib.metadata.version(name))}" for name in _REQUIREMENTS],
        metadata=metadata,
    )


def _example(shape: tuple[int, int, int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One image: a ramp, as a model is handed on, and training images may be nobody else's business."""
    _, _, width = shape
    ramp = np.linspace(0, 255, width, dtype=np.uint8)
    return np.broadcast_to(ramp, (1, *shape)).copy()


def _public(version: str) -> str:
    """Without what a build adds, such as `+cpu`, which no index has."""
    return version.partition("+")[0]


def _metadata_of(path: Path) -> dict[str, Any]:
    _pyfunc()
    from mlflow.models import Model

    return dict(Model.load(str(path)).metadata or {})


def _pyfunc() -> Any:
    """MLflow's module, which says of its own type hints, when it is imported, that they are too wide."""
    quiet_mlflow()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Any type hint is inferred as AnyType", category=UserWarning)
        return importlib.import_module("mlflow.pyfunc")
