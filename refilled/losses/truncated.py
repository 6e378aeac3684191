"""Comparison matching with the tuples of the authors' released code, for the `released` preset only."""

from __future__ import annotations

import torch
from torch import Tensor

from refilled.losses.comparison import tuple_rule
from refilled.losses.distances import check_batch, in_steps, result_dtype, squared_distances, unit_rows


def truncated_comparison_matching(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    margin: float | None = None,
    student_temperature: float | None = None,
) -> Tensor:
    """Mean KL(teacher || student) over tuples that are all cut to the length of the batch's shortest.

    The impostors of (i, p) are the other-class n with 0 < D_S[i,n] - D_S[i,p] <= margin. K is the smallest number of
    them over all pairs that have one, and each tuple keeps its first K by index in the batch, not the nearest; so the
    result depends on the batch's order. On real batches K is about 1 and the tuples are triplets.

    Float64 inside; O(N B) memory for N same-class pairs. Gradient, degenerate batches, non-finite embeddings and the
    dtype of the result are as in `comparison_matching`.

    Args:
        student: [B, Ds], any float dtype, not normalised.
        teacher: [B, Dt], treated as constant.
        labels: [B] integers.
        temperature: τ of the teacher's tuple probability, at least 0.003.
        margin: Largest D_S[i,n] - D_S[i,p]; None: no bound.
        student_temperature: τ of the student's tuple probability; None: `temperature`.

    Returns:
        Scalar.

    Raises:
        NonFiniteEmbeddingError: On the CPU, where an embedding is not finite.
        ValueError: A shape or a setting is wrong.
    """
    check_batch(student, teacher, labels)
    rule = tuple_rule(temperature, student_temperature, None, margin, num_images=len(labels))
    student_rows, teacher_rows = unit_rows(student), unit_rows(teacher.detach())
    squared = squared_distances(student_rows, student_rows)
    anchors, members = _tuples(squared.detach(), labels, rule.margin)
    student_log = (squared.sqrt()[anchors, members] / -rule.student_temperature).log_softmax(1)
    teacher_distance = squared_distances(teacher_rows, teacher_rows).sqrt()[anchors, members]
    teacher_log = (teacher_distance / -rule.teacher_temperature).log_softmax(1)
    total = (teacher_log.exp() * (teacher_log - student_log)).sum()
    # The zero keeps a batch without tuples in the graph, and brings NaN that fell out of every comparison to the loss.
    loss = total / max(len(members), 1) + 0.0 * (student_rows.sum() + teacher_rows.sum())
    return loss.to(result_dtype(student))


def _tuples(squared: Tensor, labels: Tensor, margin: float | None) -> tuple[Tensor, Tensor]:
    """Anchors [M, 1] and members [M, 1 + K], positive first, as indices in the batch."""
    is_same = labels[:, None] == labels[None, :]
    anchors, positives = is_same.logical_and(~torch.eye(len(labels), dtype=torch.bool, device=labels.device)).nonzero(
        as_tuple=True
    )
    positive = squared[anchors, positives][:, None]
    steps = in_steps(squared)[anchors]
    is_impostor = ~is_same[anchors] & (steps > in_steps(positive) + 1)
    if margin is not None:
        is_impostor &= steps <= in_steps((positive.sqrt() + margin).square()) + 1
    counts = is_impostor.sum(1)
    has_impostor = counts > 0
    anchors, positives, is_impostor = anchors[has_impostor], positives[has_impostor], is_impostor[has_impostor]
    if not len(anchors):
        return anchors[:, None], positives[:, None]
    shortest = int(counts[has_impostor].min())
    is_kept = is_impostor & (is_impostor.cumsum(1) <= shortest)
    negatives = is_kept.nonzero()[:, 1].view(-1, shortest)
    return anchors[:, None], torch.cat((positives[:, None], negatives), dim=1)
