"""What a command line asks for: which methods, and the settings of their terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from refilled.config import RunConfig, SearchConfig
from refilled.presets import PRESETS
from refilled.stages import stages_of, term_config
from tune import search as search_module
from tune import train as train_module
from tune.plan import make_plan, run_of_method
from tune.train import TrainConfig

DEFAULT = ("student", "refilled")
OWN = """
from dataclasses import dataclass
from typing import Annotated, ClassVar
from refilled.config import Float, Searched, TermConfig
from refilled.config.fields import Range
from refilled.terms import Needs, Term

@dataclass(frozen=True, kw_only=True)
class Settings(TermConfig):
    \"\"\"Of the term.\"\"\"

    strength: float = 0.5
    \"\"\"How strongly embeddings are pulled to zero.\"\"\"
    share: Annotated[float, Range(0, 1)] = 0.5

class Mine(Term):
    name: ClassVar[str] = "mine"
    Config: ClassVar[type[Settings]] = Settings
    space: ClassVar[tuple[Searched, ...]] = (Searched("strength", Float(0.1, 1.0, log=True)),)
    needs: ClassVar[Needs] = Needs(student=frozenset({"embedding"}))

    def rows(self, local):
        return {"embedding": local.student.embedding}

    def loss(self, rows, batch):
        return self.config.strength * rows["embedding"].square().mean()

