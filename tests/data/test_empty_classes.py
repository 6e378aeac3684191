"""Classes that a data set declares and has no image of."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from image_files import make_items, write_parquet

from refilled.config import RunConfig
from refilled.errors import UserError
from refilled.execution import refit
from refilled.given_spaces import remarks
from refilled.presets import smoke
from refilled.stages import with_own_code
from refilled.storage import Storage
from refilled.tasks.classification import spaces_of
from refilled.training.compute import Compute

NAMES = ("nil", "one", "two", "three", "four", "five")  # of which the first three have images


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    for part in ("train", "test"):
        write_parquet(tmp_path / "shards" / f"{part}-00000-of-00001.parquet", make_items(part), names=NAMES)
    run = dataclasses.replace(smoke().run, data=f"parquet:{tmp_path / 'shards'}", epochs=(1, 1), teacher_epochs=1)
    return dataclasses.replace(run, num_teacher_classes=2, num_student_classes=2, overlap=0.5, val_fraction=0.25)


def test_they_are_left_out_with_a_line(run: RunConfig, storage: Storage) -> None:
    spaces = spaces_of(run, storage)
    assert (spaces.teacher, spaces.student) == (("nil", "one"), ("one", "two"))
    said = "Left out, since the data has no training image of them: three, four, five (3 classes)."
    assert remarks(run, storage) == [said]
    assert remarks(dataclasses.replace(smoke().run, num_teacher_classes=5, num_student_classes=5), storage) == []


def test_that_a_student_has_half_of_the_classes_unless_told_is_said(storage: Storage) -> None:
    assert remarks(smoke().run, storage) == [
        "Of the data's 10 classes the teacher has 5 and the student 5; --num-teacher-classes, --num-student-classes or "
        "lists of them change that."
    ]


def test_runs_on_the_rest_are_whole(run: RunConfig, storage: Storage, compute: Compute) -> None:
    assert 0 <= refit(dataclasses.replace(run, val_fraction=0.0), storage, compute) <= 1


def test_asked_for_they_are_refused(run: RunConfig, storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("one\nfour\n")
    given = dataclasses.replace(
        run, student_classes=str(tmp_path / "mine.txt"), num_teacher_classes=None, num_student_classes=None
    )
    with pytest.raises(UserError, match="classes with training images, but the data has none of 'four'"):
        spaces_of(with_own_code(given), storage)


def test_more_classes_than_are_filled_are_refused(run: RunConfig, storage: Storage) -> None:
    with pytest.raises(UserError, match="num_teacher_classes must be at most 3, got 4"):
        spaces_of(dataclasses.replace(run, num_teacher_classes=4), storage)
