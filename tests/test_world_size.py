"""Runs of every method on real gloo processes against one process, in float64, and what would break the equality."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_workers import run_workers
from outcomes import TOLERANCE, assert_close_rows, rows_without_times, weights
from torch import Tensor, nn

from refilled import batch_norm, distributed
from refilled.config import RunConfig
from refilled.execution import execute, pretrain_once, run_folder
from refilled.methods import METHODS
from refilled.presets import smoke
from refilled.storage import Storage
from refilled.storage.run_folder import RunFolder
from refilled.tasks.classification import load_task
from refilled.terms import aml, comparison
from refilled.terms.base import GlobalBatch, Local
from refilled.training import loop
from refilled.training.compute import Compute
from refilled.training.learner import make_learner

FLOAT64 = Compute(torch.device("cpu"), "float64")
BROKEN = {"mining": "refilled", "batch norm": "student", "parameter after the gather": "aml"}


def configuration(storage: Storage, method: str = "refilled") -> RunConfig:
    """Two epochs of both stages and the teacher, whose last batch of two or three leaves workers without any image."""
    run = smoke().run
    overlap = 1.0 if method == "kd" else 0.4
    run = dataclasses.replace(
        run, method=method, overlap=overlap, epochs=(2, 2), teacher_epochs=2, precision="float64", student="convnet-4"
    )
    run = dataclasses.replace(run, teacher="convnet-8")
    run = run.with_overrides({"optimizer.dropout": 0.2} | ({"terms.crd.num_negatives": 100} if method == "crd" else {}))
    num_images = len(load_task(run, storage).train.labels)
    sizes = [size for size in range(100, 300) if num_images % size in (2, 3)]
    return dataclasses.replace(run, global_batch_size=sizes[0])


def per_worker_mining(student: Tensor, teacher: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    """The loss of this worker's rows alone, averaged over workers as data-parallel training does."""
    own = torch.arange(len(labels)).tensor_split(distributed.world_size())[distributed.rank()]
    if len(own) == 0:
        return student.sum() * 0
    loss = _comparison_matching(student[own], teacher[own], labels[own], **settings)
    return loss / distributed.world_size()


class ProjectedAfterTheGather(aml.Aml):
    """Breaks the law of terms: every worker projects the rows of all."""

    def rows(self, local: Local) -> dict[str, Tensor]:
        return {"embedding": local.student.embedding, "teacher_embedding": local.known_teacher.embedding}

    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        return super().loss({**rows, "aml": self.projection(rows["embedding"])}, batch)


_comparison_matching = comparison.comparison_matching
_step = loop.step


def train(storage: Storage, methods: list[str], broken: str = "") -> dict[str, dict[str, Any]]:
    """By method, and of the teacher: rows, weights, each step's loss and gradients' norms, and the terms' state."""
    with watching() as seen:
        teacher = pretrain_once(configuration(storage), storage, FLOAT64)
    return {"teacher": seen | kept_in(teacher)} | {method: _train(storage, method, broken) for method in methods}


@contextlib.contextmanager
def watching(broken: str = "") -> Iterator[dict[str, Any]]:
    """Steps and the terms' state at each stage's end, of what is trained in the block, broken on purpose if asked."""
    steps: list[tuple[float, list[float]]] = []
    terms: dict[str, dict[str, Tensor]] = {}

    def watched(learner: Any, stage: Any, *others: Any) -> tuple[Tensor, Tensor]:
        loss, norm = _step(learner, stage, *others)
        gradients = [each.grad for each in learner.parameters()]
        steps.append((float(loss), [0.0 if each is None else float(each.norm()) for each in gradients]))
        terms[stage.name] = {name: each.clone() for name, each in learner.terms.state_dict().items()}
        return loss, norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "step", watched)
        if broken == "mining":
            patch.setattr(comparison, "comparison_matching", per_worker_mining)
        if broken == "batch norm":
            patch.setattr(batch_norm, "convert_batch_norm", lambda model: model)
        if broken == "parameter after the gather":
            patch.setattr(aml, "Aml", ProjectedAfterTheGather)
        yield {"steps": steps, "terms": terms}