NOT_A_TERM = 1
"""


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[SearchConfig]:
    """The searches that commands would have begun."""
    found: list[SearchConfig] = []
    monkeypatch.setattr(search_module, "main", lambda config: found.append(config) or 0)
    return found


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """The trainings that commands would have begun."""
    found: list[TrainConfig] = []
    monkeypatch.setattr(train_module, "main", lambda config: found.append(config) or 0)
    return found


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A term in a file of the user's, named as one does from the folder in which it lies."""
    (tmp_path / "terms").mkdir()
    (tmp_path / "terms" / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return "terms/own.py:Mine"


@pytest.mark.parametrize(
    ("words", "methods"),
    [
        ("", DEFAULT),
        ("paper", DEFAULT),
        ("--trials 5 --seeds 2", DEFAULT),
        ("--methods student refilled rkd", ("student", "refilled", "rkd")),
        ("--methods rkd", ("rkd",)),
        ("--methods=kd", ("kd",)),
        ("--methods=kd --methods=rkd", ("kd", "rkd")),
        ("--methods kd --methods rkd aml", ("kd", "rkd", "aml")),
        ("--methods=kd --trials 5 --methods rkd", ("kd", "rkd")),
        ("cifar100 --trials 5 --methods aml student --seeds 2", ("aml", "student")),
        ("--method rkd", ("student", "rkd")),
        ("--method=rkd", ("student", "rkd")),
        ("--seeds 2 --method rkd --trials 5", ("student", "rkd")),
        ("--method student", ("student",)),
        ("--method rkd>cross_entropy+lkd", ("student", "rkd>cross_entropy+lkd")),
        ("--methods student comparison+rkd>cross_entropy", ("student", "comparison+rkd>cross_entropy")),
    ],
)
def test_the_methods_of_a_search(words: str, methods: tuple[str, ...], searched: list[SearchConfig]) -> None:
    arguments = words.split()
    assert search_module.command(arguments) == 0
    (search,) = searched
    preset = PRESETS[arguments[0] if arguments and arguments[0] in PRESETS else "smoke"]()
    assert search.methods == methods
    assert search.trials == (5 if "--trials" in arguments else preset.trials)
    assert search.seeds == (2 if "--seeds" in arguments else preset.seeds)
    assert (search.run.data, search.run.epochs) == (preset.run.data, preset.run.epochs)


REFUSED = [
    ("--methods student --method rkd", "--methods and --method must not both be given."),
    ("--method=rkd --trials 5 --methods=kd", "--methods and --method must not both be given."),
    ("--method rkd kd", "--method must be followed by one method, got rkd kd."),
    ("--method rkd --method=kd", "--method must be followed by one method, got rkd kd."),
    ("--method", "--method must be followed by a method."),
    ("--methods --trials 5", "--methods must be followed by a method."),
    ("--methods rkd nosuch", "method must be one of student, kd,"),
    ("--methods=", "method must be one of student, kd,"),
    ("--methods nosuch>cross_entropy", "got 'nosuch>cross_entropy'"),
    ("--methods kd kd", "methods must be different values"),
    ("--methods kd cross_entropy+kd", "methods must be different, but they are cross_entropy+kd, cross_entropy+kd"),
    ("--methods rkd>cross_entropy>kd", "method must be one of student, kd,"),
    ("--methods student>kd", "got 'student>kd'"),
    ("--methods student refilled --epochs 0 3", "epochs must be at least 1 for stage embedding"),
    ("--methods=kd rkd", "rkd"),  # one value a sign, as elsewhere
]


@pytest.mark.parametrize(("words", "part"), REFUSED)
def test_methods_that_cannot_be_meant_are_refused_in_a_sentence(
    words: str, part: str, searched: list[SearchConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert search_module.command(words.split()) == 2
    assert not searched
    error = capsys.readouterr().err
    assert error.startswith("search: ")
    assert part in error
    assert error.count("\n") == 1


def test_epochs_of_stage_embedding_may_be_none_where_no_method_has_one(searched: list[SearchConfig]) -> None:
    assert search_module.command(["--methods", "student", "kd", "at", "--epochs", "0", "3"]) == 0
    assert searched[0].run.epochs == (0, 3)


@pytest.mark.parametrize(
    ("words", "method"),
    [
        ("", "refilled"),
        ("--method rkd", "rkd"),
        ("--method=student", "student"),
        ("--methods rkd", "rkd"),
        ("cifar100 --overlap 0.4 --method rkd>cross_entropy+lkd", "rkd>cross_entropy+lkd"),
    ],
)
def test_the_method_of_a_training(words: str, method: str, trained: list[TrainConfig]) -> None:
    assert train_module.command(words.split()) == 0
    assert trained[0].run.method == method


def test_a_training_has_one_method(trained: list[TrainConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert train_module.command(["--methods", "student", "rkd"]) == 2
    assert "--method must be one method, got student, rkd; tune/search.py compares several." in capsys.readouterr().err
    assert not trained


def flags_of(command: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The flags of terms that `--help` shows, such as `--rkd.angle-ratio`."""
    assert command([*arguments, "--help"]) == 0
    words = capsys.readouterr().out.replace("│", " ").replace(",", " ").split()
    own = ("--embedding.", "--classifier.", "--optimizer.", "--views.", "--pretraining.", "--embedding-cache.")
    return {word for word in words if word.startswith("--") and "." in word and not word.startswith(own)}


RKD = {"--rkd.weight", "--rkd.angle-ratio"}
AT = {"--at.weight"}


def test_settings_of_terms_are_flags_where_a_method_has_the_term(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # narrow terminals break long flags
    search, train = search_module.command, train_module.command
    assert flags_of(search, [], capsys) == set()
    assert flags_of(search, ["--methods", "student", "kd", "refilled"], capsys) == set()
    assert flags_of(search, ["--method", "rkd"], capsys) == RKD
    assert flags_of(search, ["--methods", "at", "rkd>cross_entropy+lkd"], capsys) == RKD | AT
    assert flags_of(train, ["--method", "at"], capsys) == AT
    assert flags_of(train, [], capsys) == set()


def test_a_terms_settings_reach_the_runs_of_the_methods_that_have_it(searched: list[SearchConfig]) -> None:
    words = "--methods student rkd rkd>cross_entropy+lkd at --rkd.angle-ratio 3 --at.weight 500 --overlaps 1"
    assert search_module.command(words.split()) == 0
    (search,) = searched
    assert search.run.terms.to_dict() == {"at": {"weight": 500.0}, "rkd": {"angle_ratio": 3.0}}
    runs = {method: run_of_method(search.run, method, search.run.epochs) for method in search.methods}
    kept = {method: settings_of(run) for method, run in runs.items()}
    rkd = {"rkd": {"angle_ratio": 3.0, "weight": 25.0}}
    assert kept == {"student": {}, "rkd": rkd, "rkd>cross_entropy+lkd": rkd, "at": {"at": {"weight": 500.0}}}


def settings_of(run: RunConfig) -> dict[str, Any]:
    """Of the terms that have any."""
    return {term: settings for term, settings in run.terms.to_dict().items() if settings}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--methods student refilled --at.weight 5", "--at.weight"),
        ("--methods at --at.wait 5", "--at.wait"),
        ("--methods at --at.weight heavy", "--at.weight"),
        ("--methods at --at.weight 0", "at.weight must be above 0"),
    ],
)
def test_settings_of_terms_are_checked(
    words: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search_module.command([*words.split(), "--overlaps", "1", "--storage", str(tmp_path / "storage")]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1


def test_a_term_in_a_file_of_the_users_is_a_method(
    own: str, searched: list[SearchConfig], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert flags_of(search_module.command, ["--method", own], capsys) == {"--mine.strength", "--mine.share"}
    search_module.command(["--method", own, "--help"])
    assert "How strongly embeddings are pulled to zero." in " ".join(capsys.readouterr().out.replace("│", " ").split())
    words = [own, f"rkd+{own}>cross_entropy", "--mine.strength", "0.25", "--overlaps", "0", "--storage", "storage"]
    assert search_module.command(["--methods", "student", *words]) == 0
    (search,) = searched
    plan = make_plan(search)
    assert [cell.method for cell in plan.cells] == ["student", own, f"rkd+{own}>cross_entropy"]
    student, alone, beside = (cell.run for cell in plan.cells)
    assert student.sources.to_dict() == {}
    assert alone.sources.to_dict() == beside.sources.to_dict() == {"terms/own.py": OWN}
    assert settings_of(alone) == {"mine": {"strength": 0.25, "share": 0.5}}
    assert [cell.teacher for cell in plan.cells] == ["none", "none", "convnet-32"]  # the term asks no teacher
    (stage,) = stages_of(alone)
    assert [term.name for term in stage.terms] == ["cross_entropy", "mine"]
    assert term_config(stage.terms[1], alone).strength == 0.25  # type: ignore[attr-defined]


def test_a_users_settings_are_checked_by_their_types(own: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--mine.share=-1", "--overlaps", "0", "--storage", "storage"]
    assert search_module.command(["--method", own, *words]) == 2
    assert capsys.readouterr().err == "search: mine.share must be in [0, 1], got -1.0.\n"


def test_help_shows_defaults_and_bounds(
    own: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert search_module.command(["--methods", "rkd", own, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "[default: none; at least 4]" in shown
    assert "over that of the distance loss; 0: distances alone. [default: 2.0; at least 0]" in shown
    assert "pulled to zero. [default: 0.5]" in shown
    assert "[default: 0.5; in [0, 1]]" in shown


def test_a_training_takes_a_file_of_the_users(own: str, trained: list[TrainConfig]) -> None:
    assert train_module.command(["--method", own, "--mine.strength", "0.125"]) == 0
    (cell,) = make_plan(trained[0].as_search()).cells
    assert settings_of(cell.run) == {"mine": {"strength": 0.125, "share": 0.5}}
    assert cell.run.epochs == (0, trained[0].run.epochs[1])


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nowhere/own.py:Mine", "method must name a Python file that can be read, got 'nowhere/own.py'"),
        ("terms/own.py:Other", "which has no 'Other'"),
        ("terms/own.py:NOT_A_TERM", "must name a subclass of refilled.terms.Term"),
        ("terms/own.py", "method must be one of"),
    ],
)
def test_a_file_that_does_not_do_is_named(
    name: str, part: str, own: str, searched: list[SearchConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert search_module.command(["--method", name]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
    assert not searched


def test_lists_take_several_values_also_where_they_are_none_by_default(searched: list[SearchConfig]) -> None:
    words = (
        "--teacher-weights x.pt --teacher-mean 0.5 0.4 0.3 --teacher-std 0.2 0.2 0.2 --student-features layer1 layer2"
    )
    assert search_module.command([*words.split(), "--images-per-class", "10", "25", "all"]) == 0
    (search,) = searched
    assert (search.run.teacher_mean, search.run.teacher_std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    assert search.run.student_features == ("layer1", "layer2")
    assert search.images_per_class == (10, 25, "all")
