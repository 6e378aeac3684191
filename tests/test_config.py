from __future__ import annotations

import json

import pytest

from refilled.config import ClassifierConfig, EmbeddingConfig, RunConfig, ScheduleConfig, SearchConfig, ViewConfig
from refilled.errors import UserError
from refilled.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_json(name: str) -> None:
    config = preset(name)
    assert SearchConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_preset_names_those_that_exist() -> None:
    with pytest.raises(UserError, match=r"PRESET must be one of smoke, cifar100, paper, released, got 'cifar'\."):
        preset("cifar")


def test_overrides_reach_nested_fields_and_leave_the_rest() -> None:
    run = RunConfig()
    changed = run.with_overrides({"embedding.schedule.kind": "step", "embedding.temperature": 2.0, "seed": 7})
    assert changed.embedding.schedule.kind == "step"
    assert changed.embedding.temperature == 2.0
    assert changed.seed == 7
    same = {"embedding.schedule.kind": "cosine", "embedding.temperature": run.embedding.temperature, "seed": 0}
    assert changed.with_overrides(same) == run


@pytest.mark.parametrize("name", ["embedding.tau", "temperature", "seed.x", "embedding.schedule.rate"])
def test_unknown_override_is_named(name: str) -> None:
    with pytest.raises(UserError, match="Unknown setting"):
        RunConfig().with_overrides({name: 1})


def test_unknown_key_of_a_dict_is_named() -> None:
    with pytest.raises(UserError, match="Unknown setting 'tau'; RunConfig has"):
        RunConfig.from_dict(RunConfig().to_dict() | {"tau": 2.0})


def test_content_hash_sees_every_leaf() -> None:
    run = RunConfig(method="student")
    changes = {
        "data": "cifar100",
        "overlap": 0.5,
        "epochs": (1, 2),
        "precision": "float64",
        "embedding.max_negatives": 5,
        "classifier.posterior": "cosine_share",
        "optimizer.nesterov": False,
        "views.num_views": 8,
        "pretraining.seed": 3,
    }
    hashes = {run.with_overrides({name: value}).content_hash() for name, value in changes.items()}
    assert len(hashes | {run.content_hash()}) == len(changes) + 1


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: RunConfig(overlap=1.5), "overlap must be in"),
        (lambda: RunConfig(method="distil"), "method must be one of student, kd"),
        (lambda: RunConfig(method="comparison>cross_entropy", epochs=(0, 5)), "at least 1 for stage embedding of"),
        (
            lambda: SearchConfig(methods=("kd", "cross_entropy+kd")),
            "methods must be different, but they are",
        ),
        (lambda: SearchConfig(methods=()), "methods must be at least one value"),
        (lambda: RunConfig(epochs=(0, 5)), "at least 1 for stage embedding of refilled"),
        (lambda: RunConfig(precision="float16"), "precision must be float32, float64 or bfloat16"),  # type: ignore[arg-type]
        (
            lambda: EmbeddingConfig(temperature=float("nan")),
            "embedding.temperature must be a finite number, at least 0.003",
        ),
        (lambda: EmbeddingConfig(temperature=0.002), "embedding.temperature must be at least 0.003"),
        (lambda: EmbeddingConfig(max_negatives=0), "embedding.max_negatives must be at least 1 or none"),
        (lambda: EmbeddingConfig(tuples="batch_minimum", max_negatives=5), "must be none where embedding.tuples"),
        (lambda: ClassifierConfig(distill_weight=-1.0), "classifier.distill_weight must be at least 0"),
        (lambda: ScheduleConfig(milestones=(0.7, 0.5)), "schedule.milestones must be rising fractions"),
        (lambda: ViewConfig(padding=1, flip=False, num_views=10), "views.num_views must be at most 9 or none"),
        (lambda: SearchConfig(trials=0), "trials must be at least 1, got 0"),
        (lambda: SearchConfig(overlaps=(0.0, 0.0)), "overlaps must be different values"),
        (lambda: SearchConfig(run=RunConfig(val_fraction=0.0)), "val_fraction must be above 0 in a search"),
    ],
)
def test_refused_value_is_one_sentence_naming_the_field(make: object, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        make()  # type: ignore[operator]
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paper_and_released_presets_hold_the_columns_of_the_comparison() -> None:
    paper, released = preset("paper").run, preset("released").run
    assert (paper.embedding.temperature, paper.embedding.student_temperature) == (2.0, 1.0)  # tau 2, student unsmoothed
    assert (paper.classifier.distill_weight, paper.classifier.posterior) == (2.0, "cosine_share")  # lambda 2, Eq. 7
    assert paper.embedding.tuples == "all"
    assert released.embedding.weight * released.embedding.temperature**2 == 1000  # 1000 x KL at tau 4
    assert (released.embedding.tuples, released.embedding.margin) == ("batch_minimum", 0.2)
    assert (released.classifier.instance_weight, released.classifier.temperature) == ("own_head", 1.0)
    assert (released.pretraining.global_batch_size, released.optimizer.dropout) == (128, 0.3)
    assert released.embedding.schedule.final_fraction * released.embedding.schedule.learning_rate == pytest.approx(0.01)


def test_a_whole_number_in_a_field_of_floats_is_the_float() -> None:
    """25 and 25.0 are one setting, and must be one in every hash."""
    values = RunConfig().to_dict() | {"overlap": 1}
    run = RunConfig.from_dict(json.loads(json.dumps(values))).with_overrides({"classifier.temperature": 2, "seed": 3})
    same = RunConfig(overlap=1.0, seed=3).with_overrides({"classifier.temperature": 2.0})
    assert json.dumps(run.to_dict()) == json.dumps(same.to_dict())
    assert type(run.seed) is int
