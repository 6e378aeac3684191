"""The losses as plain Python loops, straight from the equations; slow, and written apart from the code they check.

Gradients come from autograd on 0-d float64 tensors, so the loops are differentiable as they stand.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def normalised(rows: Tensor) -> Tensor:
    return torch.stack([row / row.pow(2).sum().sqrt() for row in rows])


def distance(a: Tensor, b: Tensor) -> Tensor:
    if torch.equal(a, b):
        return torch.zeros((), dtype=a.dtype)
    return (a - b).pow(2).sum().sqrt()


def tuple_divergence(teacher: list[Tensor], student: list[Tensor], tau_t: float, tau_s: float) -> Tensor:
    """KL of Eq. 4's probabilities, the positive's distance first."""
    q = [torch.exp(-d / tau_t) for d in teacher]
    p = [torch.exp(-d / tau_s) for d in student]
    q_sum, p_sum = sum(q[1:], q[0]), sum(p[1:], p[0])
    terms = [(qj / q_sum) * (torch.log(qj / q_sum) - torch.log(pj / p_sum)) for qj, pj in zip(q, p, strict=True)]
    return sum(terms[1:], terms[0])


def impostors_of(
    d_s: dict[tuple[int, int], Tensor], labels: list[int], i: int, p: int, margin: float | None
) -> list[int]:
    found = []
    for n in range(len(labels)):
        if labels[n] == labels[i]:
            continue
        # 1e-12: the loop's own rounding, so that copies of one image tie here too
        gap = d_s[i, n].item() - d_s[i, p].item()
        if gap > 1e-12 and (margin is None or gap <= margin + 1e-12):
            found.append(n)
    return found


def all_distances(
    student: Tensor, teacher: Tensor
) -> tuple[dict[tuple[int, int], Tensor], dict[tuple[int, int], Tensor]]:
    z_s, z_t = normalised(student), normalised(teacher.detach())
    pairs = [(i, j) for i in range(len(student)) for j in range(len(student))]
    return {ij: distance(z_s[ij[0]], z_s[ij[1]]) for ij in pairs}, {
        ij: distance(z_t[ij[0]], z_t[ij[1]]) for ij in pairs
    }


def comparison_loop(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    max_negatives: int | None = None,
    margin: float | None = None,
    student_temperature: float | None = None,
) -> Tensor:
    y = labels.tolist()
    d_s, d_t = all_distances(student, teacher)
    divergences = []
    for i in range(len(y)):
        for p in range(len(y)):
            if p == i or y[p] != y[i]:
                continue
            found = impostors_of(d_s, y, i, p, margin)
            found.sort(key=lambda n: round(d_s[i, n].item(), 11))  # stable: of equal ones the first in the batch
            found = found[:max_negatives]
            if not found:
                continue
            members = [p, *found]
            divergences.append(
                tuple_divergence(
                    [d_t[i, j] for j in members],
                    [d_s[i, j] for j in members],
                    temperature,
                    temperature if student_temperature is None else student_temperature,
                )
            )
    if not divergences:
        return 0.0 * student.sum()
    return sum(divergences[1:], divergences[0]) / len(divergences)


def truncated_loop(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    margin: float | None = None,
    student_temperature: float | None = None,
) -> Tensor:
    y = labels.tolist()
    d_s, d_t = all_distances(student, teacher)
    tuples = {}
    for i in range(len(y)):
        for p in range(len(y)):
            if p != i and y[p] == y[i]:
                found = impostors_of(d_s, y, i, p, margin)
                if found:
                    tuples[i, p] = found
    if not tuples:
        return 0.0 * student.sum()
    shortest = min(len(found) for found in tuples.values())
    total = torch.zeros((), dtype=torch.float64)
    for (i, p), found in tuples.items():
        members = [p, *found[:shortest]]
        total = total + tuple_divergence(
            [d_t[i, j] for j in members],
            [d_s[i, j] for j in members],
            temperature,
            temperature if student_temperature is None else student_temperature,
        )
    return total / len(tuples)


def prototypes_loop(embeddings: Tensor, labels: Tensor, num_classes: int) -> list[list[float]]:
    dim = embeddings.shape[1]
    means = []
    for c in range(num_classes):
        members = [row.tolist() for row, y in zip(embeddings, labels.tolist(), strict=True) if y == c]
        means.append([math.fsum(row[k] for row in members) / len(members) for k in range(dim)])
    return means


def softmax_loop(scores: list[float]) -> list[float]:
    top = max(scores)
    exps = [math.exp(score - top) for score in scores]
    return [e / math.fsum(exps) for e in exps]


def posterior_loop(embedding: Tensor, prototypes: Tensor, classes: Tensor, form: str, tau: float) -> list[list[float]]:
    rows = []
    for phi in embedding.tolist():
        scores = []
        for centre in prototypes.tolist():
            length = math.sqrt(math.fsum(x * x for x in centre))
            scores.append(math.fsum(a * b for a, b in zip(phi, centre, strict=True)) / length)
        if form == "cosine_share":
            whole = math.fsum(scores)
            scores = [score / whole for score in scores]
        rows.append(softmax_loop([scores[c] / tau for c in classes.tolist()]))
    return rows


def local_loop(logits: Tensor, posterior: Tensor, classes: Tensor, weights: Tensor, tau: float) -> float:
    total = 0.0
    for row, q, weight in zip(logits.tolist(), posterior.tolist(), weights.tolist(), strict=True):
        p = softmax_loop([row[c] / tau for c in classes.tolist()])
        total += weight * sum(qs * (math.log(qs) - math.log(ps)) for qs, ps in zip(q, p, strict=True) if qs > 0)
    return total / len(logits)
