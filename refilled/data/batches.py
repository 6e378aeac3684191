"""Who sees what, when: an epoch's order and its global batches, the same for any number of workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from refilled.keyed import derive_seed, keyed_permutation


@dataclass(frozen=True)
class Batch:
    """One global batch and a worker's share of it; all on the CPU, so that no step waits for a device.

    Attributes:
        image_ids: Int64 [B], the global batch.
        labels: Int64 [B], its labels.
        classes: Int64 [|S|], the classes S present in the global batch, ascending (Eq. 8).
        share: Int64 [b], the contiguous part of `image_ids` that this worker computes; shares in rank order make up
            the global batch in its order, and may differ by one image or be empty.
        counts: The number of images in each worker's share.
        largest_class: Images of the batch's largest class.
    """

    image_ids: Tensor
    labels: Tensor
    classes: Tensor
    share: Tensor
    counts: tuple[int, ...]
    largest_class: int


def epoch_batches(
    labels: Tensor, *, global_batch_size: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """All images of one epoch in an order that depends on (seed, epoch) alone.

    The last batch holds what is left over, unless that is a single image, which joins the batch before: batch norm
    needs two.

    Args:
        labels: Int64 [N] of the training set.
        global_batch_size: Images a step over all workers.
        seed: The run's.
        epoch: Number of the epoch over both stages.
        rank: This worker's.
        world_size: Number of workers.
    """
    order = keyed_permutation(len(labels), derive_seed(seed, "order"), epoch)
    starts = list(range(0, len(order), global_batch_size))
    if len(starts) > 1 and len(order) - starts[-1] == 1:
        starts.pop()
    for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
        image_ids = order[start:stop]
        batch_labels = labels[image_ids]
        classes, class_sizes = torch.unique(batch_labels, return_counts=True)
        shares = image_ids.tensor_split(world_size)
        yield Batch(
            image_ids=image_ids,
            labels=batch_labels,
            classes=classes,
            share=shares[rank],
            counts=tuple(len(each) for each in shares),
            largest_class=int(class_sizes.max()),
        )


def num_batches(num_images: int, global_batch_size: int) -> int:
    """Number of batches that `epoch_batches` yields."""
    full, rest = divmod(num_images, global_batch_size)
    return max(1, full + (1 if rest > 1 else 0))
