import json
import random

import optuna
import pytest

from refilled.config import METHODS, RunConfig, ScheduleConfig
from tune.studies.space import SPACES, Choice, Float, as_data, default_point, describe, milestones, sample, space

STEP = ScheduleConfig(kind="step", learning_rate=0.1, decay=0.2, milestones=(0.25, 0.5, 0.75))


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


def starting_points():
    for method in METHODS:
        yield RunConfig(method=method)
    released = {
        "embedding.tuples": "batch_minimum",
        "embedding.margin": 0.2,
        "embedding.weight": 1000.0,
        "embedding.temperature": 7.0,
        "classifier.distill_weight": 100.0,
        "embedding.schedule": STEP,
        "classifier.schedule": STEP,
    }
    yield RunConfig().with_overrides(released)
    yield RunConfig().with_overrides({"classifier.distill_weight": 0.0, "classifier.schedule.milestones": ()})


@pytest.mark.parametrize("run", list(starting_points()), ids=lambda run: f"{run.method}-{run.embedding.tuples}")
def test_every_sample_is_a_valid_run(run):
    generator = random.Random(0)
    kinds = set()
    for _ in range(300):
        overrides = sample(RandomTrial(generator), run)
        assert set(overrides) <= set(run.flat())
        varied = run.with_overrides(overrides)
        assert {name: varied.flat()[name] for name in overrides} == overrides
        assert RunConfig.from_dict(json.loads(json.dumps(varied.to_dict()))) == varied
        kinds.add(varied.classifier.schedule.kind)
    assert kinds == {"step", "cosine", "one_cycle"}


@pytest.mark.parametrize("method", METHODS)
def test_only_what_the_method_reads_is_searched(method):
    names = {entry.name for entry in SPACES[method]}
    has_embedding = method in ("refilled_emb", "refilled_minus", "refilled")
    assert ("embedding.temperature" in names) == ("embedding.max_negatives" in names) == has_embedding
    assert ("embedding.weight" in names) == ("embedding.schedule.kind" in names) == has_embedding
    distils = method not in ("student", "refilled_emb")
    assert ("classifier.distill_weight" in names) == ("classifier.temperature" in names) == distils
    assert {"classifier.schedule.learning_rate", "optimizer.weight_decay"} <= names
    if method == "student":
        assert not any(name.endswith("weight") for name in names)


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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "schedule", [STEP, ScheduleConfig(kind="one_cycle", peak_at=0.7), ScheduleConfig(learning_rate=2.0)]
)
def test_the_default_point_is_the_run_itself(method, schedule):
    run = RunConfig(method=method).with_overrides(
        {
            "embedding.schedule": schedule,
            "classifier.schedule": schedule,
            "embedding.max_negatives": 3,
            "embedding.temperature": 9.0,
            "classifier.distill_weight": 100.0,
            "optimizer.weight_decay": 1e-6,
        }
    )
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


def test_the_space_as_data_tells_spaces_apart_and_reads_well():
    wide = RunConfig().with_overrides({"classifier.distill_weight": 100.0})
    data = as_data(RunConfig())
    assert json.loads(json.dumps(data)) == data
    assert as_data(wide) != data
    assert as_data(RunConfig(method="kd")) != data
    rows = dict(describe(RunConfig()))
    assert rows["embedding.max_negatives"] == "1, 5, 20, none"
    assert rows["classifier.distill_weight"] == "0.1 .. 10 (log)"
    assert rows["classifier.schedule.final_fraction"] == "0.001 .. 0.1 (log), for cosine and one_cycle"
