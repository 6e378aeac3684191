"""FitNet's hint: a middle map of the student, through a trained regressor, matches the teacher's (Romero et al., 2015).

In one stage with cross-entropy, as every re-implementation has it; the original trains the student's lower part first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from refilled.config import Float, Searched, TermConfig
from refilled.config.fields import PositiveFloat, PositiveInt
from refilled.errors import UserError
from refilled.losses import hint_loss, match_size, pair_maps
from refilled.terms.base import GlobalBatch, Local, MapTerm, Setting, mean_of_rows


@dataclass(frozen=True, kw_only=True)
class FitnetConfig(TermConfig):
    """weight x mean squared error of one map."""

    weight: PositiveFloat = 100.0
    """Weight of the loss (re-implementations: 100)."""
    map: PositiveInt = 2
    """Which of the pairs of maps, from 1, the first group's first; the deepest maps are a pair."""
    relu: bool = True
    """Whether the regressor ends in a ReLU (re-implementations: yes); it then reaches no negative entry of a map."""


class Fitnet(MapTerm):
    """Regressor: 1x1 conv with bias, batch norm, ReLU; the larger map is average-pooled to the smaller."""

    name: ClassVar[str] = "fitnet"
    Config: ClassVar[type[FitnetConfig]] = FitnetConfig
    weight_space: ClassVar[Searched] = Searched("weight", Float(1.0, 1000.0, log=True))

    def __init__(self, config: FitnetConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        student, teacher = setting.student, setting.known_teacher
        channels = pair_maps(student.feature_channels, teacher.feature_channels)
        if config.map > len(channels):
            raise UserError(f"fitnet.map must be at most {len(channels)} for these networks, got {config.map}.")
        own, wanted = channels[config.map - 1]
        self.convolution = nn.Conv2d(own, wanted, 1)
        self.norm = nn.BatchNorm2d(wanted)

    def rows(self, local: Local) -> dict[str, Tensor]:
        """The squared error of each image, mean over its entries."""
        student, teacher = match_size(*self.pairs(local)[self.config.map - 1])
        regressed = self.norm(self.convolution(student))
        return {"fitnet": hint_loss(F.relu(regressed) if self.config.relu else regressed, teacher)}

    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        """Mean over the global batch."""
        loss: Tensor = self.config.weight * mean_of_rows(rows["fitnet"])
        return loss
