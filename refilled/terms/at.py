"""Activation-based attention transfer: where the maps are large (Zagoruyko and Komodakis, ICLR 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from refilled.config import Float, Searched, TermConfig
from refilled.config.fields import PositiveFloat
from refilled.losses import attention_loss
from refilled.terms.base import GlobalBatch, Local, MapTerm, mean_of_rows


@dataclass(frozen=True, kw_only=True)
class AtConfig(TermConfig):
    """weight x sum over pairs of maps of the mean squared difference of attention."""

    weight: PositiveFloat = 1000.0
    """Weight of the loss (the authors' 1000; a mean over positions, so on large maps it counts for less a pixel)."""


class At(MapTerm):
    """All pairs of maps, the deepest with the deepest; no parameters."""

    name: ClassVar[str] = "at"
    Config: ClassVar[type[AtConfig]] = AtConfig
    weight_space: ClassVar[Searched] = Searched("weight", Float(10.0, 10_000.0, log=True))

    def rows(self, local: Local) -> dict[str, Tensor]:
        """The loss of each image, summed over pairs of maps."""
        losses = [attention_loss(student, teacher) for student, teacher in self.pairs(local)]
        return {"at": torch.stack(losses).sum(dim=0)}

    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        """Mean over the global batch."""
        loss: Tensor = self.config.weight * mean_of_rows(rows["at"])
        return loss
