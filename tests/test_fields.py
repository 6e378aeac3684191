"""Types and bounds of settings: what they refuse, in which words, and that they alone say so."""

from __future__ import annotations

import importlib
import math
import pickle
import typing
from dataclasses import dataclass, field, make_dataclass
from typing import Annotated, Any, Literal

import pytest

from refilled.config import (
    ClassifierConfig,
    Config,
    EmbeddingCacheConfig,
    EmbeddingConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    SearchConfig,
    TeacherConfig,
    TermConfig,
    TermSettings,
    ViewConfig,
)
from refilled.config.base import FieldError
from refilled.config.fields import Range, bounds_of, described
from refilled.config.parts import MIN_TUPLE_TEMPERATURE
from refilled.errors import UserError
from refilled.losses.comparison import MIN_TEMPERATURE
from refilled.methods import TERMS
from refilled.terms.crd import CrdConfig
from refilled.terms.vid import VidConfig
from tune.train import TrainConfig

for name in TERMS.values():
    importlib.import_module(f"refilled.terms.{name.partition(':')[0]}")


def below(kind: type[Config]) -> list[type[Config]]:
    return [each for child in kind.__subclasses__() for each in (child, *below(child))]


CLASSES = sorted(
    {kind for kind in below(Config) if kind.__module__.startswith(("refilled.", "tune."))},
    key=lambda kind: kind.__name__,
)
FIELDS = [(kind, name, hint) for kind in CLASSES for name, hint in kind.field_types().items()]
CHOICES = [each for each in FIELDS if typing.get_origin(each[2]) is Literal]
BOUNDED = [each for each in FIELDS if bounds_of(each[2])]
# Where another field also has a say, so that a wider type alone does not let a value in.
TOGETHER = {("OptimizerConfig", "momentum"), ("RunConfig", "epochs")} | {
    (kind, name) for kind in ("NetworksConfig", "RunConfig") for name in ("teacher_image_size",)
}


def id_of(value: Any) -> str | None:
    return value.__name__ if isinstance(value, type) else value if isinstance(value, str) else ""


def refusal(make: Any) -> str | None:
    try:
        make()
    except UserError as error:
        return str(error)
    return None


def within(hint: Any, number: float) -> Any:
    """A number as a value of the type, which may be a list of such."""
    if typing.get_origin(hint) is not tuple:
        return number
    parts = typing.get_args(hint)
    return (number,) * (1 if parts[-1] is Ellipsis else len(parts))


def beyond(limits: Range) -> list[float]:
    """Numbers outside: the next ones, and the bounds where they do not belong to it."""
    outside = [limits.low - 1, limits.low] if limits.ends[0] == "(" else [limits.low - 1]
    if limits.high < math.inf:
        outside += [limits.high + 1, limits.high] if limits.ends[1] == ")" else [limits.high + 1]
    return outside


def without_bounds(hint: Any) -> Any:
    return typing.get_type_hints(make_dataclass("Only", [("it", hint)]))["it"]


def with_type(kind: type[Config], name: str, hint: Any) -> type[Config]:
    """The class with another type for one of its fields, and nothing else."""
    plain = getattr(kind(), name)
    return make_dataclass("Wider", [(name, hint, field(default=plain))], bases=(kind,), frozen=True, kw_only=True)


def test_the_classes_and_their_fields_are_found() -> None:
    assert len(CLASSES) >= 20
    assert {RunConfig, SearchConfig, TrainConfig, CrdConfig, VidConfig, TermSettings} <= set(CLASSES)
    assert len(CHOICES) >= 18
    assert len(BOUNDED) >= 60


@pytest.mark.parametrize(("kind", "name", "hint"), CHOICES, ids=id_of)
def test_choices_stand_in_the_type_alone(kind: type[Config], name: str, hint: Any) -> None:
    values = typing.get_args(hint)
    for value in values:
        assert getattr(kind(**{name: value}), name) == value
    sentence = refusal(lambda: kind(**{name: "another"}))
    assert sentence is not None
    assert sentence.endswith(f"{name} must be {', '.join(values[:-1])} or {values[-1]}, got 'another'.")
    wider = with_type(kind, name, Literal[(*values, "another")])
    assert refusal(lambda: wider(**{name: "another"})) is None


@pytest.mark.parametrize(("kind", "name", "hint"), BOUNDED, ids=id_of)
def test_bounds_stand_in_the_type_alone(kind: type[Config], name: str, hint: Any) -> None:
    limits = bounds_of(hint)
    assert limits is not None
    wider = with_type(kind, name, without_bounds(hint))
    for number in beyond(limits):
        value = within(hint, number)
        sentence = refusal(lambda value=value: kind(**{name: value}))
        assert sentence is not None
        assert f"{name} must be {limits}" in sentence, number
        assert f"got {float(number)}." in sentence or f"got {number}." in sentence
        if (kind.__name__, name) not in TOGETHER:
            assert refusal(lambda value=value: wider(**{name: value})) is None, number
    for number in (math.nan, math.inf, -math.inf, 10**400, True, "1"):
        sentence = refusal(lambda number=number: kind(**{name: within(hint, number)}))
        assert sentence is not None
        assert f"{name} must be " in sentence


