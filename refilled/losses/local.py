"""Local knowledge distillation: the distillation term of Eq. 8 and Eq. 10."""

from __future__ import annotations

import torch
from torch import Tensor

from refilled.losses.distances import result_dtype


def local_distillation(
    student_logits: Tensor, posterior: Tensor, classes: Tensor, weights: Tensor, *, temperature: float
) -> Tensor:
    """Mean over the batch of weight x KL(teacher's posterior || student's softmax over the classes present).

    Args:
        student_logits: [B, C], any float dtype, over all classes.
        posterior: [B, |S|], the teacher's, treated as constant; zeros are fine.
        classes: [|S|] int64, the classes S present in the global batch, in the posterior's order.
        weights: [B], treated as constant; λ is the caller's.
        temperature: τ of the student's softmax, above 0.

    Returns:
        Scalar, float64 for float64 logits, else float32; without the factor τ².

    Raises:
        ValueError: Shapes disagree or the temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature!r}.")
    num_images = len(student_logits)
    if posterior.shape != (num_images, len(classes)) or weights.shape != (num_images,):
        raise ValueError(
            f"posterior must be [{num_images}, {len(classes)}] and weights [{num_images}], got "
            f"{list(posterior.shape)} and {list(weights.shape)}."
        )
    dtype = result_dtype(student_logits)
    student_log = (student_logits[:, classes].to(dtype) / temperature).log_softmax(1)
    teacher = posterior.detach().to(dtype)
    cross_entropy = -torch.where(teacher > 0, teacher * student_log, 0.0).sum(1)
    divergence = torch.xlogy(teacher, teacher).sum(1) + cross_entropy
    return (weights.detach().to(dtype) * divergence).sum() / max(num_images, 1)
