import json
import random

import optuna
import pytest

from refilled.config import Choice, Float, RunConfig, ScheduleConfig, TermSettings
from refilled.identity import determining
from refilled.methods import METHODS, terms_of
from refilled.stages import check, complete, place_of, stages_of, with_own_code
from tune.studies.space import EDGE, Edge, as_data, default_point, edges, milestones, sample, space

STEP = ScheduleConfig(kind="step", learning_rate=0.1, decay=0.2, milestones=(0.25, 0.5, 0.75))
RELEASED = {
    "embedding.tuples": "batch_minimum",
    "embedding.margin": 0.2,
    "embedding.weight": 1000.0,
    "embedding.temperature": 7.0,
    "classifier.distill_weight": 100.0,
    "embedding.schedule": STEP,
    "classifier.schedule": STEP,
}


def run_of(method, **overrides):
    """A method's run as a search plans it: with the settings of its terms written out."""
    return complete(RunConfig(method=method).with_overrides(overrides))


class RandomTrial(optuna.trial.FixedTrial):
    """Draws any point of the space, both ends of every interval included; remembers what was drawn."""

    def __init__(self, generator):
        super().__init__({})
        self.generator, self.drawn = generator, {}

    def suggest_float(self, name, low, high, *, step=None, log=False):
        self.drawn[name] = self.generator.choice([low, high, self.generator.uniform(low, high)])
        return self.drawn[name]

    def suggest_categorical(self, name, choices):
        self.drawn[name] = self.generator.choice(choices)
        return self.drawn[name]


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        *((method, {}) for method in METHODS),
        ("rkd+comparison>cross_entropy+lkd+at", {}),
        ("refilled", RELEASED),
        ("refilled", {"classifier.distill_weight": 0.0, "classifier.schedule.milestones": ()}),
    ],
)
def test_every_sample_is_a_valid_run(method, overrides):
    run = run_of(method, **overrides)
    generator = random.Random(0)
    kinds = set()
    for _ in range(300):
        overrides = sample(RandomTrial(generator), run)
        assert set(overrides) <= set(run.flat())
        varied = run.with_overrides(overrides)
        check(varied)
        assert {name: varied.flat()[name] for name in overrides} == overrides
        assert RunConfig.from_dict(json.loads(json.dumps(varied.to_dict()))) == varied
        kinds.add(varied.classifier.schedule.kind)
    assert kinds == {"step", "cosine", "one_cycle"}


@pytest.mark.parametrize("method", METHODS)
def test_only_what_the_method_reads_is_searched(method):
    run = run_of(method)
    names = {entry.name for entry in space(run)}
    read = {name.replace("schedule.milestones", "schedule.first_milestone") for name in determining(run)}
    assert names <= read
    terms = {term for stage in terms_of(method).values() for term in stage}
    assert ("embedding.schedule.kind" in names) == ("embedding" in terms_of(method))
    assert ("embedding.temperature" in names) == ("embedding.max_negatives" in names) == ("comparison" in terms)
    distils = not terms.isdisjoint({"kd", "lkd", "weighted_lkd"})
    assert ("classifier.distill_weight" in names) == ("classifier.temperature" in names) == distils
    assert {"classifier.schedule.learning_rate", "optimizer.weight_decay"} <= names
    assert {name.split(".")[1] for name in names if name.startswith("terms.")} <= terms
    if method == "student":
        assert not any(name.endswith("weight") for name in names)


@pytest.mark.parametrize("method", [*METHODS, "rkd+comparison>cross_entropy+lkd+at", "comparison+rkd>cross_entropy"])
def test_no_weight_of_a_whole_stage_is_searched_and_that_of_every_term_beside_it_is(method):
    run = run_of(method)
    names = {entry.name for entry in space(run)}
    assert "classifier.weight" not in names
    expected = set()
    for stage in stages_of(run):
        first, *beside = stage.terms
        assert first.weight_space is None or f"{place_of(first)}.{first.weight_space.name}" not in names
        assert all(term.weight_space is not None for term in beside)
        expected |= {f"{place_of(term)}.{term.weight_space.name}" for term in beside}
    assert {name for name in names if name.endswith("weight")} == expected


def test_the_weights_that_are_searched_by_name():
    def weights(method):
        return {entry.name for entry in space(run_of(method)) if entry.name.endswith("weight")}

    assert weights("refilled_emb") == weights("rkd") == weights("aml") == set()
    assert weights("refilled") == weights("kd") == {"classifier.distill_weight"}
    assert weights("at") == {"terms.at.weight"}
    assert weights("comparison+rkd>cross_entropy") == {"terms.rkd.weight"}
    assert weights("rkd+comparison>cross_entropy") == {"embedding.weight"}


def test_every_stage_of_every_method_has_the_same_range_of_learning_rates():
    for method in METHODS:
        rates = {entry.name: entry.domain for entry in space(run_of(method)) if entry.name.endswith("learning_rate")}
        assert rates == {f"{stage}.schedule.learning_rate": Float(0.01, 2.0, log=True) for stage in terms_of(method)}


