from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from outcomes import Interruption, interrupt_at

import refilled
from refilled.config import RunConfig
from refilled.errors import UserError
from refilled.execution import execute, refit, run_folder
from refilled.metrics import EpochMetrics
from refilled.storage import Storage
from refilled.storage.model_file import load_model
from refilled.storage.tensor_file import load_tensors, tensor_bytes
from refilled.tasks.classification import load_task, load_test_images
from refilled.training.compute import Compute
from refilled.training.evaluation import accuracy, class_means, first_of_each_class, nearest_mean_accuracy


def test_refit_trains_on_all_images_and_reads_the_test_set_once(
    digits_run: RunConfig, storage: Storage, compute: Compute
) -> None:
    run = dataclasses.replace(digits_run, val_fraction=0.0, seed=31)
    value = refit(run, storage, compute)
    folder = run_folder(run, storage)
    recorded = json.loads((folder.path / "test.json").read_text())
    assert recorded["test_accuracy"] == value > 0.7
    assert all(row.val_accuracy is None for row in folder.rows())
    task = load_task(run, storage)
    searched = load_task(digits_run, storage)
    assert searched.validation is not None
    assert len(task.train.labels) == len(searched.train.labels) + len(searched.validation.labels)
    (folder.path / "test.json").write_text(json.dumps(recorded | {"test_accuracy": 0.125}))
    assert refit(run, storage, compute) == 0.125  # what was read once is not read again


def test_kept_student_gives_the_recorded_accuracy(digits_run: RunConfig, storage: Storage, compute: Compute) -> None:
    run = dataclasses.replace(digits_run, val_fraction=0.0)
    value = refit(run, storage, compute)
    folder = run_folder(run, storage)
    task = load_task(run, storage)
    test = load_test_images(run, storage, task.spaces.student)
    student = load_model(folder.model_path)
    assert accuracy(student, test, task.normalization, compute) == value
    assert json.loads((folder.path / "classes.json").read_text()) == list(task.spaces.student)
    state = load_tensors(folder.model_path)
    assert state["classes"] == list(task.spaces.student)


def test_refit_refuses_a_configuration_that_holds_images_out(
    digits_run: RunConfig, storage: Storage, compute: Compute
) -> None:
    with pytest.raises(AssertionError, match="all training images"):
        refit(digits_run, storage, compute)


def test_only_the_refit_can_reach_test_images() -> None:
    """Whatever else reads the test part must not exist: the names are looked for in the source of every module."""
    root = Path(refilled.__file__).parent.parent
    callers: dict[str, set[str]] = {}
    for path in [*root.glob("refilled/**/*.py"), *root.glob("tune/**/*.py"), *root.glob("analysis/*.py")]:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                        callers.setdefault(node.func.id, set()).add(f"{path.stem}.{function.name}")
    assert callers["load_test"] == {"classification.load_test_images"}
    # Exports of a refit's student are compared with it on these images, when its own test has been done and kept.
    after_the_test = "student_files.write_student_files"
    assert callers["load_test_images"] == {"execution.refit", "classification.verify_test_images", after_the_test}
    assert callers["write_student_files"] == {"refits.write_students"}
    assert callers["refit"] == {"worker.work"}
    returns = [
        node
        for node in ast.walk(ast.parse((root / "refilled/tasks/classification.py").read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "verify_test_images"
    ]
    assert not any(isinstance(node, ast.Return) for node in ast.walk(returns[0]))  # it gives nothing back


def test_accuracies_by_counting(digits_run: RunConfig, storage: Storage, compute: Compute) -> None:
    execute(digits_run, storage, compute)
    task = load_task(digits_run, storage)
    assert task.validation is not None
    student = load_model(run_folder(digits_run, storage).model_path).eval()
    with torch.no_grad():
        output = student(compute.place_images(task.validation.images, task.normalization))
        everything = student(compute.place_images(task.train.images, task.normalization)).embedding
    right = sum(
        int(row.argmax()) == int(label) for row, label in zip(output.logits, task.validation.labels, strict=True)
    )
    total = len(task.validation.labels)
    assert accuracy(student, task.validation, task.normalization, compute) == right / total
    means = torch.stack([everything[task.train.labels == label].mean(dim=0) for label in range(5)])
    assert torch.allclose(class_means(student, task.train, task.normalization, compute), means, atol=1e-5)
    cosines = torch.nn.functional.cosine_similarity(output.embedding[:, None], means[None], dim=2)
    expected = float((cosines.argmax(dim=1) == task.validation.labels).double().mean())
    found = nearest_mean_accuracy(student, task.validation, means, task.normalization, compute)
    assert found == pytest.approx(expected)


def test_first_of_each_class() -> None:
    labels = torch.tensor([2, 0, 2, 2, 1, 0, 0])
    assert first_of_each_class(labels, 2).tolist() == [0, 1, 2, 4, 5]


def test_damaged_model_file_is_one_sentence(tmp_path: Path, compute: Compute) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(tensor_bytes({"weights": torch.zeros(3)}))
    with pytest.raises(UserError, match=r"model.pt must hold a model that this version wrote"):
        load_model(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"model.pt must be a whole file"):
        load_model(path)


class _Trap:
    """Would run code when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("trapped"),)  # type: ignore[return-value]


def test_model_file_executes_nothing(tmp_path: Path, compute: Compute, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": _Trap()}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="must be a whole file of tensors"):
        load_model(tmp_path / "model.pt")
    assert not (tmp_path / "trapped").exists()


def test_a_run_that_goes_on_passes_its_earlier_rows_again_in_order(
    digits_run: RunConfig, tmp_path: Path, compute: Compute
) -> None:
    run = dataclasses.replace(digits_run, method="student", epochs=(0, 4))
    storage = Storage.open(tmp_path)
    seen: list[int] = []

    def take(row: EpochMetrics) -> None:
        seen.append(row.epoch)

    def take_and_interrupt(row: EpochMetrics) -> None:
        take(row)
        interrupt_at(3)(row)

    with pytest.raises(Interruption):
        execute(run, storage, compute, take_and_interrupt)
    metrics = run_folder(run, storage).metrics_path
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))  # the third row was not written yet
    execute(run, storage, compute, take)
    assert seen == [1, 2, 3, 1, 2, 3, 4]
    seen.clear()
    finished = execute(run, storage, compute, take)
    assert seen == [1, 2, 3, 4]
    assert finished.epoch == 4
    assert [row.epoch for row in run_folder(run, storage).rows()] == [1, 2, 3, 4]
