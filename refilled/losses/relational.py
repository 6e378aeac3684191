"""Relational knowledge distillation, RKD: distances and angles between the images of a batch (Park et al. 2019).

With D_ij = |e_i - e_j| of embeddings e, r_ij = 1 / D_ij (0 where D_ij = 0) and Huber's h(x) = x²/2 for |x| < 1, else
|x| - 1/2,

    L_D = 1/B² Σ_ij h(D_ij^S / μ^S - D_ij^T / μ^T),           μ = mean of the D_ij above 0,
    L_A = 1/B³ Σ_ijk h(A_ijk^S - A_ijk^T),                    A_ijk = cosine of the angle between j and k, seen from i.

By the law of cosines A_ijk = (D_ij² + D_ik² - D_jk²) r_ij r_ik / 2: both terms need the distances only, and a triplet
costs the same whatever the width of an embedding. With G_ijk = dL_A/dA_ijk, which is symmetric in j and k,

    dL_A/dD_ij = 2 Σ_k G_ijk (r_ik - A_ijk r_ij) - D_ij Σ_a G_aij r_ai r_aj,

the first sum with i as the anchor, the second with every a as the anchor of i and j.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from refilled.losses.distances import check_finite, result_dtype

CPU_CHUNK = 2**17
CUDA_CHUNK = 2**24
"""Triplets held at once: what fits a CPU's cache, and what fills a GPU (about 0.5 GB in all)."""


def relational_distillation(student: Tensor, teacher: Tensor, *, distance_weight: float, angle_weight: float) -> Tensor:
    """`distance_weight` L_D + `angle_weight` L_A (Park et al. 2019, equations above).

    The means are over all B² and B³ entries, those of an image with itself included, so the value depends on B. The
    gradient flows through the student's mean distance μ; the teacher is a constant. Neither term changes when either
    embedding is rotated, shifted or scaled. Student = teacher gives 0 exactly.

    Identical images are at distance 0 exactly: they do not count in μ, the angle A_ijk is 0 where i is a copy of j or
    k, and the derivative is 0. Where a model has no positive distance at all its D / μ are 0. If that holds for both
    models the loss is 0; if for the student only, the loss is not, but its gradient is.

    Float64 inside. The triplets are worked through in chunks, with the gradient beside the value; a term of weight 0 is
    left out. At D = 64 value and gradient take 0.1 s of one CPU core and 16 MB at B = 256, 6 s and 130 MB at B = 1024
    (measured; B³ float64 numbers are 134 MB and 8.6 GB).

    Args:
        student: [B, Ds], any float dtype, not normalised.
        teacher: [B, Dt], treated as constant; Dt may differ from Ds.
        distance_weight: W_D, at least 0.
        angle_weight: W_A, at least 0.

    Returns:
        Scalar, float64 for a float64 student, else float32. NaN on CUDA where an embedding is not finite.

    Raises:
        NonFiniteEmbeddingError: On the CPU, where an embedding is not finite.
        ValueError: A shape or a weight is wrong.
    """
    _check(student, teacher)
    for name, weight in (("distance_weight", distance_weight), ("angle_weight", angle_weight)):
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{name} must be finite and at least 0, got {weight!r}.")
    student_distance: Tensor = _Distances.apply(student.double())
    teacher_distance: Tensor = _Distances.apply(teacher.detach().double())
    # The zero keeps a loss without terms in the graph.
    loss = 0.0 * (student_distance.sum() + teacher_distance.sum())
    if distance_weight > 0:
        loss = loss + distance_weight * _distance_term(student_distance, teacher_distance)
    if angle_weight > 0:
        differentiate = torch.is_grad_enabled() and student_distance.requires_grad
        loss = loss + angle_weight * _AngleTerm.apply(student_distance, teacher_distance, differentiate)
    return loss.to(result_dtype(student))


def _check(student: Tensor, teacher: Tensor) -> None:
    if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher):
        raise ValueError(
            f"student and teacher must be [B, D] of one B, got {list(student.shape)} and {list(teacher.shape)}."
        )
    if student.device.type == "cpu":
        check_finite(student, teacher)


