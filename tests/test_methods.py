from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from refilled.config import ClassifierConfig, EmbeddingConfig, RunConfig
from refilled.losses import comparison_matching, instance_weights, local_distillation, teacher_posterior
from refilled.methods import (
    TeacherSignal,
    classifier_loss,
    embedding_loss,
    needs_teacher,
    num_epochs_of,
    stages_of,
)

LABELS = torch.tensor([0, 1, 3, 0, 1, 3, 3, 0])
CLASSES = torch.tensor([0, 1, 3])


@pytest.fixture
def signal() -> TeacherSignal:
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(5, 4, dtype=torch.float64, generator=generator)
    return TeacherSignal(
        embedding=torch.randn(8, 4, dtype=torch.float64, generator=generator),
        prototypes=torch.randn(5, 4, dtype=torch.float64, generator=generator),
        logits=lambda embedding: embedding @ head.T,
    )


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_stages_of_each_method() -> None:
    names = {
        method: [stage.name for stage in stages_of(RunConfig(method=method))]  # type: ignore[arg-type]
        for method in ("student", "kd", "refilled_emb", "refilled_lkd", "refilled_minus", "refilled")
    }
    one, two = ["classifier"], ["embedding", "classifier"]
    assert list(names.values()) == [one, one, two, one, two, two]
    assert num_epochs_of(RunConfig(method="refilled", epochs=(3, 4))) == 7
    assert num_epochs_of(RunConfig(method="student", epochs=(3, 4))) == 4


def test_who_asks_the_teacher_when() -> None:
    assert not needs_teacher(RunConfig(method="student"))
    emb = RunConfig(method="refilled_emb")
    assert (needs_teacher(emb, "embedding"), needs_teacher(emb, "classifier")) == (True, False)
    assert needs_teacher(RunConfig(method="refilled"), "classifier")


@pytest.mark.parametrize(("temperature", "student_temperature", "scale"), [(4.0, None, 16.0), (2.0, 1.0, 1.0)])
def test_embedding_loss_scales_matching_by_weight_and_student_temperature_squared(
    temperature: float, student_temperature: float | None, scale: float
) -> None:
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(8, 3, dtype=torch.float64, generator=generator)
    teacher = torch.randn(8, 6, dtype=torch.float64, generator=generator)
    config = EmbeddingConfig(temperature=temperature, student_temperature=student_temperature, weight=3.0)
    matching = comparison_matching(
        student, teacher, LABELS, temperature=temperature, student_temperature=student_temperature
    )
    assert matching > 0
    expected = 3.0 * scale * float(matching)
    assert float(embedding_loss(config, student, teacher, LABELS)) == pytest.approx(expected, rel=1e-12)


def test_released_tuples_are_another_loss() -> None:
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(8, 3, dtype=torch.float64, generator=generator)
    teacher = torch.randn(8, 6, dtype=torch.float64, generator=generator)
    every = embedding_loss(EmbeddingConfig(), student, teacher, LABELS)
    cut = embedding_loss(EmbeddingConfig(tuples="batch_minimum"), student, teacher, LABELS)
    assert abs(float(every - cut)) > 1e-6


def test_student_is_cross_entropy(logits: torch.Tensor) -> None:
    run = RunConfig(method="student", classifier=ClassifierConfig(weight=2.0))
    loss = classifier_loss(run, logits, LABELS, CLASSES, None)
    assert float(loss) == pytest.approx(2 * float(F.cross_entropy(logits, LABELS)), rel=1e-12)


def test_kd_is_eq_2_over_all_classes(logits: torch.Tensor, signal: TeacherSignal) -> None:
    run = RunConfig(method="kd", overlap=1.0, classifier=ClassifierConfig(distill_weight=0.7, temperature=4.0))
    soft_teacher = torch.softmax(signal.logits(signal.embedding) / 4, dim=1)
    divergence = (soft_teacher * (soft_teacher.log() - torch.log_softmax(logits / 4, dim=1))).sum(dim=1).mean()
    expected = F.cross_entropy(logits, LABELS) + 0.7 * 16 * divergence
    assert float(classifier_loss(run, logits, LABELS, CLASSES, signal)) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("rule", ["confidence", "gap", "own_head", "none"])
def test_refilled_is_eq_10_with_its_rule(logits: torch.Tensor, signal: TeacherSignal, rule: str) -> None:
    stage = ClassifierConfig(distill_weight=2.0, temperature=2.0, student_temperature=1.0, instance_weight=rule)  # type: ignore[arg-type]
    run = RunConfig(method="refilled", classifier=stage)
    posterior = teacher_posterior(signal.embedding, signal.prototypes, CLASSES, form="prototype", temperature=2.0)
    weights = instance_weights(
        posterior,
        rule=rule,  # type: ignore[arg-type]
        student_posterior=torch.softmax(logits[:, CLASSES], dim=1),
        teacher_logits=signal.logits(signal.embedding),
    )
    distilled = local_distillation(logits, posterior, CLASSES, weights, temperature=1.0)
    expected = F.cross_entropy(logits, LABELS) + 2.0 * distilled
    assert float(classifier_loss(run, logits, LABELS, CLASSES, signal)) == pytest.approx(float(expected), rel=1e-12)


def test_minus_and_lkd_ignore_the_weight_rule(logits: torch.Tensor, signal: TeacherSignal) -> None:
    adaptive = RunConfig(method="refilled", classifier=ClassifierConfig(instance_weight="confidence"))
    plain = RunConfig(method="refilled", classifier=ClassifierConfig(instance_weight="none"))
    losses = {
        name: float(classifier_loss(run, logits, LABELS, CLASSES, signal))
        for name, run in {
            "adaptive": adaptive,
            "plain": plain,
            "minus": dataclasses.replace(adaptive, method="refilled_minus"),
            "lkd": dataclasses.replace(adaptive, method="refilled_lkd"),
        }.items()
    }
    assert losses["minus"] == losses["lkd"] == losses["plain"]
    assert losses["adaptive"] != losses["plain"]
