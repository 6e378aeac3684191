"""Class prototypes: the exact class means of an embedding (Eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from refilled.losses.distances import result_dtype


class PrototypeSum:
    """Class sums and counts gathered over the batches of a data set.

    Attributes:
        sums: [C, D] float64. A caller with several workers all-reduces it and `counts` before `means`.
        counts: [C] int64.
    """

    def __init__(self, num_classes: int, dim: int, device: torch.device | str | None = None) -> None:
        self.sums = torch.zeros(num_classes, dim, dtype=torch.float64, device=device)
        self.counts = torch.zeros(num_classes, dtype=torch.int64, device=device)

    def add(self, embeddings: Tensor, labels: Tensor) -> None:
        """Add a batch: embeddings [B, D], any float dtype, and labels [B] in 0..C-1.

        Raises:
            ValueError: Shapes disagree, or a label is out of range.
        """
        num_classes, dim = self.sums.shape
        if embeddings.dim() != 2 or embeddings.shape[1] != dim or labels.shape != embeddings.shape[:1]:
            raise ValueError(
                f"embeddings must be [B, {dim}] and labels [B], got {list(embeddings.shape)} and {list(labels.shape)}."
            )
        if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
            raise ValueError(f"labels must lie in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}.")
        labels = labels.long().to(self.counts.device)
        self.sums.index_add_(0, labels, embeddings.detach().to(self.sums))
        self.counts += torch.bincount(labels, minlength=num_classes)

    def means(self) -> Tensor:
        """Prototypes [C, D], float64.

        Raises:
            ValueError: A class has no image.
        """
        empty = (self.counts == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"Every class needs at least one image for its prototype, but classes {empty} have none.")
        return self.sums / self.counts[:, None]


def class_prototypes(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Class means (Eq. 6), accumulated in float64.

    Args:
        embeddings: [B, D], any float dtype; not normalised, no gradient flows back.
        labels: [B] integers in 0..C-1.
        num_classes: C.

    Returns:
        [C, D], float64 for float64 embeddings, else float32.

    Raises:
        ValueError: A class is empty, shapes disagree or a label is out of range.
    """
    if embeddings.dim() != 2:
        raise ValueError(f"embeddings must be [B, D], got {list(embeddings.shape)}.")
    collected = PrototypeSum(num_classes, embeddings.shape[1], embeddings.device)
    collected.add(embeddings, labels)
    return collected.means().to(result_dtype(embeddings))
