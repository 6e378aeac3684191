"""Optimiser and learning rate of one stage.

The learning rate is a closed form of the position in the stage rather than a stateful scheduler: a resumed run has the
same rate bit for bit without restoring anything, and a schedule fits any number of epochs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from refilled.config import OptimizerConfig, ScheduleConfig

WARM_UP_START = 1 / 25  # of the rate, where one_cycle begins (Smith & Topin 2018; torch's OneCycleLR has the same)


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, undecayed: Iterable[nn.Parameter] = ()
) -> torch.optim.SGD:
    """SGD in torch's fused form; `set_learning_rate` comes before every step.

    Args:
        parameters: What is trained.
        config: Momentum and weight decay.
        undecayed: What is trained too, without weight decay.
    """
    groups: list[dict[str, object]] = [{"params": list(parameters)}]
    spared = list(undecayed)
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    return torch.optim.SGD(
        groups,
        lr=0.0,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use this rate for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def learning_rate(config: ScheduleConfig, position: float) -> float:
    """The rate at a position of the stage, 0 at its first batch, 1 after its last.

    step: the rate times `decay` once for each milestone reached. cosine: from the rate down to `final_fraction` of it.
    one_cycle: from 1/25 of the rate up to it at `peak_at`, then down to `final_fraction` of it, both by cosine.
    """
    if config.kind == "step":
        return config.learning_rate * config.decay ** sum(position >= milestone for milestone in config.milestones)
    if config.kind == "cosine":
        return config.learning_rate * _cosine(1.0, config.final_fraction, position)
    if position < config.peak_at:
        return config.learning_rate * _cosine(WARM_UP_START, 1.0, position / config.peak_at)
    return config.learning_rate * _cosine(
        1.0, config.final_fraction, (position - config.peak_at) / (1 - config.peak_at)
    )


def _cosine(start: float, end: float, position: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * position)) / 2
