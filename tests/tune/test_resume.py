import dataclasses
import os
import pty
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from filelock import FileLock
from outcomes import row_of

from refilled.errors import UserError
from refilled.presets import smoke
from tune.plan import make_plan
from tune.resume import may_continue, only_driver
from tune.studies.searcher import StudySearcher
from tune.studies.study_store import open_storage
from tune.trials import rules_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("continuing")


def plan_of(folder, **changes):
    return make_plan(dataclasses.replace(smoke(), storage=str(folder), **changes))


def begun(folder, plan):
    """A storage in which one trial ended and one was interrupted."""
    storage = open_storage(f"sqlite:///{folder}/studies.db")
    searcher = StudySearcher(list(plan.studies.values()), storage, rules_of(plan.search))
    suggestion = searcher.suggest("ended")
    searcher.on_trial_complete("ended", row_of(30, best_epoch=3, finished=True).to_dict())
    searcher.suggest("interrupted")
    assert suggestion["number"] == 0
    return storage


def test_a_new_search_is_not_asked_about(folder, capsys):
    plan = plan_of(folder, resume=False)
    assert may_continue(plan, optuna.storages.InMemoryStorage())
    assert capsys.readouterr().out == ""


def test_where_nobody_can_be_asked_it_continues_and_says_so(folder, tmp_path, capsys):
    plan = plan_of(folder)
    assert may_continue(plan, begun(tmp_path, plan))
    assert "1 ended and 1 interrupted trials" in capsys.readouterr().out


def test_no_resume_refuses_what_is_there(folder, tmp_path):
    plan = plan_of(folder, resume=False)
    with pytest.raises(UserError, match="resume is off, but 1 ended and 1 interrupted trials"):
        may_continue(plan, begun(tmp_path, plan))


@pytest.mark.parametrize(("answer", "resume", "expected"), [("n", None, "no"), ("y", None, "yes"), ("", True, "yes")])
def test_on_a_terminal_it_asks_unless_told(folder, tmp_path, answer, resume, expected):
    begun(tmp_path, plan_of(folder))
    script = (
        "import dataclasses\n"
        "from refilled.presets import smoke\n"
        "from tune.resume import may_continue\n"
        "from tune.studies.study_store import open_storage\n"
        "from tune.plan import make_plan\n"
        f"plan = make_plan(dataclasses.replace(smoke(), storage={str(folder)!r}, resume={resume!r}))\n"
        f"storage = open_storage('sqlite:///{tmp_path}/studies.db')\n"
        "print('ANSWER', 'yes' if may_continue(plan, storage) else 'no')\n"
    )
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=child, stdout=child, stderr=subprocess.PIPE, close_fds=True
    )
    os.close(child)
    os.write(parent, f"{answer}\n".encode())
    said = b""
    while True:
        try:
            piece = os.read(parent, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        said += piece
    _, errors = process.communicate(timeout=60)
    os.close(parent)
    text = said.decode()
    assert f"ANSWER {expected}" in text, (text, errors)
    assert ("Continue?" in text) == (resume is None)


def test_one_driver_a_study_and_searches_without_a_common_one_side_by_side(folder):
    both, one, other = (plan_of(folder, overlaps=values) for values in ((0.0, 1.0), (1.0,), (0.4,)))
    elsewhere = plan_of(folder, overlaps=(1.0,), experiment="another/../name")
    assert both.key != one.key
    with only_driver(both):
        with pytest.raises(UserError, match=r"being searched on .* by another process already"), only_driver(one):
            pass
        with only_driver(other), only_driver(elsewhere):
            pass
    with only_driver(one):  # everything was let go
        pass
    assert {path.suffix for path in (folder / "searches").iterdir()} == {".lock"}


def test_a_refused_driver_lets_go_of_what_it_had(folder):
    both = plan_of(folder, overlaps=(0.0, 1.0))
    names = sorted(study.name for study in both.studies.values())
    last = FileLock(folder / "searches" / f"{names[-1][-16:]}.lock")
    with last, pytest.raises(UserError), only_driver(both):
        pass
    with only_driver(both):
        pass


def test_a_deterministic_search_has_studies_of_its_own_shape(folder):
    def names(**changes):
        return [study.name for study in plan_of(folder, **changes).studies.values()]

    plain = names()
    assert names(trials=5, sampler="random", adaptive_share=0.0, transfer=False) == plain
    deterministic = names(deterministic=True)
    assert not set(deterministic) & set(plain)
    for change in (
        {"trials": 5},
        {"sampler": "random"},
        {"pruner": "halving"},
        {"transfer": False},
        {"overlaps": (0.0, 1.0)},
        {"trial_batch": 2},
    ):
        assert not set(names(deterministic=True, **change)) & set(deterministic)
    assert names(deterministic=True, seeds=1, cpus_per_worker=0.5, resume=True) == deterministic


def test_studies_keep_the_names_under_which_they_are_stored(folder):
    def names(**changes):
        plan = plan_of(folder, overlaps=(1.0,), **changes)
        return {cell.method: plan.studies[cell.name].name.split()[-1] for cell in plan.cells}

    for pruner in ("none", "halving"):  # who stops trials is no part of what a study is
        assert names(pruner=pruner) == {"student": "dddb2b1666665a39", "refilled": "3a27fea0e07a80d0"}
    deterministic = {"student": "8c44e115375c0ddc", "refilled": "e53adaec078ee0d6"}
    assert names(deterministic=True, pruner="halving") == deterministic


def test_an_epoch_budget_below_one_trial_a_study_is_refused(folder):
    with pytest.raises(UserError, match="one whole trial of each of the 6 studies, 180 epochs"):
        plan_of(folder, max_epochs_total=179)
    assert plan_of(folder, max_epochs_total=180).search.max_epochs_total == 180
