"""Activation-based attention transfer: where the maps are large (Zagoruyko and Komodakis, ICLR 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from refilled.config import Float, Searched, TermConfig
from refilled.config.base import is_positive, require
from refilled.losses import attention_loss, pair_maps
from refilled.terms.base import GlobalBatch, Local, Needs, Setting, Term, mean_of_rows, raw_maps


@dataclass(frozen=True, kw_only=True)
class AtConfig(TermConfig):
    """weight x sum over pairs of maps of the mean squared difference of attention."""

    weight: float = 1000.0
    """Weight of the loss (the authors' 1000; a mean over positions, so on large maps it counts for less a pixel)."""

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        require(is_positive(self.weight), "at.weight", "above 0", self.weight)


class At(Term):
    """All pairs of maps, the deepest with the deepest; no parameters. Label-free; the teacher runs in every step."""

    name: ClassVar[str] = "at"
    Config: ClassVar[type[AtConfig]] = AtConfig
    weight_space: ClassVar[Searched] = Searched("weight", Float(10.0, 10_000.0, log=True))
    needs: ClassVar[Needs] = Needs(student=frozenset({"features"}), teacher=frozenset({"features"}))

    def __init__(self, config: AtConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self._ends_in_relu = setting.student.borders_end_in_relu, setting.known_teacher.borders_end_in_relu

    def rows(self, local: Local) -> dict[str, Tensor]:
        """The loss of each image, summed over pairs of maps."""
        own = raw_maps(local.student.features, self._ends_in_relu[0])
        wanted = raw_maps(local.known_teacher.features, self._ends_in_relu[1])
        losses = [attention_loss(student, teacher) for student, teacher in pair_maps(own, wanted)]
        return {"at": torch.stack(losses).sum(dim=0)}

    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        """Mean over the global batch."""
        loss: Tensor = self.config.weight * mean_of_rows(rows["at"])
        return loss
