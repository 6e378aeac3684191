"""Contrastive representation distillation, CRD: the pure part (Tian et al. 2020).

For one side, an embedding u of every image i of the batch and a memory with one row m for each of the N training images
of the other model, h_ij = exp(u_i · m_j / τ) / Z. Column 0 is the positive, the other K columns are images of other
classes. With c = K / N, the odds of noise, an image's loss is

    -ln(h_i0 / (h_i0 + c)) - Σ_j ln(c / (h_ij + c)).

The loss of a side is the mean over the batch, CRD's is the sum of both sides. The memories, Z and the maps that give u
are state and belong to the caller.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from refilled.keyed import keyed_uint64
from refilled.losses.distances import result_dtype

EPSILON = 1e-7
"""Added to both denominators, as in the authors' code (HobbitLong/RepDistiller)."""

CPU_CHUNK = 2**17
CUDA_CHUNK = 2**25
"""Keys drawn at once: what fits a CPU's cache, and 0.3 GB a copy on a GPU."""


def contrastive_logits(embedding: Tensor, memory: Tensor, rows: Tensor, *, temperature: float) -> Tensor:
    """U · m / τ of an embedding and its own choice of memory rows: ln h but for -ln Z.

    By way of the products with the whole memory, which holds [b, N] and [b, 1 + K] numbers instead of the [b, 1 + K, d]
    of the chosen rows. With N = 25,000, b = 256, K = 16,384, d = 128 one side's logits, loss and gradient take 0.12 s
    of one CPU core and 0.1 GB, by the chosen rows 6.7 s and 2.1 GB (measured).

    The gradient flows to the embedding only. Neither side is normalised here.

    Args:
        embedding: [b, d], any float dtype.
        memory: [N, d], treated as constant.
        rows: [b, 1 + K] int64 rows of the memory, the positive's first.
        temperature: τ, above 0.

    Returns:
        [b, 1 + K], float64 for a float64 embedding, else float32 under autocast too.

    Raises:
        ValueError: Shapes disagree or the temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature!r}.")
    fits = embedding.dim() == 2 and memory.shape[1:] == embedding.shape[1:]
    if not fits or rows.dim() != 2 or len(rows) != len(embedding):
        raise ValueError(
            "embedding must be [b, d], memory [N, d] and rows [b, 1 + K], got "
            f"{list(embedding.shape)}, {list(memory.shape)} and {list(rows.shape)}."
        )
    dtype = result_dtype(embedding)
    with torch.autocast(embedding.device.type, enabled=False):
        products = (embedding.to(dtype) @ memory.detach().to(dtype).T).gather(1, rows)
    return products / temperature


def contrastive_nce(log_scores: Tensor, *, num_images: int) -> Tensor:
    """The loss of every image for one side (equation above, with `EPSILON` added to both denominators).

    From ln h, as ln(1 + e^x): at low temperatures h spans more than float32 does, and 1 / h² in the gradient far more.
    No value is below 0, but none reaches 0 either: the floor depends on the scores, not on whether the models agree.

    Args:
        log_scores: [b, 1 + K] of ln h, any float dtype. The positive is in column 0.
        num_images: N, rows of the memory.

    Returns:
        [b], float64 for float64 scores, else float32. Their sum over all images of the global batch, divided by their
        number, is the side's loss.

    Raises:
        ValueError: There is no negative, or N is below 1.
    """
    if log_scores.dim() != 2 or log_scores.shape[1] < 2:
        raise ValueError(f"log_scores must be [b, 1 + K] with K at least 1, got {list(log_scores.shape)}.")
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images!r}.")
    log_h = log_scores.to(result_dtype(log_scores))
    noise = (log_h.shape[1] - 1) / num_images
    zero = log_h.new_zeros(())
    positive = torch.logaddexp(math.log(noise + EPSILON) - log_h[:, 0], zero)
    negatives = torch.logaddexp(log_h[:, 1:], zero + math.log(EPSILON)) - math.log(noise)
    return positive + torch.logaddexp(negatives, zero).sum(1)


def sample_negatives(labels: Tensor, image_ids: Tensor, *, num_negatives: int, seed: int, step_key: int) -> Tensor:
    """For every image K rows of other classes, uniform over these, as a pure function of (seed, step key, image).

    Whoever asks for an image gets the same rows, with whatever other images. Without replacement where there are K
    images of other classes: those whose keyed bits are the K smallest, in ascending order. Else K draws with
    replacement. N = 25,000, b = 256, K = 16,384 take 0.16 s of a quiet CPU core, 0.3 s of a busy one, and beside the
    result of 34 MB as much again and some 10 MB (measured).

    Args:
        labels: [N] integers, of all images.
        image_ids: [b] integers in 0..N-1, on the labels' device.
        num_negatives: K, at least 1.
        seed: See `keyed_uint64`.
        step_key: What makes one step's draws differ from another's, such as the number of the step or of the epoch.

    Returns:
        Int64 [b, K], rows in 0..N-1.

    Raises:
        ValueError: A shape or K is wrong, an image is out of range, or there is no image of another class.
    """
    if labels.dim() != 1 or image_ids.dim() != 1:
        raise ValueError(f"labels must be [N] and image_ids [b], got {list(labels.shape)} and {list(image_ids.shape)}.")
    if num_negatives < 1:
        raise ValueError(f"num_negatives must be at least 1, got {num_negatives!r}.")
    if len(image_ids) and not (int(image_ids.min()) >= 0 and int(image_ids.max()) < len(labels)):
        raise ValueError(f"image_ids must lie in 0..{len(labels) - 1}.")
    chunk_entries = CPU_CHUNK if labels.device.type == "cpu" else CUDA_CHUNK
    chunks = torch.split(image_ids.long(), max(chunk_entries // max(len(labels), num_negatives), 1))
    return torch.cat([_sample_chunk(labels, ids, num_negatives, seed, step_key) for ids in chunks])


def _sample_chunk(labels: Tensor, image_ids: Tensor, num_negatives: int, seed: int, step_key: int) -> Tensor:
    is_other = labels[image_ids, None] != labels[None, :]
    num_others = is_other.sum(1)
    if not bool((num_others > 0).all()):
        raise ValueError("An image needs images of another class for its negatives, but all are of its own.")
    is_enough = num_others >= num_negatives
    rows = torch.empty(len(image_ids), num_negatives, dtype=torch.int64, device=labels.device)
    for chosen, draw in ((is_enough, _distinct), (~is_enough, _repeated)):
        if bool(chosen.any()):
            rows[chosen] = draw(is_other[chosen], image_ids[chosen], num_negatives, seed, step_key)
    return rows


def _distinct(is_other: Tensor, image_ids: Tensor, num_negatives: int, seed: int, step_key: int) -> Tensor:
    """The columns of [r, N] with the smallest keys, without sorting: no two keys of a row are equal."""
    columns = torch.arange(is_other.shape[1], device=is_other.device)
    key = keyed_uint64(seed, step_key, image_ids[:, None], columns)
    key.masked_fill_(~is_other, torch.iinfo(torch.int64).max)
    last = key.kthvalue(num_negatives, dim=1, keepdim=True).values
    # `is_other` once more, since one key in 2^64 equals the mark of the own class
    return ((key <= last) & is_other).nonzero()[:, 1].view(-1, num_negatives)


def _repeated(is_other: Tensor, image_ids: Tensor, num_negatives: int, seed: int, step_key: int) -> Tensor:
    """Columns drawn independently among those of [r, N] that are set; the remainder's bias is below N / 2^63."""
    num_others = is_other.sum(1, keepdim=True)
    others = is_other.nonzero()[:, 1]
    draws = torch.arange(num_negatives, device=is_other.device)
    place = keyed_uint64(seed, step_key, image_ids[:, None], draws).remainder(num_others)
    return others[num_others.cumsum(0) - num_others + place]
