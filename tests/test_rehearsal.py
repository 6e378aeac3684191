"""What cannot work is found on a few images, before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from users_files import NETWORK, TERM, small

from refilled.errors import UserError
from refilled.rehearsal import rehearse
from refilled.storage import Storage
from refilled.tasks.classification import load_task
from refilled.teacher import pretraining_run


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('rows["regression"].mean()', 'rows["regression"]', "RuntimeError: grad can be implicitly created only"),
        (
            'return {"regression": difference.square().mean(dim=1)}',
            "return None",
            "'NoneType' object has no attribute 'items'",
        ),
        ("difference.square().mean(dim=1)", "difference.square().mean()", "cannot be used"),
        ('rows["regression"].mean()', "1 / 0", "division by zero, in line 44 of"),
        ("super().__init__(config, setting)", "pass", "AttributeError"),
        ('rows["regression"].mean()', '__import__("sys").exit(3)', "SystemExit: 3"),
        ("def loss(", "def lose(", "Can't instantiate abstract class Regression"),
    ],
)
def test_a_rehearsal_finds_what_a_term_cannot_do(
    old: str, new: str, sentence: str, own: Path, storage: Storage
) -> None:
    assert old in TERM
    (own / "own.py").write_text(TERM.replace(old, new))
    run = small(f"{own}/own.py:Regression")
    with pytest.raises(UserError, match=r"own\.py:Regression cannot be used: ") as caught:
        rehearse(run, load_task(run, storage))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rehearsal_finds_a_loss_that_is_not_finite(own: Path, storage: Storage) -> None:
    (own / "own.py").write_text(TERM.replace('rows["regression"].mean()', 'rows["regression"].mean() / 0'))
    run = small(f"{own}/own.py:Regression")
    with pytest.raises(UserError, match=r"own\.py:Regression must have a finite loss, .* stage classifier is inf\."):
        rehearse(run, load_task(run, storage))


def test_a_rehearsal_passes_what_works_and_leaves_nothing(own: Path, storage: Storage) -> None:
    for method in ("student", "refilled", "fitnet", "crd", f"{own}/own.py:Regression"):
        run = small(method)
        rehearse(run, load_task(run, storage))


def test_maps_that_do_not_exist_are_found_by_a_rehearsal(own: Path, storage: Storage) -> None:
    run = small("fitnet", student=f"{own}/net.py:Tiny")
    with pytest.raises(UserError, match=r"fitnet\.map must be at most 1"):
        rehearse(run, load_task(run, storage))


@pytest.mark.parametrize(
    ("new", "sentence"),
    [
        ("if self.training else 1 / 0", "ZeroDivisionError: division by zero, in line 17 of"),
        ("if not self.training else self.missing", "AttributeError: 'Tiny' object has no attribute 'missing'"),
    ],
)
def test_a_rehearsal_evaluates_and_trains_a_network(new: str, sentence: str, own: Path, storage: Storage) -> None:
    old = "maps = self.conv(images)"
    assert old in NETWORK
    (own / "net.py").write_text(NETWORK.replace(old, f"maps = (self.conv(images) {new})"))
    run = small("rkd", teacher=f"{own}/net.py:Tiny", student=f"{own}/net.py:Tiny")
    for each in (run, pretraining_run(run)):
        with pytest.raises(UserError) as caught:
            rehearse(each, load_task(each, storage))
        assert sentence in str(caught.value)
