"""What every model returns, what every model is, and how a family of models is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Output(NamedTuple):
    """One forward pass over B images."""

    embedding: Tensor
    """[B, d], the penultimate features phi(x), not normalised; float32 or better, also under autocast."""
    logits: Tensor
    """[B, C], the head applied to `embedding`; float32 or better, also under autocast."""
    features: tuple[Tensor, ...]
    """[B, c, h, w] each: outputs of the groups before their last activation, the first first; may be empty.

    So they have negative entries in every family. Under autocast they keep its precision.
    """


class Model(nn.Module):
    """An embedding phi followed by a linear top-layer classifier W, called `head`."""

    head: nn.Linear
    feature_channels: tuple[int, ...]
    """Channels of each map of `Output.features`, in their order."""
    borders_end_in_relu: bool = True
    """Whether the next group gets a ReLU of a map; else (pre-activation networks) it gets the map itself."""

    def __init__(self, embedding_dim: int, num_classes: int, feature_channels: tuple[int, ...]) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.num_classes = num_classes
        self.feature_channels = feature_channels
        self.has_scores = True
        """Whether the head was trained: that of a network which was brought without one says nothing."""

    def forward(self, images: Tensor, dropout_keys: Tensor | None = None) -> Output:
        """Embed and classify images.

        Args:
            images: Float [B, channels, height, width], already normalised; B may be 0.
            dropout_keys: Int64 [B], a number for each image mixed from seed, epoch and image. Needed in training
                where the dropout rate is above 0, else unused.

        Returns:
            Output of these images.
        """
        raise NotImplementedError

    def pool_and_classify(self, activations: Tensor, features: tuple[Tensor, ...]) -> Output:
        """Average the last activations [B, d, h, w] over space and apply the head.

        Both run in float32 at least: they cost next to nothing, and under bfloat16 autocast the distances between
        embeddings and the small differences of logits, which the losses live on, would be rounded to three digits.
        """
        wide = torch.promote_types(activations.dtype, torch.float32)
        embedding = activations.mean(dim=(2, 3), dtype=wide)
        with torch.autocast(embedding.device.type, enabled=False):
            logits = self.head(embedding.to(self.head.weight.dtype))
        return Output(embedding, logits.to(wide), features)


def _integers(groups: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(int(group) for group in groups)


@dataclass(frozen=True)
class Family:
    """A family of models: how its names look and how a name becomes a model."""

    form: str
    """The form of its names with an example, as it is shown to a person."""
    pattern: re.Pattern[str]
    """Matches its names; the groups' texts are handed to `parse_sizes`."""
    is_valid: Callable[..., bool]
    """Whether the sizes of a name make a model."""
    build: Callable[..., Model]
    """The sizes of a name, then by keyword `num_classes`, `in_channels`, `dropout`, and `image_size` if it knows it."""
    min_image_size: int
    """Height and width below which nothing is left to pool."""
    knows_image_size: bool = False
    """Whether the network depends on the size of its images."""
    parse_sizes: Callable[[tuple[str, ...]], tuple[int | float, ...]] = _integers
    """The sizes from the texts of the pattern's groups; integers unless a family says otherwise."""

    def parse(self, name: str) -> tuple[Any, ...] | None:
        """The sizes in `name`, or None where it is not a name of this family."""
        match = self.pattern.fullmatch(name)
        sizes = self.parse_sizes(match.groups()) if match else None
        return sizes if sizes is not None and self.is_valid(*sizes) else None
