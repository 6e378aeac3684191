"""Sums over many ranges of one sorted row, and their transpose, without ever subtracting.

A difference of prefix sums would lose the sum of a range of small terms beside a large prefix: at temperature 0.05
terms span exp(-40) to 1, more than float64 carries. So ranges that start at 0 read a prefix sum, and all others are put
together from the nodes of a binary tree of sums, at most two a level.
"""

from __future__ import annotations

import torch
from torch import Tensor


def range_sums(values: Tensor, begin: Tensor | None, end: Tensor, longest: int) -> Tensor:
    """Sums of `values[..., begin:end]` for every range.

    Args:
        values: [Q, R, B], Q quantities in R rows.
        begin: [R, P] int64, or None where all ranges begin at 0.
        end: [R, P] int64, begin <= end <= B.
        longest: No range is longer; B is always right, less saves time.

    Returns:
        [Q, R, P].
    """
    if begin is None:
        return _pick(values.cumsum(-1), end - 1, end > 0)
    left, right, inner_begin, inner_end = _peel(begin, end)
    here = _pick(values, begin, left) + _pick(values, end - 1, right)
    if longest <= 1:
        return here
    padded = torch.nn.functional.pad(values, (0, values.shape[-1] % 2))
    parents = padded[..., 0::2] + padded[..., 1::2]
    return here + range_sums(parents, inner_begin, inner_end, longest // 2)


def range_cover(weights: Tensor, begin: Tensor | None, end: Tensor, longest: int, size: int) -> Tensor:
    """Transpose of `range_sums`: for every position the sum of the weights of the ranges that cover it.

    Args:
        weights: [Q, R, P], 0 for an empty range.
        begin: [R, P] int64, or None where all ranges begin at 0.
        end: [R, P] int64.
        longest: See `range_sums`.
        size: B, the length of a row.

    Returns:
        [Q, R, B].
    """
    cover = weights.new_zeros(*weights.shape[:-1], size)
    if begin is None:
        _drop(cover, end - 1, end > 0, weights)
        return cover.flip(-1).cumsum(-1).flip(-1)
    left, right, inner_begin, inner_end = _peel(begin, end)
    _drop(cover, begin, left, weights)
    _drop(cover, end - 1, right, weights)
    if longest > 1:
        parents = range_cover(weights, inner_begin, inner_end, longest // 2, (size + 1) // 2)
        cover += parents.repeat_interleave(2, dim=-1)[..., :size]
    return cover


def _peel(begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which ranges hold a node without its sibling at the left and right end, and the rest one level up."""
    left = (begin < end) & (begin % 2 == 1)
    begin = begin + left.long()
    right = (begin < end) & (end % 2 == 1)
    end = end - right.long()
    return left, right, begin // 2, end // 2


def _pick(values: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    safe = torch.where(mask, index, 0).expand(values.shape[0], -1, -1)
    return torch.where(mask, values.gather(-1, safe), 0.0)


def _drop(into: Tensor, index: Tensor, mask: Tensor, weights: Tensor) -> None:
    safe = torch.where(mask, index, 0).expand(into.shape[0], -1, -1)
    into.scatter_add_(-1, safe, torch.where(mask, weights, 0.0))
