"""How good a model is on some images: by its own classifier, or by the nearest class mean of its embedding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from refilled import distributed
from refilled.data.images import ImageSet
from refilled.losses import PrototypeSum
from refilled.models import Model, Output
from refilled.tasks.normalization import Normalization
from refilled.training.compute import Compute

EVALUATION_BATCH_SIZE = 500


def accuracy(model: Model, image_set: ImageSet, normalization: Normalization, compute: Compute) -> float:
    """Share of images whose largest logit is their label's; every worker counts a part, all get the whole's number."""
    num_correct = torch.zeros((), dtype=torch.int64, device=compute.device)
    for output, labels in _outputs(model, image_set, normalization, compute, _share(len(image_set.labels))):
        num_correct += (output.logits.argmax(dim=1) == labels).sum()
    return int(distributed.sum_over_workers(num_correct)) / len(image_set.labels)


def nearest_mean_accuracy(
    model: Model, image_set: ImageSet, prototypes: Tensor, normalization: Normalization, compute: Compute
) -> float:
    """Share of images whose embedding has its largest cosine with its class's mean (NCM).

    Args:
        model: A student or teacher.
        image_set: Labelled images.
        prototypes: [C, d], class means.
        normalization: Mean and deviation of the pixels.
        compute: Device and precision.
    """
    directions = torch.nn.functional.normalize(prototypes.to(compute.device), dim=1)
    num_correct = torch.zeros((), dtype=torch.int64, device=compute.device)
    for output, labels in _outputs(model, image_set, normalization, compute, _share(len(image_set.labels))):
        nearest = (output.embedding.to(directions.dtype) @ directions.T).argmax(dim=1)
        num_correct += (nearest == labels).sum()
    return int(distributed.sum_over_workers(num_correct)) / len(image_set.labels)


def class_means(
    model: Model,
    image_set: ImageSet,
    normalization: Normalization,
    compute: Compute,
    *,
    images_per_class: int | None = None,
) -> Tensor:
    """Exact class means of the embedding without augmentation (Eq. 6), reduced over workers.

    Args:
        model: A student or teacher.
        image_set: Labelled images.
        normalization: Mean and deviation of the pixels.
        compute: Device and precision.
        images_per_class: Use the first so many images of each class; none: all.

    Returns:
        [C, d] in the model's type.
    """
    chosen = torch.arange(len(image_set.labels))
    if images_per_class is not None:
        chosen = first_of_each_class(image_set.labels, images_per_class)
    sums: PrototypeSum | None = None
    for output, labels in _outputs(model, image_set, normalization, compute, chosen[_share(len(chosen))]):
        if sums is None:
            sums = PrototypeSum(len(image_set.class_names), output.embedding.shape[1])
        sums.add(output.embedding.cpu(), labels.cpu())
    sums = sums or PrototypeSum(len(image_set.class_names), model.embedding_dim)
    for part in (sums.sums, sums.counts):
        part.copy_(distributed.sum_over_workers(part.to(compute.device)).cpu())
    return sums.means().to(compute.device, compute.dtype)


def first_of_each_class(labels: Tensor, count: int) -> Tensor:
    """Positions of the first `count` images of every class, ascending."""
    order = labels.argsort(stable=True)
    sizes = torch.bincount(labels)
    starts = (sizes.cumsum(0) - sizes)[labels[order]]
    rank_in_class = torch.arange(len(labels)) - starts
    return order[rank_in_class < count].sort().values


def _share(count: int) -> Tensor:
    return torch.arange(count).tensor_split(distributed.world_size())[distributed.rank()]


def _outputs(
    model: Model, image_set: ImageSet, normalization: Normalization, compute: Compute, indices: Tensor
) -> Iterator[tuple[Output, Tensor]]:
    """Outputs and labels of some images, batch by batch, with the model as it is used, not trained."""
    was_training = model.training
    model.eval()
    try:
        for positions in torch.split(indices, EVALUATION_BATCH_SIZE):
            if len(positions) == 0:
                continue
            images = compute.place_images(image_set.images[positions], normalization)
            with torch.no_grad():  # not around the yield: the caller would run under it too
                output = compute.forward(model, images)
            yield output, image_set.labels[positions].to(compute.device)
    finally:
        model.train(was_training)
