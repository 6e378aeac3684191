from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path

import pytest
import torch

from refilled import rehearsal, timing
from refilled.config import RunConfig
from refilled.rehearsal import Steps, some_of
from refilled.stages import complete, stages_of
from refilled.storage import Storage
from refilled.tasks.classification import load_task
from refilled.teacher import pretraining_run
from refilled.timing import Part, epoch_part, image_part, step_part, time_part, work_of
from refilled.training.compute import Compute


def steps_of(run: RunConfig) -> list[Part]:
    return [step_part(complete(run), stage) for stage in stages_of(run)]


def with_method(run: RunConfig, method: str) -> RunConfig:
    return dataclasses.replace(run, method=method)


@pytest.mark.parametrize("method", ["student", "refilled", "crd", "fitnet", "rkd>cross_entropy+kd"])
def test_every_part_is_timed_and_nothing_is_left(
    digits_run: RunConfig, tmp_path: Path, compute: Compute, method: str
) -> None:
    run = dataclasses.replace(digits_run, method=method, overlap=1.0)
    storage = Storage.open(tmp_path)
    load_task(run, storage)
    before = sorted(tmp_path.rglob("*"))
    for part in [*steps_of(run), image_part(run), epoch_part(run)]:
        timed = time_part(part, storage, compute, seconds=0.02)
        assert 0 < timed.seconds < 60
        assert (timed.peak_bytes, timed.total_bytes) == (0, 0)  # on a CPU
    assert sorted(tmp_path.rglob("*")) == before


def test_runs_share_the_parts_that_take_the_same_time(digits_run: RunConfig) -> None:
    def steps(method: str, **changes: object) -> list[Part]:
        return steps_of(dataclasses.replace(with_method(digits_run, method), **changes))  # type: ignore[arg-type]

    refilled, minus, rkd = steps("refilled"), steps("refilled_minus"), steps("rkd")
    assert refilled[0] == minus[0] != rkd[0]
    assert refilled[1] != minus[1]
    assert steps("student") == steps("crd>cross_entropy")[1:] == rkd[1:]
    others = {"overlap": 0.0, "seed": 5, "epochs": (1, 1), "teacher_epochs": 1, "val_fraction": 0.0}
    for name, value in others.items():
        assert steps("refilled", **{name: value}) == refilled
    assert steps("student", teacher="convnet-16") == steps("student")
    assert not set(steps("refilled", teacher="convnet-16")) & set(refilled)
    for name, value in {"student": "convnet-16", "global_batch_size": 32, "precision": "bfloat16"}.items():
        assert not set(steps("refilled", **{name: value})) & set(refilled)
    assert image_part(digits_run) == image_part(with_method(digits_run, "student"))


def test_names_say_where_the_teacher_is(digits_run: RunConfig) -> None:
    (fitnet,) = steps_of(with_method(digits_run, "fitnet"))
    assert fitnet.name == "convnet-8 on 64 images, stage classifier (cross_entropy+fitnet), teacher convnet-32 live"
    embedding, classifier = steps_of(with_method(digits_run, "rkd"))
    assert embedding.name == "convnet-8 on 64 images, stage embedding (rkd), teacher cached"
    assert classifier.name == "convnet-8 on 64 images, stage classifier (cross_entropy)"


def test_a_part_computes_three_forward_passes_and_a_live_teachers(digits_run: RunConfig, storage: Storage) -> None:
    task = load_task(digits_run, storage)

    def work(method: str) -> float:
        return work_of(steps_of(with_method(digits_run, method))[0], task)

    student, teacher = work_of(image_part(digits_run), task), work_of(image_part(pretraining_run(digits_run)), task)
    assert 0 < student < teacher
    assert work("student") == work("refilled") == 64 * 3 * student
    assert work("at") == 64 * (3 * student + teacher)
    assert work_of(epoch_part(digits_run), task) == 0


def test_the_timed_steps_are_those_of_a_run(
    digits_run: RunConfig, storage: Storage, compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of step goes through `training.step` with its own batch size, network and teacher."""
    seen = set()
    real = rehearsal.step

    def spy(learner, stage, optimizer, batch, epoch):  # type: ignore[no-untyped-def]
        teacher = learner.teacher
        kind = "none" if teacher is None else "live" if teacher.cache is None else "cached"
        seen.add((stage.name, kind, learner.config.student, len(batch.image_ids)))
        return real(learner, stage, optimizer, batch, epoch)

    monkeypatch.setattr(rehearsal, "step", spy)
    recipe = dataclasses.replace(digits_run.pretraining, global_batch_size=48)
    run = dataclasses.replace(digits_run, pretraining=recipe, global_batch_size=32)
    for part in [*steps_of(run), *steps_of(pretraining_run(run))]:
        time_part(part, storage, compute, seconds=0.01)
    assert seen == {
        ("embedding", "cached", "convnet-8", 32),
        ("classifier", "cached", "convnet-8", 32),
        ("classifier", "none", "convnet-32", 48),
    }


def test_the_first_call_counts_only_where_it_is_long(compute: Compute) -> None:
    def median(sleeps: list[float], seconds: float, *, must_warm: bool = False) -> float:
        calls = itertools.chain(sleeps, itertools.repeat(sleeps[-1]))
        return timing._median_s(lambda: time.sleep(next(calls)), compute, seconds, must_warm=must_warm)

    assert median([0.1, 0.001], 0.2) < 0.05
    assert median([0.2, 0.001], 0.1) >= 0.2
    assert median([0.2, 0.001], 0.1, must_warm=True) < 0.1


def test_steps_train_the_student(digits_run: RunConfig, storage: Storage, compute: Compute) -> None:
    task = some_of(load_task(digits_run, storage), 64)
    steps = Steps(dataclasses.replace(digits_run, method="student"), task, None, compute, "classifier")
    before = {name: value.clone() for name, value in steps.student.state_dict().items()}
    steps()
    steps()
    assert any(not torch.equal(value, before[name]) for name, value in steps.student.state_dict().items())
    assert len(steps.optimizer.state_dict()["state"]) > 0


def test_some_images_are_as_many_as_there_are_and_their_own_labels(digits_run: RunConfig, storage: Storage) -> None:
    whole = load_task(digits_run, storage)
    assert len(some_of(whole, 10**6).train) == len(whole.train)
    some = some_of(whole, 100).train
    pairs = zip(whole.train.images, whole.train.labels.tolist(), strict=True)
    label_of = {image.numpy().tobytes(): label for image, label in pairs}
    assert [label_of[image.numpy().tobytes()] for image in some.images] == some.labels.tolist()
    assert not torch.equal(some.images, whole.train.images[:100])  # at random: a source may list class by class
