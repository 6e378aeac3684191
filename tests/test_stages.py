"""A run's stages: terms with their settings, what is refused, and what a run is completed with."""

from __future__ import annotations

import dataclasses

import pytest

from refilled.config import RunConfig
from refilled.errors import UserError
from refilled.methods import METHODS, TERMS
from refilled.stages import check, complete, needs_teacher, num_epochs_of, stages_of, term_class, term_config

LIVE = {"fitnet", "vid", "at"}


def of(method: str, **changes: object) -> RunConfig:
    return RunConfig(method=method, **changes)  # type: ignore[arg-type]


def test_lengths_and_what_each_stage_trains() -> None:
    embedding, classifier = stages_of(of("refilled", epochs=(3, 4)))
    assert (embedding.num_epochs, embedding.trains, embedding.validates_by) == (3, "embedding", "nearest_mean")
    assert (classifier.num_epochs, classifier.trains, classifier.validates_by) == (4, "all", "head")
    assert num_epochs_of(of("refilled", epochs=(3, 4))) == 7
    assert num_epochs_of(of("student", epochs=(3, 4))) == 4


@pytest.mark.parametrize("method", METHODS)
def test_who_asks_the_teacher_and_for_what(method: str) -> None:
    stages = stages_of(of(method))
    assert needs_teacher(of(method)) is (method != "student")
    asking = {stage.name for stage in stages if stage.needs_teacher}
    if method in ("refilled_emb", "rkd", "aml"):
        assert asking == {"embedding"}
    assert all(stage.is_cacheable is (method not in LIVE) for stage in stages if stage.needs_teacher)


@pytest.mark.parametrize("term", TERMS)
def test_every_term_is_where_the_table_says_and_describes_its_settings(term: str) -> None:
    found = term_class(term, RunConfig())
    assert found.name == term
    settings = dataclasses.fields(found.Config)
    searched = {entry.name for entry in (*found.space, *([found.weight_space] if found.weight_space else []))}
    assert searched <= {field.name for field in settings}
    assert (found.weight_space is None) is (term == "cross_entropy")


def test_settings_come_from_their_place() -> None:
    run = of("aml>cross_entropy+weighted_lkd").with_overrides(
        {"terms.aml.margin": 1.1, "classifier.distill_weight": 3.0, "classifier.instance_weight": "gap"}
    )
    (aml,), (_, lkd) = (stage.terms for stage in stages_of(run))
    assert term_config(aml, run).flat()["margin"] == 1.1
    assert (
        term_config(lkd, run).flat() | {"distill_weight": 3.0, "instance_weight": "gap"} == term_config(lkd, run).flat()
    )


@pytest.mark.parametrize(
    ("method", "overrides", "sentence"),
    [
        ("rkd", {"terms.rkd.wieght": 1.0}, "Unknown setting terms.rkd.wieght; term rkd has angle_ratio, weight."),
        ("rkd", {"terms.rkd.weight": -1.0}, "rkd.weight must be above 0, got -1.0."),
        ("rkd", {"terms.rkd.weight": "much"}, "rkd.weight must be a finite number, above 0, got 'much'."),
        ("aml", {"terms.aml.pairs": "some"}, "aml.pairs must be mean, sum or hardest, got 'some'."),
        ("crd", {"terms.crd.dim": 0}, "crd.dim must be at least 1"),
        ("kd", {"overlap": 0.4}, "overlap must be 1 for method kd, which needs a teacher with the student's classes"),
        ("rkd>rkd", {}, "method must have a term that trains the head, such as cross_entropy, in its last stage"),
        ("cross_entropy>cross_entropy", {}, "must not have cross_entropy in stage embedding, which does not train the"),
    ],
)
def test_what_cannot_run_is_refused_by_name(method: str, overrides: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        check(of(method).with_overrides(overrides))
    assert sentence in str(caught.value)


def test_complete_writes_out_the_settings_of_its_own_terms_alone() -> None:
    run = complete(of("cross_entropy+vid").with_overrides({"terms.rkd.weight": 3.0, "terms.vid.weight": 2.0}))
    assert run.terms.to_dict() == {"vid": {"weight": 2.0, "initial_variance": 5.0}}
    assert complete(run) == run
    assert complete(of("student")).terms.to_dict() == {}