def test_a_term_that_stands_in_two_stages_is_searched_once():
    names = [entry.name for entry in space(run_of("rkd>cross_entropy+rkd"))]
    assert names.count("terms.rkd.angle_ratio") == 1
    assert len(names) == len(set(names))


def test_a_setting_is_drawn_only_where_it_has_an_effect():
    run = RunConfig(method="student")
    seen = {}
    for seed in range(100):
        trial = RandomTrial(random.Random(seed))
        overrides = sample(trial, run)
        seen[overrides["classifier.schedule.kind"]] = {name.rpartition(".")[2] for name in overrides}
        assert set(trial.drawn) == {entry.name for entry in space(run) if entry.is_drawn(trial.drawn)}
    shared = {"kind", "learning_rate", "weight_decay"}
    assert seen == {
        "step": shared | {"decay", "milestones"},
        "cosine": shared | {"final_fraction"},
        "one_cycle": shared | {"final_fraction", "peak_at"},
    }


# Settings of terms outside their ranges.
BEYOND = {
    "rkd": {"angle_ratio": 8.0},
    "aml": {"margin": 1.9},
    "fitnet": {"weight": 2000.0},
    "at": {"weight": 1.0},
    "vid": {"weight": 20.0, "initial_variance": 0.5},
    "crd": {"weight": 20.0, "temperature": 1.0},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "schedule", [STEP, ScheduleConfig(kind="one_cycle", peak_at=0.7), ScheduleConfig(learning_rate=5.0)]
)
def test_the_default_point_is_the_run_itself(method, schedule):
    beyond = {
        "embedding.schedule": schedule,
        "classifier.schedule": schedule,
        "embedding.max_negatives": 3,
        "embedding.temperature": 9.0,
        "classifier.distill_weight": 100.0,
        "optimizer.weight_decay": 1e-6,
        "terms": TermSettings.from_dict(BEYOND),
    }
    run = run_of(method, **beyond)
    point = default_point(run)
    assert run.with_overrides(sample(optuna.trial.FixedTrial(point), run)) == run
    study = optuna.create_study()
    study.enqueue_trial(point)  # Optuna warns, and here fails, where a point is outside the space
    trial = study.ask()
    assert run.with_overrides(sample(trial, run)) == run
    assert trial.params == point


def test_what_the_space_cannot_say_becomes_the_nearest_or_is_drawn():
    run = RunConfig(method="kd").with_overrides(
        {
            "classifier.distill_weight": 0.0,
            "classifier.schedule": ScheduleConfig(kind="step", milestones=(), decay=0.1),
            "optimizer.weight_decay": 0.0,
        }
    )
    point = default_point(run)
    assert point["classifier.distill_weight"] == 0.1
    assert point["optimizer.weight_decay"] == 1e-5
    assert "classifier.schedule.first_milestone" not in point
    overrides = sample(optuna.trial.FixedTrial(point | {"classifier.schedule.first_milestone": 0.5}), run)
    assert overrides["classifier.schedule.milestones"] == (0.5, 0.75)


def test_the_batch_decides_how_many_negatives_there_are_with_batch_minimum():
    run = RunConfig().with_overrides({"embedding.tuples": "batch_minimum"})
    assert "embedding.max_negatives" in {entry.name for entry in space(RunConfig())}
    assert "embedding.max_negatives" not in {entry.name for entry in space(run)}


def test_domains_widen_to_hold_a_value():
    assert Float(0.1, 1.0).holding(2.0) == Float(0.1, 2.0)
    assert Float(0.1, 1.0, log=True).holding(0.01) == Float(0.01, 1.0, log=True)
    assert Float(0.1, 1.0, log=True).holding(0.0) == Float(0.1, 1.0, log=True)
    assert Choice((1, None)).holding(3) == Choice((1, None, 3))
    assert Choice((1, None)).holding(None) == Choice((1, None))


def test_milestones_have_equal_distances_to_the_end():
    assert milestones(0.5, 2) == (0.5, 0.75)
    assert milestones(0.25, 3) == (0.25, 0.5, 0.75)
    assert milestones(0.625, 3) == (0.625, 0.75, 0.875)
    assert milestones(0.6, 1) == (0.6,)


def test_the_space_as_data_tells_spaces_apart():
    wide = RunConfig().with_overrides({"classifier.distill_weight": 100.0})
    data = as_data(RunConfig())
    assert json.loads(json.dumps(data)) == data
    assert as_data(wide) != data
    assert len({json.dumps(as_data(run_of(method))) for method in METHODS}) == len(METHODS) - 2  # see below
    assert as_data(run_of("refilled")) == as_data(run_of("refilled_minus"))  # which differ in what is not searched
    assert as_data(run_of("kd")) == as_data(run_of("refilled_lkd"))
    entries = {each["name"]: (each["domain"], each["when"]) for each in data}
    assert entries["embedding.max_negatives"] == ([1, 5, 20, None], None)
    assert entries["classifier.distill_weight"] == ({"low": 0.1, "high": 10.0, "log": True}, None)
    assert entries["classifier.schedule.final_fraction"] == (
        {"low": 1e-3, "high": 0.1, "log": True},
        ["classifier.schedule.kind", ["cosine", "one_cycle"]],
    )


