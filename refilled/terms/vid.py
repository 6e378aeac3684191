"""Variational information distillation of intermediate maps, VID-I (Ahn et al., CVPR 2019, Eq. 5).

The teacher's map is modelled as Gaussian with a mean regressed from the student's and a variance for each channel. The
variances are trained; the loss may be negative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled.config import Float, Searched, TermConfig
from refilled.config.fields import PositiveFloat, Range
from refilled.losses import match_size, pair_maps, variational_loss
from refilled.terms.base import GlobalBatch, Local, MapTerm, Setting, mean_of_rows

LEAST_VARIANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class VidConfig(TermConfig):
    """weight x sum over pairs of maps of the negative log-likelihood."""

    weight: PositiveFloat = 1.0
    """Weight of the loss (re-implementations: 1)."""
    initial_variance: Annotated[float, Range(LEAST_VARIANCE, ends="()")] = 5.0
    """Variance of every channel at the start."""


class Vid(MapTerm):
    """Regressor of every pair of maps: three convolutions 1x1 without bias, ReLU between; pooling comes first.

    Variances have no weight decay, which would pull them to softplus(0) = 0.69.
    """

    name: ClassVar[str] = "vid"
    Config: ClassVar[type[VidConfig]] = VidConfig
    space: ClassVar[tuple[Searched, ...]] = (Searched("initial_variance", Float(1.0, 10.0, log=True)),)
    weight_space: ClassVar[Searched] = Searched("weight", Float(0.1, 10.0, log=True))

    def __init__(self, config: VidConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        student, teacher = setting.student, setting.known_teacher
        channels = pair_maps(student.feature_channels, teacher.feature_channels)
        self.means = nn.ModuleList(_regressor(own, wanted) for own, wanted in channels)
        above = config.initial_variance - LEAST_VARIANCE
        start = above + math.log(-math.expm1(-above))  # whose softplus is `above`, however large that is
        self.scales = nn.ParameterList(torch.full((wanted,), start) for _, wanted in channels)

    def rows(self, local: Local) -> dict[str, Tensor]:
        """The negative log-likelihood of each image, mean over the entries of a map, summed over pairs of maps."""
        losses = []
        for (student, teacher), mean, scale in zip(self.pairs(local), self.means, self.scales, strict=True):
            student, teacher = match_size(student, teacher)
            losses.append(variational_loss(mean(student), teacher, F.softplus(scale) + LEAST_VARIANCE))
        return {"vid": torch.stack(losses).sum(dim=0)}

    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        """Mean over the global batch."""
        loss: Tensor = self.config.weight * mean_of_rows(rows["vid"])
        return loss

    def undecayed(self) -> tuple[nn.Parameter, ...]:
        """The variances."""
        return tuple(cast(nn.Parameter, scale) for scale in self.scales)


def _regressor(own: int, wanted: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (own, wanted, wanted):
        layers += [nn.Conv2d(channels, wanted, 1, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
