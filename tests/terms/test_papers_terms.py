"""The terms of the paper's own methods, against their equations written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from term_bench import CLASSES, LABELS, Bench

from refilled.losses import comparison_matching, instance_weights, local_distillation, teacher_posterior


@pytest.mark.parametrize(("temperature", "student_temperature", "scale"), [(4.0, None, 16.0), (2.0, 1.0, 1.0)])
def test_comparison_is_matching_by_weight_and_student_temperature_squared(
    bench: Bench, temperature: float, student_temperature: float | None, scale: float
) -> None:
    settings = {
        "embedding.temperature": temperature,
        "embedding.student_temperature": student_temperature,
        "embedding.weight": 3.0,
    }
    term = bench.term("refilled", "comparison", **settings)
    matching = comparison_matching(
        bench.local.student.embedding,
        bench.local.known_teacher.embedding,
        LABELS,
        temperature=temperature,
        student_temperature=student_temperature,
    )
    assert matching > 0
    assert bench.value(term) == pytest.approx(3.0 * scale * float(matching), rel=1e-12)


def test_released_tuples_are_another_loss(bench: Bench) -> None:
    every = bench.loss(bench.term("refilled", "comparison"))
    cut = bench.loss(bench.term("refilled", "comparison", **{"embedding.tuples": "batch_minimum"}))
    assert abs(float(every - cut)) > 1e-6


def test_cross_entropy_is_eq_1(bench: Bench) -> None:
    expected = F.cross_entropy(bench.local.student.logits, LABELS)
    assert bench.value(bench.term("student", "cross_entropy")) == pytest.approx(float(expected), rel=1e-12)


def test_kd_is_eq_2_over_all_classes(bench: Bench) -> None:
    term = bench.term("kd", "kd", **{"classifier.distill_weight": 0.7, "classifier.temperature": 4.0})
    logits, teacher = bench.local.student.logits, bench.setting.known_teacher
    soft_teacher = torch.softmax(teacher.logits(bench.local.known_teacher.embedding) / 4, dim=1)
    divergence = (soft_teacher * (soft_teacher.log() - torch.log_softmax(logits / 4, dim=1))).sum(dim=1).mean()
    assert bench.value(term) == pytest.approx(0.7 * 16 * float(divergence), rel=1e-12)


@pytest.mark.parametrize("rule", ["confidence", "gap", "own_head", "none"])
def test_weighted_lkd_is_eq_10_with_its_rule(bench: Bench, rule: str) -> None:
    settings = {
        "classifier.distill_weight": 2.0,
        "classifier.temperature": 2.0,
        "classifier.student_temperature": 1.0,
        "classifier.instance_weight": rule,
    }
    term = bench.term("refilled", "weighted_lkd", **settings)
    teacher, embedding = bench.setting.known_teacher, bench.local.known_teacher.embedding
    logits = bench.local.student.logits
    posterior = teacher_posterior(embedding, teacher.prototypes, CLASSES, form="prototype", temperature=2.0)
    weights = instance_weights(
        posterior,
        rule=rule,  # type: ignore[arg-type]
        student_posterior=torch.softmax(logits[:, CLASSES], dim=1),
        teacher_logits=teacher.logits(embedding),
    )
    expected = 2.0 * local_distillation(logits, posterior, CLASSES, weights, temperature=1.0)
    assert bench.value(term) == pytest.approx(float(expected), rel=1e-12)


def test_lkd_has_no_weights_whatever_the_rule(bench: Bench) -> None:
    plain = bench.term("refilled", "weighted_lkd", **{"classifier.instance_weight": "none"})
    local = bench.term("refilled_minus", "lkd", **{"classifier.instance_weight": "confidence"})
    adaptive = bench.term("refilled", "weighted_lkd", **{"classifier.instance_weight": "confidence"})
    assert bench.value(local) == bench.value(plain) != bench.value(adaptive)
