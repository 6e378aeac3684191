"""The teacher's posterior over the classes of a batch, from its class prototypes (Eq. 7, Eq. 8 left)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from refilled.losses.distances import result_dtype

PosteriorForm = Literal["prototype", "cosine_share"]

SMALLEST_SHARE = 1e-6
"""Below this fraction of the summed magnitudes, the denominator of Eq. 7 is a remainder of cancellation."""


def teacher_posterior(
    teacher_embedding: Tensor, prototypes: Tensor, classes: Tensor, *, form: PosteriorForm, temperature: float
) -> Tensor:
    """Posterior of a nearest-class-mean classifier over the classes S present in the batch; always detached.

    `prototype` is softmax over S of φ_T·p_s/|p_s| / τ, with φ_T not normalised (the released code): a teacher's
    confidence shows in the length of its embedding.

    `cosine_share` is Eq. 7 to the letter over all C classes, a_c / Σ a_c' with a_c = φ_T·p_c/|p_c|, then the softmax of
    Eq. 8 over S, divided by τ inside. Shares are about 1/C each, so at τ = 1 this softmax is nearly uniform: with 50
    classes Eq. 9 gives about 0.04 for every image. Eq. 7 is a distribution only where the a_c are not negative, as
    after a ReLU. Where the denominator cancels (at most 1e-6 of Σ|a_c|, also for a zero embedding) the shares say
    nothing and are taken as 1/C each; a clearly negative denominator is used as Eq. 7 has it, which reverses the order
    of the classes.

    A prototype of length 0 has no direction: its a_c is 0.

    Args:
        teacher_embedding: [B, D], any float dtype.
        prototypes: [C, D], any float dtype.
        classes: [|S|] int64, the sorted indices of the classes present.
        form: `prototype` or `cosine_share`.
        temperature: τ, above 0.

    Returns:
        [B, |S|], rows sum to 1; float64 for a float64 embedding, else float32. Computed in float64, out of autocast's
        reach.

    Raises:
        ValueError: The form is unknown, the temperature is not above 0 or shapes disagree.
    """
    if form not in ("prototype", "cosine_share"):
        raise ValueError(f"form must be prototype or cosine_share, got {form!r}.")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature!r}.")
    if teacher_embedding.dim() != 2 or prototypes.dim() != 2 or teacher_embedding.shape[1] != prototypes.shape[1]:
        raise ValueError(
            f"teacher_embedding [B, D] and prototypes [C, D] must share D, got {list(teacher_embedding.shape)} and "
            f"{list(prototypes.shape)}."
        )
    centres = prototypes.detach().double()
    if form == "prototype":
        centres = centres[classes]
    length = torch.linalg.vector_norm(centres, dim=1, keepdim=True)
    similarity: Tensor = teacher_embedding.detach().double() @ (centres / length.masked_fill(length == 0, 1.0)).T
    if form == "cosine_share":
        similarity = _shares(similarity)[:, classes]
    return (similarity / temperature).softmax(1).to(result_dtype(teacher_embedding))


def _shares(similarity: Tensor) -> Tensor:
    """Eq. 7: each row of [B, C] over its sum, 1/C where the sum cancels."""
    total = similarity.sum(1, keepdim=True)
    cancels = total.abs() <= SMALLEST_SHARE * similarity.abs().sum(1, keepdim=True)
    return (similarity / total.masked_fill(cancels, 1.0)).masked_fill(cancels, 1.0 / similarity.shape[1])
