"""Whole two-stage runs on real gloo processes against one process, in float64, and what would break the equality."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_workers import run_workers
from torch import Tensor, nn

from refilled import distributed
from refilled.config import RunConfig
from refilled.execution import cache_of, execute, run_folder
from refilled.presets import smoke
from refilled.tasks.classification import load_task
from refilled.training import loop as training
from refilled.training.compute import Compute

FLOAT64 = Compute(torch.device("cpu"), "float64")
TOLERANCE = {"rel": 1e-9, "abs": 1e-12}


def configuration(storage: Path) -> RunConfig:
    """Two epochs of both stages and the teacher, whose last batch of two or three leaves workers without any image."""
    run = smoke().run
    run = dataclasses.replace(run, overlap=0.4, epochs=(2, 2), teacher_epochs=2, precision="float64")
    run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, dropout=0.2))
    num_images = len(load_task(run, cache_of(storage)).train.labels)
    sizes = [size for size in range(100, 300) if num_images % size in (2, 3)]
    return dataclasses.replace(run, global_batch_size=sizes[0])


def per_worker_mining(config: Any, student: Tensor, teacher: Tensor, labels: Tensor, largest_class: int) -> Tensor:
    """The loss of this worker's rows alone, averaged over workers as data-parallel training does."""
    own = torch.arange(len(labels)).tensor_split(distributed.world_size())[distributed.rank()]
    if len(own) == 0:
        return student.sum() * 0
    loss = _embedding_loss(config, student[own], teacher[own], labels[own], largest_class)
    return loss / distributed.world_size()


_embedding_loss = training.embedding_loss
_step = training._step


def train(storage: Path, broken: str = "") -> dict[str, Any]:
    """Rows, weights, and of every step its loss and the norm of each parameter's gradient."""
    steps: list[tuple[float, list[float]]] = []

    def watched(learner: Any, *others: Any) -> tuple[Tensor, Tensor]:
        loss, norm = _step(learner, *others)
        gradients = [each.grad for each in learner.student.parameters()]
        steps.append((float(loss), [0.0 if each is None else float(each.norm()) for each in gradients]))
        return loss, norm

    run = configuration(storage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_step", watched)
        if broken == "mining":
            patch.setattr(training, "embedding_loss", per_worker_mining)
        if broken == "batch norm":
            patch.setattr(distributed, "convert_batch_norm", lambda model: model)
        execute(run, storage, FLOAT64)
    folder = run_folder(run, storage)
    return {"rows": folder.rows(), "steps": steps, "weights": torch.load(folder.path / "model.pt")["weights"]}


def worker(rank: int, storage: str, broken: str) -> None:
    """Take part, and keep what this worker saw."""
    torch.save(train(Path(storage), broken), f"{storage}/seen-{rank}.pt")


def train_on(num_workers: int, storage: Path, broken: str = "") -> list[dict[str, Any]]:
    """What each of the workers saw."""
    run_workers(worker, storage, num_workers, broken)
    return [torch.load(storage / f"seen-{rank}.pt") for rank in range(num_workers)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same of one process, without a process group."""
    return train(tmp_path_factory.mktemp("alone"))


def comparable(row: dict[str, Any]) -> dict[str, float]:
    """All that a row says as numbers, but times."""
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, (int, float)) and name not in ("images_per_second", "epoch_s")
    }


def steps_that_differ(seen: dict[str, Any], alone: dict[str, Any]) -> list[int]:
    """Positions of the steps whose loss or whose gradient norms are not those of one process."""
    pairs = list(zip(seen["steps"], alone["steps"], strict=True))
    return [
        number
        for number, ((loss, norms), (expected, expected_norms)) in enumerate(pairs)
        if loss != pytest.approx(expected, **TOLERANCE) or norms != pytest.approx(expected_norms, **TOLERANCE)
    ]


@pytest.mark.parametrize("num_workers", [2, 4])
def test_workers_give_the_numbers_of_one_process(num_workers: int, alone: dict[str, Any], tmp_path: Path) -> None:
    """Invariant 2: loss and every gradient's norm of every step, every metric of every epoch, every weight."""
    for seen in train_on(num_workers, tmp_path):
        assert len(seen["steps"]) > 20  # the teacher's and both stages'
        assert steps_that_differ(seen, alone) == []
        assert [row["stage"] for row in seen["rows"]] == [row["stage"] for row in alone["rows"]]
        for row, expected in zip(seen["rows"], alone["rows"], strict=True):
            assert comparable(row) == pytest.approx(comparable(expected), **TOLERANCE)
        for name, tensor in alone["weights"].items():
            torch.testing.assert_close(seen["weights"][name], tensor, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("broken", ["mining", "batch norm"])
def test_what_looks_at_a_workers_share_alone_is_seen(broken: str, alone: dict[str, Any], tmp_path: Path) -> None:
    """Broken on purpose: tuples mined, or batch statistics taken, from each worker's share."""
    for seen in train_on(2, tmp_path, broken):
        assert steps_that_differ(seen, alone)


def test_the_model_has_batch_norm_and_the_last_batch_leaves_workers_idle(tmp_path: Path) -> None:
    """What the tests above rest on."""
    run = configuration(tmp_path)
    task = load_task(run, cache_of(tmp_path))
    learner = training._make_learner(dataclasses.replace(run, method="student"), task, None, FLOAT64)
    assert any(isinstance(each, nn.BatchNorm2d) for each in learner.student.modules())
    assert len(task.train.labels) % run.global_batch_size in (2, 3)