@pytest.mark.parametrize(("kind", "name", "hint"), FIELDS, ids=id_of)
def test_a_value_of_no_type_is_refused_by_name(kind: type[Config], name: str, hint: Any) -> None:
    sentence = refusal(lambda: kind(**{name: object()}))
    assert sentence is not None
    assert f"{name} must be {described(hint)}, got <object" in sentence


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: RunConfig(overlap=1.5), "overlap must be in [0, 1], got 1.5."),
        (lambda: RunConfig(val_fraction=1.0), "val_fraction must be in [0, 1), got 1.0."),
        (lambda: RunConfig(image_size=3), "image_size must be at least 4 or none, got 3."),
        (lambda: RunConfig(epochs=(-1, 5)), "epochs must be at least 0, got -1."),
        (
            lambda: RunConfig(epochs=(1, 2, 3)),
            "epochs must be a list of which each is a whole number of at most 64 bits",
        ),
        (
            lambda: RunConfig(seed=2**63),
            "seed must be a whole number of at most 64 bits, at least 0, got 922337203685477",
        ),
        (lambda: RunConfig(compile=1), "compile must be true or false, got 1."),
        (lambda: RunConfig(embedding=3), "embedding must be EmbeddingConfig, got 3."),
        (lambda: SearchConfig(overlaps=(0.0, 2.0)), "overlaps must be in [0, 1], got 2.0."),
        (lambda: SearchConfig(sampler="grid"), "sampler must be tpe, gp, random or qmc, got 'grid'."),
        (lambda: SearchConfig(price_per_hour=-1), "price_per_hour must be at least 0 or none, got -1."),
        (lambda: SearchConfig(resume="yes"), "resume must be true or false or none, got 'yes'."),
        (lambda: TrainConfig(cpus_per_worker=0), "cpus_per_worker must be above 0, got 0."),
        (lambda: ScheduleConfig(decay=0.0), "schedule.decay must be in (0, 1], got 0.0."),
        (lambda: ScheduleConfig(milestones=(0.5, 1.0)), "schedule.milestones must be in (0, 1), got 1.0."),
        (
            lambda: EmbeddingConfig(student_temperature=0.0),
            "embedding.student_temperature must be at least 0.003 or none,",
        ),
        (
            lambda: ClassifierConfig(posterior="cosine"),
            "classifier.posterior must be prototype or cosine_share, got 'cos",
        ),
        (
            lambda: OptimizerConfig(weight_decay=math.inf),
            "optimizer.weight_decay must be a finite number, at least 0, got",
        ),
        (lambda: TeacherConfig(global_batch_size=1), "pretraining.global_batch_size must be at least 2, got 1."),
        (lambda: ViewConfig(padding=65), "views.padding must be in [0, 64], got 65."),
        (
            lambda: EmbeddingCacheConfig(mode="always"),
            "embedding_cache.mode must be auto, cached or live, got 'always'.",
        ),
        (lambda: CrdConfig(dim=0.5), "dim must be a whole number of at most 64 bits, at least 1, got 0.5."),
        (lambda: VidConfig(initial_variance=1e-5), "initial_variance must be above 1e-05, got 1e-05."),
    ],
)
def test_sentences_word_by_word(make: Any, sentence: str) -> None:
    assert (refusal(make) or "").startswith(sentence)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("pretraining.optimizer.momentum", {"pretraining": {"optimizer": {"momentum": 2.0}}}),
        ("optimizer.momentum", {"optimizer": {"momentum": 2.0}}),
    ],
)
def test_a_nested_field_is_named_as_it_is_set(name: str, values: dict[str, Any]) -> None:
    wanted = f"{name} must be in [0, 1), got 2.0."
    assert refusal(lambda: RunConfig().with_overrides({name: 2.0})) == wanted
    assert refusal(lambda: SearchConfig().with_overrides({f"run.{name}": 2.0})) == wanted
    assert refusal(lambda: RunConfig.from_dict(values)) == wanted
    assert refusal(lambda: SearchConfig.from_dict({"run": values})) == wanted


def test_a_whole_part_that_is_refused_is_named_before_what_is_changed_in_it() -> None:
    changes = {"embedding.weight": 1.0, "embedding": 3}
    assert refusal(lambda: RunConfig().with_overrides(changes)) == "embedding must be EmbeddingConfig, got 3."


def test_a_refusal_comes_whole_from_another_process() -> None:
    with pytest.raises(FieldError) as caught:
        RunConfig(overlap=2.0)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) == "overlap must be in [0, 1], got 2.0."


@dataclass(frozen=True, kw_only=True)
class Own(TermConfig):
    """Types that a user may write."""

    weight: float = 2
    either: float | int = 3
    groups: tuple[int, ...] = (1, 2)
    share: Annotated[float, Range(0, 1)] = 1
    level: Literal[1, 2] = 1
    whatever: Any = None


def test_types_of_the_users() -> None:
    own = Own.from_dict(TermSettings.from_dict({"own": {"groups": [3, 4], "whatever": "x"}}).of("own"))
    assert own == Own(groups=(3, 4), whatever="x")
    kinds = {name: type(value) for name, value in Own().to_dict().items()}
    assert kinds == dict.fromkeys(("weight", "share"), float) | {
        **{"either": int, "groups": tuple, "level": int, "whatever": type(None)}
    }
    assert all(type(group) is int for group in own.groups)
    assert refusal(lambda: Own(level=3)) == "level must be 1 or 2, got 3."
    assert refusal(lambda: Own(level=True)) == "level must be 1 or 2, got True."
    assert refusal(lambda: Own(share=2)) == "share must be in [0, 1], got 2."


def test_a_tuples_temperature_may_be_as_low_as_its_loss_allows() -> None:
    assert MIN_TUPLE_TEMPERATURE == MIN_TEMPERATURE