def kept_in(folder: RunFolder) -> dict[str, Any]:
    return {"rows": rows_without_times(folder), "weights": weights(folder)}


def _train(storage: Storage, method: str, broken: str) -> dict[str, Any]:
    run = configuration(storage, method)
    with watching(broken) as seen:
        execute(run, storage, FLOAT64)
    return seen | kept_in(run_folder(run, storage))


def worker(rank: int, folder: str, methods: list[str], broken: str) -> None:
    """Take part, and keep what this worker saw."""
    torch.save(train(Storage.open(folder), methods, broken), f"{folder}/seen-{rank}.pt")


def train_on(num_workers: int, folder: Path, methods: list[str], broken: str = "") -> list[dict[str, dict[str, Any]]]:
    """What each of the workers saw."""
    run_workers(worker, folder, num_workers, methods, broken)
    return [torch.load(folder / f"seen-{rank}.pt") for rank in range(num_workers)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The same of one process, without a process group."""
    return train(Storage.open(tmp_path_factory.mktemp("alone")), list(METHODS))


def steps_that_differ(seen: dict[str, Any], alone: dict[str, Any]) -> list[int]:
    """Positions of the steps whose loss or whose gradient norms are not those of one process."""
    pairs = list(zip(seen["steps"], alone["steps"], strict=True))
    return [
        number
        for number, ((loss, norms), (expected, expected_norms)) in enumerate(pairs)
        if loss != pytest.approx(expected, **TOLERANCE) or norms != pytest.approx(expected_norms, **TOLERANCE)
    ]


def assert_equal_tensors(seen: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert seen.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(seen[name], tensor, rtol=1e-9, atol=1e-9, msg=f"{what}: {name}")


@pytest.mark.parametrize("num_workers", [2, 4])
def test_workers_give_the_numbers_of_one_process(
    num_workers: int, alone: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Invariant 2, of every method: each step's loss and gradients, each epoch's metrics, weights, terms' own state."""
    for seen in train_on(num_workers, tmp_path, list(METHODS)):
        assert len(seen) >= 1 + 11
        for method, expected in alone.items():
            found = seen[method]
            assert len(found["steps"]) >= 6, method
            assert steps_that_differ(found, expected) == [], method
            assert_close_rows(found["rows"], expected["rows"])
            assert_equal_tensors(found["weights"], expected["weights"], method)
            for stage, state in expected["terms"].items():
                assert_equal_tensors(found["terms"][stage], state, f"{method}, {stage}")


@pytest.mark.parametrize("broken", BROKEN)
def test_what_looks_at_a_workers_share_alone_is_seen(
    broken: str, alone: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """On purpose: tuples mined, or batch statistics taken, from each worker's share; a parameter counted twice."""
    method = BROKEN[broken]
    for seen in train_on(2, tmp_path, [method], broken):
        assert steps_that_differ(seen[method], alone[method])


def test_what_the_tests_above_rest_on(alone: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    run = configuration(storage)
    task = load_task(run, storage)
    learner = make_learner(dataclasses.replace(run, method="student"), task, None, FLOAT64)
    assert any(isinstance(each, nn.BatchNorm2d) for each in learner.student.modules())
    assert len(task.train.labels) % run.global_batch_size in (2, 3)  # the last batch leaves workers idle
    with_state = {
        method: {name for state in seen["terms"].values() for name in state} for method, seen in alone.items()
    }
    assert {"0.projection.weight"} <= with_state["aml"]
    assert {"1.norm.running_var", "1.convolution.weight"} <= with_state["fitnet"]
    assert {"1.scales.0", "1.means.0.0.weight"} <= with_state["vid"]
    assert {"1.student_memory", "1.teacher_map.weight", "1.log_normalisers"} <= with_state["crd"]
