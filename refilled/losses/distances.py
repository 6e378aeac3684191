"""Distances of l2-normalised embeddings, as Eq. 4 and the choice of impostors need them.

Everything here is float64 whatever comes in. It costs a few milliseconds at the batch sizes of this method and makes
the choice of impostors, a comparison of nearly equal numbers, independent of autocast, TF32 and the batch's order.
"""

from __future__ import annotations

import torch
from torch import Tensor

IDENTICAL = 1e-14
"""Squared distances below this are 0: rounding leaves some 1e-16 between two copies of one image."""

STEPS = 2.0**42
"""Steps to a unit of squared distance (2e-13 each) in which distances are compared.

Far above the rounding of squared distances, so that copies of one image tie, and far below what embeddings resolve.
"""


class NonFiniteEmbeddingError(ValueError):
    """An embedding holds NaN or infinity; the message says which model produced it."""


def check_finite(student: Tensor, teacher: Tensor) -> None:
    """Raise if an embedding holds NaN or infinity, naming the model.

    Reading the answer makes the host wait for the device. On CUDA the losses therefore do not call it: they are NaN
    whenever an embedding is not finite, and the caller who sees such a loss calls this to learn the reason.

    Args:
        student: [B, Ds] student embeddings.
        teacher: [B, Dt] teacher embeddings.

    Raises:
        NonFiniteEmbeddingError: With the word "student", "teacher" or both in its message.
    """
    models = {"student": student, "teacher": teacher}
    guilty = [name for name, embedding in models.items() if not bool(torch.isfinite(embedding).all())]
    if guilty:
        raise NonFiniteEmbeddingError(f"The embedding of the {' and of the '.join(guilty)} holds NaN or infinity.")


def check_batch(student: Tensor, teacher: Tensor, labels: Tensor) -> None:
    """Raise unless shapes agree; on the CPU, where looking is free, also raise for values that are not finite."""
    if student.dim() != 2 or teacher.dim() != 2:
        raise ValueError(f"student and teacher must be [B, D], got {list(student.shape)} and {list(teacher.shape)}.")
    if labels.shape != student.shape[:1] or labels.shape != teacher.shape[:1]:
        raise ValueError(
            f"labels must be [B], one for each row of student {list(student.shape)} and teacher "
            f"{list(teacher.shape)}, got {list(labels.shape)}."
        )
    if student.device.type == "cpu":
        check_finite(student, teacher)


def result_dtype(value: Tensor) -> torch.dtype:
    """Float64 for float64, else float32: half precision goes in, never out."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def unit_rows(embedding: Tensor) -> Tensor:
    """l2-normalised rows [B, D] in float64; a zero row stays zero and gets a zero gradient."""
    rows = embedding.double()
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    is_zero = norm == 0
    unit: Tensor = rows / norm.masked_fill(is_zero, 1.0)
    return unit.masked_fill(is_zero, 0.0)


def squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Squared Euclidean distances [R, B] between float64 `rows` [R, D] and `columns` [B, D], exactly 0 for identical.

    The absolute error is some 4e-16, so a distance d carries 2e-16 / d. No gradient flows through an exact 0: a square
    root taken of the result has derivative 0 there, a subgradient of the norm.
    """
    squared = rows.square().sum(1)[:, None] + columns.square().sum(1)[None, :] - 2.0 * (rows @ columns.T)
    return squared.masked_fill(squared < IDENTICAL, 0.0)


def in_steps(squared: Tensor) -> Tensor:
    """Squared distances as int64 counts of steps; n lies beyond p where n > p + 1, so rounding parts no copies."""
    return (squared * STEPS).round().long()