class _Distances(torch.autograd.Function):
    """Distances [B, B] of float64 rows [B, D], from differences: exactly 0 for identical rows, derivative 0 there.

    torch's own gradient of `cdist` holds B² D numbers on CUDA; this one is a matrix product.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        ctx.save_for_backward(rows, distance)
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        rows, distance = ctx.saved_tensors
        pull = (grad_output + grad_output.T) * _inverse(distance)
        gradient: Tensor = pull.sum(1)[:, None] * rows - pull @ rows
        return gradient


def _inverse(distance: Tensor) -> Tensor:
    """1 / distance, 0 where it is 0."""
    return distance.reciprocal().masked_fill(distance == 0, 0.0)


def _distance_term(student: Tensor, teacher: Tensor) -> Tensor:
    """L_D of distances [B, B]."""
    total = F.smooth_l1_loss(_by_mean(student), _by_mean(teacher), reduction="sum")
    return total / max(student.numel(), 1)


def _by_mean(distance: Tensor) -> Tensor:
    """Distances divided by the mean of those above 0."""
    mean = distance.sum() / (distance > 0).sum().clamp(min=1)
    return distance / mean.masked_fill(mean == 0, 1.0)


class _AngleTerm(torch.autograd.Function):
    """L_A of distances [B, B]; its gradient is computed beside its value, chunk by chunk of triplets.

    The gradient is as written above at distance 0 too, where `_Distances` drops it.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, differentiate: bool) -> Tensor:
        num_images = len(student)
        chunk_entries = CPU_CHUNK if student.device.type == "cpu" else CUDA_CHUNK
        student_parts, teacher_parts = ((side.square(), _inverse(side)) for side in (student, teacher))
        inverse = student_parts[1]
        total = student.new_zeros(())
        by_anchor, by_pair = torch.zeros_like(student), torch.zeros_like(student)
        for anchors, rows in _chunks(num_images, chunk_entries):
            cosine = _cosines(*student_parts, anchors, rows)
            gap = _cosines(*teacher_parts, anchors, rows).neg_().add_(cosine)
            slope = gap.clamp(-1.0, 1.0)  # h'(gap), and h = slope gap - slope² / 2
            total += torch.dot(slope.flatten(), gap.add_(slope, alpha=-0.5).flatten())
            if differentiate:
                near = inverse[anchors, rows]
                through_sides = (slope @ inverse[anchors, :, None]).squeeze(2)
                by_anchor[anchors, rows] += through_sides - near * cosine.mul_(slope).sum(2)
                by_pair[rows] += slope.mul_(near[:, :, None]).mul_(inverse[anchors, None, :]).sum(0)
        num_triplets = max(num_images, 1) ** 3
        if differentiate:
            ctx.save_for_backward((2.0 * by_anchor - student * by_pair) / num_triplets)
        return total / num_triplets

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None, None


def _chunks(num_images: int, entries: int) -> Iterator[tuple[slice, slice]]:
    """Slices of anchors i and of images j that cover all pairs, `entries` triplets (i, j, k) each, or a row of B."""
    num_anchors = max(entries // max(num_images, 1) ** 2, 1)
    num_rows = max(entries // max(num_anchors * num_images, 1), 1)
    for anchor in range(0, num_images, num_anchors):
        for row in range(0, num_images, num_rows):
            yield slice(anchor, anchor + num_anchors), slice(row, row + num_rows)


def _cosines(squared: Tensor, inverse: Tensor, anchors: slice, rows: slice) -> Tensor:
    """A_ijk [I, J, B] for anchors i, images j of `rows` and every k, from squared and inverse distances [B, B]."""
    cosine = squared[anchors, rows, None] + squared[anchors, None, :]
    cosine.sub_(squared[rows]).mul_(0.5 * inverse[anchors, rows, None]).mul_(inverse[anchors, None, :])
    return cosine
