"""Which losses make up which method.

student         cross-entropy (Eq. 1)
kd              cross-entropy + distillation of the teacher's own classes (Eq. 2)
refilled_emb    comparison matching (Eq. 5), then cross-entropy
refilled_lkd    cross-entropy + local distillation (Eq. 8) from scratch
refilled_minus  comparison matching, then cross-entropy + local distillation (Eq. 5, 8)
refilled        comparison matching, then cross-entropy + adaptively weighted local distillation (Eq. 5, 10)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from refilled.config import (
    METHODS_WITH_EMBEDDING_STAGE,
    METHODS_WITHOUT_TEACHER,
    ClassifierConfig,
    EmbeddingConfig,
    RunConfig,
    ScheduleConfig,
)
from refilled.losses import (
    comparison_matching,
    instance_weights,
    local_distillation,
    teacher_posterior,
    truncated_comparison_matching,
)

StageName = Literal["embedding", "classifier"]


@dataclass(frozen=True)
class Stage:
    """One stage of a run: its name, length and schedule."""

    name: StageName
    num_epochs: int
    schedule: ScheduleConfig


@dataclass(frozen=True)
class TeacherSignal:
    """What the frozen teacher says of a global batch.

    Attributes:
        embedding: [B, D].
        prototypes: [C, D], class means of the student's classes in the teacher's space (Eq. 6).
        logits: from embeddings to the teacher's own class scores, [B, D] -> [B, C'].
    """

    embedding: Tensor
    prototypes: Tensor
    logits: Callable[[Tensor], Tensor]


def stages_of(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of a method, in order. A method without stage `embedding` ignores its epochs."""
    classifier = Stage("classifier", config.epochs[1], config.classifier.schedule)
    if config.method in METHODS_WITH_EMBEDDING_STAGE:
        return Stage("embedding", config.epochs[0], config.embedding.schedule), classifier
    return (classifier,)


def num_epochs_of(config: RunConfig) -> int:
    """Epochs of a whole run."""
    return sum(stage.num_epochs for stage in stages_of(config))


def needs_teacher(config: RunConfig, stage: StageName | None = None) -> bool:
    """Whether a method asks the teacher, in any stage or in the given one."""
    if config.method in METHODS_WITHOUT_TEACHER:
        return False
    return stage != "classifier" or config.method != "refilled_emb"


def embedding_loss(
    config: EmbeddingConfig,
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    labels: Tensor,
    largest_class: int | None = None,
) -> Tensor:
    """Loss of stage `embedding`: weight x student temperature² x comparison matching (Eq. 5).

    The square makes the gradient's size independent of the temperature, as in distillation (Hinton et al., 2015), so
    that temperature, weight and learning rate can be searched apart from each other. The authors' code multiplies by
    1000 at temperature 4 instead, which is a weight of 62.5 here.

    Args:
        config: of the stage.
        student_embedding: [B, Ds].
        teacher_embedding: [B, Dt].
        labels: int64 [B].
        largest_class: images of the batch's largest class, where the caller knows them.
    """
    student_temperature = config.student_temperature or config.temperature
    if config.tuples == "batch_minimum":
        matching = truncated_comparison_matching(
            student_embedding,
            teacher_embedding,
            labels,
            temperature=config.temperature,
            margin=config.margin,
            student_temperature=student_temperature,
        )
    else:
        matching = comparison_matching(
            student_embedding,
            teacher_embedding,
            labels,
            temperature=config.temperature,
            max_negatives=config.max_negatives,
            margin=config.margin,
            student_temperature=student_temperature,
            largest_class=largest_class,
        )
    return config.weight * student_temperature**2 * matching


def classifier_loss(
    config: RunConfig, student_logits: Tensor, labels: Tensor, classes: Tensor, teacher: TeacherSignal | None
) -> Tensor:
    """Loss of stage `classifier`: weight x (cross-entropy + lambda x student temperature² x distillation).

    Args:
        config: of the run.
        student_logits: [B, C].
        labels: int64 [B].
        classes: int64 [|S|], the classes of the global batch.
        teacher: its signal; none where the method has no distillation term.
    """
    stage = config.classifier
    loss = F.cross_entropy(student_logits, labels)
    if teacher is not None:
        student_temperature = stage.student_temperature or stage.temperature
        distillation = _distillation(config, student_logits, classes, teacher, student_temperature)
        loss = loss + stage.distill_weight * student_temperature**2 * distillation
    return stage.weight * loss


def _distillation(
    config: RunConfig, student_logits: Tensor, classes: Tensor, teacher: TeacherSignal, student_temperature: float
) -> Tensor:
    if config.method == "kd":  # Eq. 2: the teacher's own classes are the student's, in the same order
        everything = torch.arange(student_logits.shape[1], device=student_logits.device)
        posterior = torch.softmax(teacher.logits(teacher.embedding) / config.classifier.temperature, dim=1)
        ones = torch.ones_like(posterior[:, 0])
        return local_distillation(student_logits, posterior, everything, ones, temperature=student_temperature)
    stage = config.classifier
    posterior = teacher_posterior(
        teacher.embedding, teacher.prototypes, classes, form=stage.posterior, temperature=stage.temperature
    )
    weights = _weights(stage, config.method, posterior, student_logits, classes, teacher, student_temperature)
    return local_distillation(student_logits, posterior, classes, weights, temperature=student_temperature)


def _weights(
    stage: ClassifierConfig,
    method: str,
    posterior: Tensor,
    student_logits: Tensor,
    classes: Tensor,
    teacher: TeacherSignal,
    student_temperature: float,
) -> Tensor:
    rule = stage.instance_weight if method == "refilled" else "none"  # the adaptive weight is what sets REFILLED apart
    return instance_weights(
        posterior,
        rule=rule,
        student_posterior=(
            torch.softmax(student_logits[:, classes].detach() / student_temperature, dim=1) if rule == "gap" else None
        ),
        teacher_logits=teacher.logits(teacher.embedding) if rule == "own_head" else None,
    )
