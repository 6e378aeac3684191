"""Losses that compare feature maps of student and teacher image by image: FitNet, attention transfer and VID.

Their mean over the images of a batch is the loss of the paper, so a worker adds up its own images and divides by the
global batch. Maps are widened to float32 first, and nothing is done in autocast's precision. For the backward pass
each loss keeps one float32 map: hint and VID the difference, attention the student's. Of WRN-40-2's middle map (64 x
16²) that is 17 MB at 256 images and 67 MB at 1,024; of its three maps together 59 MB and 235 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from refilled.losses.distances import result_dtype

_Map = TypeVar("_Map")

ATTENTION_EPS = 1e-12
"""Least norm by which attention is divided: an all-zero map has no attention at all, rather than NaN."""


def match_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two maps to the size of the smaller; a map of that size already is returned as it is.

    Height and width are matched each for itself, by adaptive average pooling. Precision and gradients are left alone.

    Args:
        student: [B, c, h, w].
        teacher: [B, c', h', w'].

    Returns:
        [B, c, min(h, h'), min(w, w')] and [B, c', min(h, h'), min(w, w')].

    Raises:
        ValueError: A map is not 4-dimensional or the numbers of images differ.
    """
    if student.dim() != 4 or teacher.dim() != 4 or len(student) != len(teacher):
        raise ValueError(
            f"student and teacher must be [B, channels, height, width] of the same images, got {list(student.shape)} "
            f"and {list(teacher.shape)}."
        )
    height, width = (min(sizes) for sizes in zip(student.shape[2:], teacher.shape[2:], strict=True))
    return _pooled(student, height, width), _pooled(teacher, height, width)


def pair_maps(student: Sequence[_Map], teacher: Sequence[_Map]) -> list[tuple[_Map, _Map]]:
    """Pair the deepest with the deepest and go up until one side has no more.

    Args:
        student: The student's maps, the first first; or anything of which there is one for each map.
        teacher: The teacher's.

    Returns:
        As many pairs as the shorter side has maps, the first first.

    Raises:
        ValueError: A side has none.
    """
    num_pairs = min(len(student), len(teacher))
    if num_pairs == 0:
        raise ValueError(f"Both sides need at least one map, got {len(student)} and {len(teacher)}.")
    return list(zip(student[-num_pairs:], teacher[-num_pairs:], strict=True))


def hint_loss(regressed: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of each image's map: FitNet's hint (Romero et al., 2015).

    Args:
        regressed: [B, c, h, w], the student's map after the regressor, any float dtype.
        teacher: [B, c, h, w], treated as constant.

    Returns:
        [B]; float64 for a float64 `regressed`, else float32.

    Raises:
        ValueError: Shapes disagree.
    """
    _check_same_shape("regressed", regressed, teacher)
    with torch.autocast(regressed.device.type, enabled=False):
        return _difference(regressed, teacher).square().mean((1, 2, 3))


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of each image's attention maps (Zagoruyko & Komodakis, 2017).

    Attention is the mean of squares over channels, divided by its l2 norm over the positions, so the scale of either
    map does not matter. Maps of different sizes are pooled before they are squared.

    Args:
        student: [B, c, h, w], any float dtype.
        teacher: [B, c', h', w'], treated as constant.

    Returns:
        [B], each at most 2 / (positions compared); float64 for a float64 `student`, else float32.

    Raises:
        ValueError: A map is not 4-dimensional or the numbers of images differ.
    """
    dtype = result_dtype(student)
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = match_size(student.to(dtype), teacher.detach().to(dtype))
        return (_attention(student) - _attention(teacher)).square().mean(1)


def variational_loss(mean: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    """½ [(teacher - mean)² / variance + ln variance], averaged over each image's map: VID (Ahn et al., 2019).

    A Gaussian's negative log-likelihood without the constant ½ ln 2π. Where the mean is the teacher's map it is half
    the mean log variance, which is negative for variances below 1.

    Args:
        mean: [B, c, h, w], what the student's map predicts, any float dtype.
        teacher: [B, c, h, w], treated as constant.
        variance: [c], above 0, or the loss is not finite; gets a gradient as `mean` does.

    Returns:
        [B]; float64 for a float64 `mean`, else float32.

    Raises:
        ValueError: Shapes disagree.
    """
    _check_same_shape("mean", mean, teacher)
    if variance.shape != mean.shape[1:2]:
        raise ValueError(f"variance must be [{mean.shape[1]}], one a channel, got {list(variance.shape)}.")
    with torch.autocast(mean.device.type, enabled=False):
        squares = _difference(mean, teacher).square().mean((2, 3))  # first, so that no second map is kept
        wide = variance.to(squares.dtype)
        return 0.5 * (squares / wide + wide.log()).mean(1)


def _check_same_shape(name: str, student: Tensor, teacher: Tensor) -> None:
    if student.dim() != 4 or student.shape != teacher.shape:
        raise ValueError(
            f"{name} and teacher must be [B, channels, height, width] of one shape, got {list(student.shape)} and "
            f"{list(teacher.shape)}."
        )


def _difference(student: Tensor, teacher: Tensor) -> Tensor:
    dtype = result_dtype(student)
    return student.to(dtype) - teacher.detach().to(dtype)


def _pooled(features: Tensor, height: int, width: int) -> Tensor:
    if features.shape[2:] == (height, width):
        return features
    return F.adaptive_avg_pool2d(features, (height, width))


def _attention(features: Tensor) -> Tensor:
    """Unit attention [B, h * w] of maps [B, c, h, w]; zero where the map is."""
    return F.normalize(features.square().mean(1).flatten(1), dim=1, eps=ATTENTION_EPS)
