"""Instance weights of the local distillation: how much an image's teacher posterior is trusted (Eq. 9 and variants)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from refilled.losses.distances import result_dtype

WeightRule = Literal["confidence", "gap", "own_head", "none"]

ROUNDING = 1e-12
"""A span of cross-entropies this small is rounding, which min-max scaling would blow up to [0, 1]."""


def instance_weights(
    posterior: Tensor,
    *,
    rule: WeightRule,
    student_posterior: Tensor | None = None,
    teacher_logits: Tensor | None = None,
) -> Tensor:
    """Weights without the factor λ, always detached.

    `confidence`: 2σ(log max_s p_s) (Eq. 9), which is 2m / (1 + m) for m = max_s p_s: from 2 / (1 + |S|) to 1.
    `gap`: 2σ(-KL(posterior || student_posterior)), in [0, 1]; 0 where the student gives a class no probability at all
    that the teacher gives some.
    `own_head`: the released rule. The cross-entropy of the teacher's own softmax against its own argmax, scaled over
    the batch to [0, 1] by minimum and maximum, and 2σ(-.) of that: in [0.538, 1]; a batch of equal values gets 1. It
    looks at the whole batch, so it must be given the global one.
    `none`: ones.

    Args:
        posterior: [B, |S|], the teacher's, rows sum to 1.
        rule: One of the four above.
        student_posterior: [B, |S|], rows sum to 1; needed by `gap`.
        teacher_logits: [B, C'] of the teacher's own head; needed by `own_head`.

    Returns:
        [B]; float64 for a float64 posterior, else float32.

    Raises:
        ValueError: The rule is unknown or lacks its argument.
    """
    dtype = result_dtype(posterior)
    if rule == "none":
        return torch.ones(len(posterior), dtype=dtype, device=posterior.device)
    if rule == "confidence":
        largest = posterior.detach().double().amax(1)
        return (2.0 * largest / (1.0 + largest)).to(dtype)
    if rule == "gap":
        if student_posterior is None:
            raise ValueError("The rule gap needs student_posterior.")
        teacher, student = posterior.detach().double(), student_posterior.detach().double()
        divergence = (torch.xlogy(teacher, teacher) - torch.xlogy(teacher, student)).sum(1)
        return (2.0 * torch.sigmoid(-divergence)).to(dtype)
    if rule == "own_head":
        if teacher_logits is None:
            raise ValueError("The rule own_head needs teacher_logits.")
        return (2.0 * torch.sigmoid(-_min_max(_self_cross_entropy(teacher_logits)))).to(dtype)
    raise ValueError(f"rule must be confidence, gap, own_head or none, got {rule!r}.")


def _self_cross_entropy(logits: Tensor) -> Tensor:
    """Cross-entropy [B] of softmax(logits) against its own argmax."""
    return -logits.detach().double().log_softmax(1).amax(1)


def _min_max(values: Tensor) -> Tensor:
    if not len(values):
        return values
    low, high = values.aminmax()
    span = high - low
    return torch.where(span > ROUNDING, (values - low) / span.clamp(min=ROUNDING), 0.0)
