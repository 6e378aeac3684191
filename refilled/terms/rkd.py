"""Relational knowledge distillation: distances and angles inside the batch (Park et al., CVPR 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from refilled.config import Float, Searched, TermConfig
from refilled.config.fields import NonNegativeFloat, PositiveFloat
from refilled.losses import relational_distillation
from refilled.terms.base import GlobalBatch, Local, Needs, Term


@dataclass(frozen=True, kw_only=True)
class RkdConfig(TermConfig):
    """weight x (distance loss + angle_ratio x angle loss)."""

    weight: PositiveFloat = 25.0
    """Weight of the distance loss (re-implementations in classification: 25; the authors, in retrieval: 1)."""
    angle_ratio: NonNegativeFloat = 2.0
    """Weight of the angle loss over that of the distance loss; 0: distances alone."""


class Rkd(Term):
    """Needs embeddings alone: any label spaces, any widths. The value depends on the batch size."""

    name: ClassVar[str] = "rkd"
    Config: ClassVar[type[RkdConfig]] = RkdConfig
    space: ClassVar[tuple[Searched, ...]] = (Searched("angle_ratio", Float(0.5, 4.0, log=True)),)
    weight_space: ClassVar[Searched] = Searched("weight", Float(0.1, 100.0, log=True))
    needs: ClassVar[Needs] = Needs(student=frozenset({"embedding"}), teacher=frozenset({"embedding"}))

    def rows(self, local: Local) -> dict[str, Tensor]:
        """Both embeddings."""
        return {"embedding": local.student.embedding, "teacher_embedding": local.known_teacher.embedding}

    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        """All pairs and triplets of the global batch."""
        return relational_distillation(
            rows["embedding"],
            rows["teacher_embedding"],
            distance_weight=self.config.weight,
            angle_weight=self.config.weight * self.config.angle_ratio,
        )
