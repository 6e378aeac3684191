from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path

import pytest
import torch

from refilled import rehearsal, timing
from refilled.config import RunConfig
from refilled.rehearsal import Steps, some_of
from refilled.tasks.classification import load_task
from refilled.timing import StepTimes, measure
from refilled.training.compute import Compute


def measured(run: RunConfig, storage: Path, compute: Compute) -> StepTimes:
    return measure(run, storage, compute, budget_s=0.1)


def test_every_part_of_a_run_is_timed_and_nothing_is_left(
    digits_run: RunConfig, tmp_path: Path, compute: Compute
) -> None:
    load_task(digits_run, tmp_path / "cache")
    before = sorted(tmp_path.rglob("*"))
    times = measured(digits_run, tmp_path, compute)
    seconds = dataclasses.asdict(times)
    assert (seconds.pop("peak_bytes"), seconds.pop("total_bytes")) == (0, 0)  # on a CPU
    assert all(0 < value < 60 for value in seconds.values()), seconds
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "timings"])


@pytest.mark.parametrize(
    ("method", "zero"),
    [
        ("student", {"embedding_bank_s", "embedding_live_s", "pretraining_s", "teacher_s"}),
        ("refilled_lkd", {"embedding_bank_s", "embedding_live_s"}),
        ("refilled_emb", set()),
    ],
)
def test_what_a_method_does_not_do_takes_no_time(
    digits_run: RunConfig, storage: Path, compute: Compute, method: str, zero: set[str]
) -> None:
    times = dataclasses.asdict(measured(dataclasses.replace(digits_run, method=method), storage, compute))
    assert {name for name, value in times.items() if value == 0} == zero | {"peak_bytes", "total_bytes"}
    if method != "refilled_lkd":  # their classifier stage asks no teacher
        assert times["classifier_bank_s"] == times["classifier_live_s"]


def test_the_timed_steps_are_those_of_a_run(
    digits_run: RunConfig, storage: Path, compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of step goes through `training.step` with its own batch size, network and teacher."""
    seen = set()
    real = rehearsal.step

    def spy(learner, stage, optimizer, batch, epoch):  # type: ignore[no-untyped-def]
        teacher = learner.teacher
        kind = "none" if teacher is None else "live" if teacher.bank is None else "bank"
        seen.add((stage.name, kind, learner.config.student, len(batch.image_ids)))
        return real(learner, stage, optimizer, batch, epoch)

    monkeypatch.setattr(rehearsal, "step", spy)
    recipe = dataclasses.replace(digits_run.pretraining, global_batch_size=48)
    measured(dataclasses.replace(digits_run, pretraining=recipe, global_batch_size=32), storage, compute)
    assert seen == {
        ("embedding", "live", "convnet-8", 32),
        ("embedding", "bank", "convnet-8", 32),
        ("classifier", "live", "convnet-8", 32),
        ("classifier", "bank", "convnet-8", 32),
        ("classifier", "none", "convnet-32", 48),
    }


def test_steps_train_the_student(digits_run: RunConfig, storage: Path, compute: Compute) -> None:
    task = some_of(load_task(digits_run, storage / "cache"), 64)
    steps = Steps(dataclasses.replace(digits_run, method="student"), task, None, compute, "classifier")
    before = {name: value.clone() for name, value in steps.student.state_dict().items()}
    steps()
    steps()
    assert any(not torch.equal(value, before[name]) for name, value in steps.student.state_dict().items())
    assert len(steps.optimizer.state_dict()["state"]) > 0


def test_some_images_are_as_many_as_there_are_and_their_own_labels(digits_run: RunConfig, storage: Path) -> None:
    whole = load_task(digits_run, storage / "cache")
    assert len(some_of(whole, 10**6).train) == len(whole.train)
    some = some_of(whole, 100).train
    pairs = zip(whole.train.images, whole.train.labels.tolist(), strict=True)
    label_of = {image.numpy().tobytes(): label for image, label in pairs}
    assert [label_of[image.numpy().tobytes()] for image in some.images] == some.labels.tolist()
    assert not torch.equal(some.images, whole.train.images[:100])  # at random: a source may list class by class


def test_measuring_waits_to_begin_and_goes_on_beside_others(
    digits_run: RunConfig, storage: Path, compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real = rehearsal.Steps.__call__

    def spy(self: Steps) -> None:
        calls.append("step")
        real(self)

    monkeypatch.setattr(timing.Steps, "__call__", spy)
    answers = iter([True, True, False])
    measure(
        dataclasses.replace(digits_run, method="student"),
        storage,
        compute,
        budget_s=0.1,
        start_together=lambda: calls.append("start"),
        others_measure=lambda: (calls.append("asked"), next(answers))[1],
    )
    assert calls.index("start") == 1  # after one step that warms up
    assert calls[calls.index("asked") :] == ["asked", "step", "asked", "step", "asked"]


def test_a_step_is_timed_again_when_others_have_ended(
    digits_run: RunConfig, storage: Path, compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = dataclasses.replace(digits_run, method="student"), []
    real = rehearsal.Steps.__call__

    def slow_beside_others(self: Steps) -> None:
        real(self)
        time.sleep(0.0 if asked else 0.1)

    monkeypatch.setattr(timing.Steps, "__call__", slow_beside_others)
    others_measure = functools.partial(asked.append, True)  # and so none are left
    arguments = {"budget_s": 0.1, "others_measure": others_measure}
    assert measure(run, storage, compute, **arguments, then_alone=True).alone < 1  # type: ignore[arg-type]
    asked.clear()
    assert measure(run, storage, compute, **arguments).alone == 1  # type: ignore[arg-type]
