"""What the key of a run has to hold: whatever changes the run, and no more."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from outcomes import assert_same_outcome, rows_without_times
from PIL import Image

from refilled.config import RunConfig, Sources
from refilled.execution import execute, run_folder
from refilled.identity import run_key
from refilled.presets import smoke
from refilled.storage import Storage
from refilled.storage.run_folder import RunFolder
from refilled.tasks.classification import load_task
from refilled.training.compute import Compute


def key_of(run: RunConfig, storage: Storage) -> str:
    task = load_task(run, storage)
    return run_key(run, task.spaces, task.data_digest)


# Another value of every setting. The second tuple element says whether it may make another run.
SETTINGS: dict[str, tuple[Any, bool]] = {
    "teacher_weights": ("weights.pt", True),
    "teacher_image_size": (16, True),
    "teacher_mean": ((0.4,), True),
    "teacher_std": ((0.3,), True),
    "teacher_data": ("imagefolder:", True),
    "teacher_classes": ("", True),
    "teacher_embedding": ("conv1", True),
    "teacher_features": (("conv1",), True),
    "student_weights": ("weights.pt", True),
    "student_classes": ("", True),
    "student_embedding": ("conv1", True),
    "student_features": (("conv1",), True),
    "data": ("imagefolder:", True),
    "image_size": (12, True),
    "class_order": ("", True),
    "num_teacher_classes": (4, True),
    "num_student_classes": (10, True),
    "overlap": (1.0, True),
    "val_fraction": (0.3, True),
    "split_seed": (1, True),
    "images_per_class": (20, True),
    "teacher": ("convnet-16", True),
    "student": ("convnet-4", True),
    "method": ("rkd", True),
    "epochs": ((3, 1), True),
    "teacher_epochs": (3, True),
    "global_batch_size": (32, True),
    "seed": (1, True),
    "precision": ("bfloat16", True),
    "compile": (True, True),
    "checkpoint_every": (3, False),
    "max_image_gib": (1e-7, False),
    "data_digest": ("8a4e9aee7f3d1b064f5f54fee917bb08c6d5917cb73bab279c274eddeeb4d3a5", False),  # of the digits
    "teacher_data_digest": ("0" * 64, False),
    "ncm_images_per_class": (7, True),
    "embedding.temperature": (1.0, True),
    "embedding.student_temperature": (1.0, True),
    "embedding.max_negatives": (5, True),
    "embedding.margin": (0.2, True),
    "embedding.tuples": ("batch_minimum", True),
    "embedding.weight": (5.0, True),
    **{
        f"embedding.schedule.{name}": (value, True)
        for name, value in {
            "kind": "one_cycle",
            "learning_rate": 0.05,
            "decay": 0.5,
            "milestones": (0.3,),
            "final_fraction": 0.5,
            "peak_at": 0.5,
        }.items()
    },
    "classifier.distill_weight": (3.0, True),
    "classifier.temperature": (3.0, True),
    "classifier.student_temperature": (3.0, True),
    "classifier.posterior": ("cosine_share", True),
    "classifier.instance_weight": ("own_head", True),
    "classifier.weight": (3.0, True),
    "classifier.schedule.kind": ("one_cycle", True),
    "classifier.schedule.learning_rate": (0.3, True),
    "classifier.schedule.decay": (0.5, True),
    "classifier.schedule.milestones": ((0.3,), True),
    "classifier.schedule.final_fraction": (0.5, True),
    "classifier.schedule.peak_at": (0.5, True),
    "optimizer.momentum": (0.8, True),
    "optimizer.nesterov": (False, True),
    "optimizer.weight_decay": (1e-3, True),
    "optimizer.dropout": (0.3, True),
    "views.kind": ("resized_crops", True),
    "views.padding": (2, True),
    "views.min_area": (0.5, True),
    "views.flip": (True, True),
    "views.num_views": (4, True),
    "pretraining.global_batch_size": (32, True),
    "pretraining.seed": (1, True),
    **{
        f"pretraining.{name}": (value, True)
        for name, value in {
            "optimizer.momentum": 0.8,
            "optimizer.nesterov": False,
            "optimizer.weight_decay": 1e-3,
            "optimizer.dropout": 0.3,
            "schedule.kind": "one_cycle",
            "schedule.learning_rate": 0.05,
            "schedule.decay": 0.5,
            "schedule.milestones": (0.3,),
            "schedule.final_fraction": 0.5,
            "schedule.peak_at": 0.5,
        }.items()
    },
    "embedding_cache.mode": ("live", False),
    "embedding_cache.dtype": ("float32", True),
    "embedding_cache.max_gib": (1.0, False),
}


@pytest.fixture
def base() -> RunConfig:
    run = dataclasses.replace(smoke().run, overlap=0.4, epochs=(2, 1), teacher_epochs=2)
    return run.with_overrides({"embedding_cache.mode": "cached"})


def test_every_setting_is_classified(base: RunConfig) -> None:
    assert list(SETTINGS) == list(base.flat())


@pytest.mark.parametrize("name", [name for name, (_, determines) in SETTINGS.items() if determines])
def test_setting_that_may_make_another_run_is_in_its_key(
    name: str, base: RunConfig, storage: Storage, tmp_path: Path
) -> None:
    value = SETTINGS[name][0]
    if name in ("teacher_image_size", "teacher_mean", "teacher_std"):
        own = {"teacher_weights": "weights.pt", "teacher_mean": (0.5,), "teacher_std": (0.25,)}
        base = base.with_overrides(own)
    if name in ("teacher_classes", "student_classes"):
        value = str(tmp_path / "classes.txt")
        Path(value).write_text("3\n1\n4\n")
        base = dataclasses.replace(base, sources=Sources(((value, Path(value).read_text()),)))
    if name in ("data", "teacher_data"):
        for label in base_classes():
            (tmp_path / "train" / label).mkdir(parents=True)
            for shade in range(3):
                Image.new("L", (8, 8), int(label) * 20 + shade).save(tmp_path / "train" / label / f"{shade}.png")
        value = f"imagefolder:{tmp_path}"
    if name == "class_order":
        value = str(tmp_path / "reversed.txt")
        Path(value).write_text("\n".join(reversed(base_classes())))
    if name == "num_student_classes":
        base = base.with_overrides({"overlap": 0.5, name: 4})
        value = 2
    assert key_of(base.with_overrides({name: value}), storage) != key_of(base, storage)


def base_classes() -> list[str]:
    return [str(digit) for digit in range(10)]


def trained(run: RunConfig, folder: Path, compute: Compute) -> RunFolder:
    storage = Storage.open(folder)
    execute(run, storage, compute)
    return run_folder(run, storage)


@pytest.mark.parametrize("name", [name for name, (_, determines) in SETTINGS.items() if not determines])
def test_setting_that_is_not_in_the_key_makes_no_other_run(
    name: str, base: RunConfig, storage: Storage, tmp_path: Path, compute: Compute
) -> None:
    """Rows and weights of real runs are equal to the last bit."""
    changed = base.with_overrides({name: SETTINGS[name][0]})
    assert key_of(changed, storage) == key_of(base, storage)
    assert_same_outcome(trained(changed, tmp_path / "changed", compute), trained(base, tmp_path / "base", compute))


def test_runs_of_other_settings_have_other_numbers(base: RunConfig, tmp_path: Path, compute: Compute) -> None:
    """So what is compared above can differ."""
    other = trained(base.with_overrides({"embedding.temperature": 1.0}), tmp_path / "other", compute)
    assert rows_without_times(other) != rows_without_times(trained(base, tmp_path / "base", compute))