def value_at(domain, share):
    """The value so far along a range, on the range's own scale."""
    if domain.log:
        return domain.low * (domain.high / domain.low) ** share
    return domain.low + (domain.high - domain.low) * share


@pytest.mark.parametrize("method", METHODS)
def test_edges_are_the_last_fiftieth_of_every_range_and_nothing_inside(method):
    run = run_of(method)
    domains = {entry.name: entry.domain for entry in space(run) if isinstance(entry.domain, Float)}
    assert {domain.log for domain in domains.values()} == {True, False}
    for name, domain in domains.items():
        for share in (0.0, 0.5 * EDGE, 0.99 * EDGE, 1 - 0.99 * EDGE, 1 - 0.5 * EDGE, 1.0):
            value = value_at(domain, share)
            assert edges({name: value}, run) == [Edge(name, value, domain.low, domain.high)]
        for share in (1.01 * EDGE, 0.2, 0.5, 0.8, 1 - 1.01 * EDGE):
            assert edges({name: value_at(domain, share)}, run) == []
    everything = {name: domain.high for name, domain in domains.items()}
    assert [edge.name for edge in edges(everything, run)] == list(domains)
    assert edges(default_point(run), run) == []  # a search begins inside


def test_edges_by_hand():
    run = run_of("student")

    def at_edge(name, *values):
        return [bool(edges({f"classifier.schedule.{name}": value}, run)) for value in values]

    # a fiftieth of ln(2 / 0.01) is 0.106, a factor of 1.112
    assert at_edge("learning_rate", 0.01, 0.0111, 0.0113, 0.1, 1.79, 1.81, 2.0) == [
        True,
        True,
        *[False] * 3,
        True,
        True,
    ]
    # a fiftieth of 0.8 - 0.25 is 0.011
    assert at_edge("first_milestone", 0.25, 0.2609, 0.2612, 0.7885, 0.7895) == [True, True, False, False, True]
    assert edges({"classifier.schedule.kind": "step", "a setting of another space": 1.0}, run) == []
    wide = run_of("student", **{"classifier.schedule.learning_rate": 5.0})
    assert edges({"classifier.schedule.learning_rate": 1.9}, wide) == []
    (edge,) = edges({"classifier.schedule.learning_rate": 5.0}, wide)
    assert (edge.low, edge.high) == (0.01, 5.0)


OWN_TERM = """
from dataclasses import dataclass
from typing import ClassVar
from refilled.config import Choice, Float, Searched, TermConfig
from refilled.terms import Needs, Term

@dataclass(frozen=True, kw_only=True)
class Settings(TermConfig):
    kind: str = "plain"
    weight: float = 3.0
    strength: float = 0.5

class Mine(Term):
    name: ClassVar[str] = "mine"
    Config: ClassVar[type[Settings]] = Settings
    space: ClassVar[tuple[Searched, ...]] = (
        Searched("kind", Choice(("plain", "strong"))),
        Searched("strength", Float(0.0, 1.0), ("kind", ("strong",))),
    )
    weight_space: ClassVar[Searched] = Searched("weight", Float(1.0, 9.0, log=True))
    needs: ClassVar[Needs] = Needs(student=frozenset({"embedding"}))
"""


def test_a_term_of_the_users_is_searched_like_any_other(tmp_path):
    (tmp_path / "own.py").write_text(OWN_TERM)
    run = complete(with_own_code(RunConfig(method=f"{tmp_path}/own.py:Mine")))
    own = {entry.name: entry for entry in space(run) if entry.name.startswith("terms.")}
    assert list(own) == ["terms.mine.weight", "terms.mine.kind", "terms.mine.strength"]
    assert own["terms.mine.strength"].when == ("terms.mine.kind", ("strong",))
    point = default_point(run)
    assert {name: point[name] for name in own if name in point} == {
        "terms.mine.weight": 3.0,
        "terms.mine.kind": "plain",
    }
    assert run.with_overrides(sample(optuna.trial.FixedTrial(point), run)) == run
    for seed in range(50):
        overrides = sample(RandomTrial(random.Random(seed)), run)
        assert ("terms.mine.strength" in overrides) == (overrides["terms.mine.kind"] == "strong")
        check(run.with_overrides(overrides))


def test_a_weight_that_is_also_that_of_a_whole_stage_is_not_searched():
    """A term has one set of settings: beside cross-entropy its weight would scale stage embedding too."""
    for method, name in (
        ("rkd>cross_entropy+rkd", "terms.rkd.weight"),
        ("comparison>cross_entropy+comparison", "embedding.weight"),
    ):
        assert name not in {entry.name for entry in space(RunConfig(method=method))}
    assert "terms.rkd.weight" in {entry.name for entry in space(RunConfig(method="cross_entropy+rkd"))}
