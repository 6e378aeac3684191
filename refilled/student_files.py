"""What a winner leaves in its refit's folder for others to take: weights, a card, and exported programs.

student.safetensors   weights, with what is needed to build the network as metadata
README.md             the model card
student.pt2           program of `torch.export`, on request
student.onnx          the same as ONNX, on request
student.json          sizes, and what each exported file was checked and measured at

They are made once: a file whose weights are those of `model.pt` is left alone, and its measurements with it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refilled.config import ExportFormat, content_hash
from refilled.data.images import ImageSet
from refilled.errors import UserError
from refilled.export import SUFFIX, ExportError, export, size_of
from refilled.model_card import Origin, model_card
from refilled.storage.run_folder import RunFolder
from refilled.storage.tensor_file import load_tensors
from refilled.student import Student
from refilled.tasks.classification import load_test_images

WEIGHTS, CARD, RECORD = "student.safetensors", "README.md", "student.json"


def write_student_files(
    folder: RunFolder, origin: Origin, classes: tuple[str, ...], formats: Sequence[ExportFormat], num_threads: int
) -> dict[str, Any]:
    """Write a tested student's files, or find them.

    Args:
        folder: Of a refit that has read the test set: its images are read again only to check exported files.
        origin: Where the student comes from.
        classes: The student's classes.
        formats: What to export.
        num_threads: Threads for the latencies.

    Returns:
        What `student.json` holds: `parameters`, `multiply_adds`, `file_bytes` (of the weights), `model_sha256`, the
        `code_version` that wrote it first, and `export`, by format what `refilled.export.export` says, or an `error`.

    Raises:
        UserError: The refit's folder is damaged.
    """
    assert folder.test_accuracy() is not None, "the refit comes first (invariant 1)"
    storage = folder.storage
    storage.pull(folder.path)  # with the configuration, which says how precise the student is
    student = Student.open(folder.model_path)
    digest = hashlib.sha256(folder.model_path.read_bytes()).hexdigest()
    record = read_record(folder)
    if record.get("model_sha256") != digest or not storage.fetch(folder.path / WEIGHTS):
        content = _safetensors(folder.model_path)
        storage.write(folder.path / WEIGHTS, content)
        record = {"model_sha256": digest, **size_of(student), "file_bytes": len(content)}
        record |= {"code_version": origin.code_version, "export": {}}
    test: ImageSet | None = None
    for form in formats:
        path = export_path(folder, form)
        if "error" not in record["export"].get(form, {"error": ""}) and storage.fetch(path):
            continue
        test = test or load_test_images(origin.run, storage, classes)
        record["export"][form] = _export(form, student, path, folder, test, num_threads)
    card = model_card(student, origin, record, storage.read_json(folder.path / "test.json"))
    for name, text in ((CARD, card), (RECORD, json.dumps(record, indent=2) + "\n")):
        if not storage.fetch(folder.path / name) or (folder.path / name).read_text(encoding="utf-8") != text:
            storage.write(folder.path / name, text.encode())
    return record


def read_record(folder: RunFolder) -> dict[str, Any]:
    """What `student.json` holds; nothing where there is none, or a damaged one, which is written anew."""
    try:
        record = folder.storage.read_json(folder.path / RECORD)
        return record if isinstance(record["export"], dict) else {}
    except (FileNotFoundError, UserError, KeyError, TypeError):
        return {}


def export_path(folder: RunFolder, form: ExportFormat) -> Path:
    """Where an exported file of a run is."""
    return folder.path / f"student{SUFFIX[form]}"


def digest_of_files(folder: RunFolder) -> str:
    """Changes with what is said of the student and its files; empty where there are none."""
    paths = [folder.path / name for name in (RECORD, CARD)]
    if not all(folder.storage.fetch(path) for path in paths):
        return ""
    return content_hash([hashlib.sha256(path.read_bytes()).hexdigest() for path in paths])


def metrics_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by name, for MLflow: `student/parameters`, `export/onnx/p50_ms_batch_1`, ..."""
    found = {
        f"student/{name}": record[name] for name in ("parameters", "multiply_adds", "file_bytes") if name in record
    }
    for form, each in record.get("export", {}).items():
        if "error" in each:
            continue
        for name in ("file_bytes", "max_logit_difference", "test_accuracy", "num_threads"):
            found[f"export/{form}/{name}"] = each[name]
        for batch_size, latency in each["latency"].items():
            for name in ("p50_ms", "p95_ms"):
                found[f"export/{form}/{name}_batch_{batch_size}"] = latency[name]
    return {name: float(value) for name, value in found.items()}


def _export(
    form: ExportFormat, student: Student, path: Path, folder: RunFolder, test: ImageSet, num_threads: int
) -> dict[str, Any]:
    """Export to a file that appears whole; a network that cannot be exported is said, no failure."""
    with tempfile.TemporaryDirectory(prefix="refilled-") as temporary:
        made = Path(temporary) / path.name
        try:
            found = export(form, student, made, test, num_threads)
        except ExportError as error:
            return {"error": str(error)}
        folder.storage.write(path, made.read_bytes())
    return {"file": path.name, **found}


def _safetensors(model: Path) -> bytes:
    """The weights of a `model.pt`, its other fields as JSON in the metadata."""
    from safetensors.torch import save

    state = load_tensors(model)
    weights = {name: each.contiguous().clone() for name, each in state.pop("weights").items()}  # none may share memory
    plain = {name: each.tolist() if hasattr(each, "tolist") else each for name, each in state.items()}
    content: bytes = save(weights, {name: json.dumps(value) for name, value in plain.items()})
    return content
