"""Distillation of the teacher's own class scores (Eq. 2; Hinton, Vinyals and Dean, 2015)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from refilled.config import Float, KdConfig, RunConfig, Searched
from refilled.errors import UserError
from refilled.losses import local_distillation
from refilled.terms.base import GlobalBatch, Local, Needs, Setting, Term

TEMPERATURE = Searched("temperature", Float(0.5, 8.0, log=True))
WEIGHT = Searched("distill_weight", Float(0.1, 10.0, log=True))


class Kd(Term):
    """lambda x student temperature² x KL(teacher's softmax || student's softmax), mean over the batch."""

    name: ClassVar[str] = "kd"
    Config: ClassVar[type[KdConfig]] = KdConfig
    place: ClassVar[str] = "classifier"
    space: ClassVar[tuple[Searched, ...]] = (TEMPERATURE,)
    weight_space: ClassVar[Searched] = WEIGHT
    needs: ClassVar[Needs] = Needs(
        student=frozenset({"logits"}), teacher=frozenset({"embedding", "scores"}), same_classes=True
    )

    def __init__(self, config: KdConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self._logits = setting.known_teacher.logits

    @classmethod
    def check(cls, run: RunConfig) -> None:
        """Refuse a teacher that scores other classes."""
        if run.overlap != 1:
            raise UserError(
                f"overlap must be 1 for method {run.method}, which needs a teacher with the student's classes (Eq. 2), "
                f"got {run.overlap}."
            )

    def rows(self, local: Local) -> dict[str, Tensor]:
        """The student's logits and the teacher's embedding, from which the frozen head makes scores."""
        return {"logits": local.student.logits, "teacher_embedding": local.known_teacher.embedding}

    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        """Eq. 2; the teacher's own classes are the student's, in the same order."""
        config, logits = self.config, rows["logits"]
        everything = torch.arange(logits.shape[1], device=logits.device)
        posterior = torch.softmax(self._logits(rows["teacher_embedding"]) / config.temperature, dim=1)
        student_temperature = config.student_temperature or config.temperature
        ones = torch.ones_like(posterior[:, 0])
        distillation = local_distillation(logits, posterior, everything, ones, temperature=student_temperature)
        loss: Tensor = config.distill_weight * student_temperature**2 * distillation
        return loss
