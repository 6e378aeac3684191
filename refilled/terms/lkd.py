"""Local distillation by class prototypes (Eq. 6-8), and the same with adaptive instance weights (Eq. 9, 10)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from refilled.config import LkdConfig, Searched, WeightedLkdConfig
from refilled.losses import instance_weights, local_distillation, teacher_posterior
from refilled.terms.base import GlobalBatch, Local, Needs, Setting, Term
from refilled.terms.kd import TEMPERATURE, WEIGHT


class Lkd(Term):
    """lambda x student temperature² x KL(posterior by prototypes || student's softmax over the batch's classes)."""

    name: ClassVar[str] = "lkd"
    Config: ClassVar[type[LkdConfig]] = LkdConfig
    place: ClassVar[str] = "classifier"
    space: ClassVar[tuple[Searched, ...]] = (TEMPERATURE,)
    weight_space: ClassVar[Searched] = WEIGHT
    needs: ClassVar[Needs] = Needs(student=frozenset({"logits"}), teacher=frozenset({"embedding", "prototypes"}))

    def __init__(self, config: LkdConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self._teacher = setting.known_teacher

    def rows(self, local: Local) -> dict[str, Tensor]:
        """The student's logits and the teacher's embedding."""
        return {"logits": local.student.logits, "teacher_embedding": local.known_teacher.embedding}

    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        """Eq. 8, or Eq. 10 where images have weights."""
        config, logits = self.config, rows["logits"]
        posterior = teacher_posterior(
            rows["teacher_embedding"],
            self._teacher.prototypes,
            batch.classes,
            form=config.posterior,
            temperature=config.temperature,
        )
        student_temperature = config.student_temperature or config.temperature
        weights = self._weights(posterior, rows, batch, student_temperature)
        distillation = local_distillation(logits, posterior, batch.classes, weights, temperature=student_temperature)
        loss: Tensor = config.distill_weight * student_temperature**2 * distillation
        return loss

    def _weights(
        self, posterior: Tensor, rows: dict[str, Tensor], batch: GlobalBatch, student_temperature: float
    ) -> Tensor:
        """Weights [B] of the images."""
        return instance_weights(posterior, rule="none")


class WeightedLkd(Lkd):
    """Local distillation in which an image counts as much as its teacher is sure (Eq. 9 and variants)."""

    name: ClassVar[str] = "weighted_lkd"
    Config: ClassVar[type[WeightedLkdConfig]] = WeightedLkdConfig
    needs: ClassVar[Needs] = Needs(
        student=frozenset({"logits"}), teacher=frozenset({"embedding", "prototypes", "scores"})
    )

    def _weights(
        self, posterior: Tensor, rows: dict[str, Tensor], batch: GlobalBatch, student_temperature: float
    ) -> Tensor:
        rule = self.config.instance_weight
        of_batch = rows["logits"][:, batch.classes].detach()
        return instance_weights(
            posterior,
            rule=rule,
            student_posterior=torch.softmax(of_batch / student_temperature, dim=1) if rule == "gap" else None,
            teacher_logits=self._teacher.logits(rows["teacher_embedding"]) if rule == "own_head" else None,
        )
