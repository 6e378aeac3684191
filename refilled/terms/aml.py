"""Asymmetric metric learning: anchors embedded by the student, their partners by the teacher (Budnik, Avrithis 2020).

The paper names neither the variant nor the margin it ran: `contr_plus` is the authors' best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from refilled.config import Float, Searched, TermConfig
from refilled.config.fields import PositiveFloat
from refilled.losses import asymmetric_matching
from refilled.terms.base import GlobalBatch, Local, Needs, Setting, Term


@dataclass(frozen=True, kw_only=True)
class AmlConfig(TermConfig):
    """weight x asymmetric contrastive loss."""

    weight: PositiveFloat = 1.0
    """Weight of the loss."""
    margin: PositiveFloat = 0.7
    """Distance from which on a negative costs nothing (the authors' 0.7); distances of unit vectors reach 2."""
    variant: Literal["contr", "contr_plus", "regression"] = "contr_plus"
    """contr: pairs of different images; contr_plus: also the anchor with itself; regression: that alone."""
    pairs: Literal["mean", "sum", "hardest"] = "mean"
    """mean: over an anchor's positives and over its negatives; sum: of them; hardest: the 5 nearest negatives."""


class Aml(Term):
    """A linear map takes the student's embedding to the teacher's width; it is trained with the stage and then dropped.

    Uses the student's labels alone, so any label spaces.
    """

    name: ClassVar[str] = "aml"
    Config: ClassVar[type[AmlConfig]] = AmlConfig
    space: ClassVar[tuple[Searched, ...]] = (Searched("margin", Float(0.2, 1.4)),)
    weight_space: ClassVar[Searched] = Searched("weight", Float(0.1, 100.0, log=True))
    needs: ClassVar[Needs] = Needs(student=frozenset({"embedding"}), teacher=frozenset({"embedding"}))

    def __init__(self, config: AmlConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.projection = nn.Linear(setting.student.embedding_dim, setting.known_teacher.embedding_dim)

    def rows(self, local: Local) -> dict[str, Tensor]:
        """The projected embedding and the teacher's."""
        projected = self.projection(local.student.embedding.to(self.projection.weight.dtype))
        return {"aml": projected, "teacher_embedding": local.known_teacher.embedding}

    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        """All pairs of the global batch."""
        config = self.config
        loss: Tensor = config.weight * asymmetric_matching(
            rows["aml"],
            rows["teacher_embedding"],
            batch.labels,
            margin=config.margin,
            variant=config.variant,
            pairs=config.pairs,
        )
        return loss
