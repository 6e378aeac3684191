"""A network that keeps the contract, and networks that each break it in one way."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled.models import KeyedDropout, Model, Output


class Whole(Model):
    """Conv-BN-ReLU twice, with dropout between."""

    def __init__(self, *, num_classes: int, in_channels: int, image_size: int, dropout: float) -> None:
        super().__init__(embedding_dim=6, num_classes=num_classes, feature_channels=(4, 6))
        self.rate = dropout
        self.conv1, self.bn1 = nn.Conv2d(in_channels, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.dropout = KeyedDropout(dropout)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, num_classes)

    def forward(self, images: Tensor, dropout_keys: Tensor | None = None) -> Output:
        first = self.bn1(self.conv1(images))
        second = self.bn2(self.conv2(self.drop(F.relu(first), dropout_keys)))
        return self.end(second, (first, second))

    def drop(self, maps: Tensor, keys: Tensor | None) -> Tensor:
        dropped: Tensor = self.dropout(maps, keys)
        return dropped

    def end(self, maps: Tensor, features: tuple[Tensor, ...]) -> Output:
        return self.pool_and_classify(F.relu(maps), features)


class LeaksInEvaluation(Whole):
    """Takes batch statistics in evaluation too."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.bn2 = nn.BatchNorm2d(6, track_running_stats=False)


class SaysOtherWidths(Whole):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.feature_channels = (4, 8)


class ClassifiesSomethingElse(Whole):
    def end(self, maps: Tensor, features: tuple[Tensor, ...]) -> Output:
        output = super().end(maps, features)
        return output._replace(logits=2 * output.logits)


class FeaturesBehindTheActivation(Whole):
    def end(self, maps: Tensor, features: tuple[Tensor, ...]) -> Output:
        return super().end(maps, (features[0], F.relu(features[1])))


class RoundsItsEmbedding(Whole):
    def end(self, maps: Tensor, features: tuple[Tensor, ...]) -> Output:
        output = super().end(maps, features)
        return output._replace(embedding=output.embedding.to(maps.dtype))


class BeginsAnyhow(Whole):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.shift = nn.Parameter(torch.tensor(random.random()))


class BeginsWithItsClasses(Whole):
    """Draws after the head, which takes as many numbers as there are classes."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.scale = nn.Parameter(torch.rand(6))

    def end(self, maps: Tensor, features: tuple[Tensor, ...]) -> Output:
        return super().end(maps * self.scale[:, None, None], features)


class StateThatIsNotSaved(Whole):
    """A running mean that is no buffer."""

    _mean = 0.0

    def end(self, maps: Tensor, features: tuple[Tensor, ...]) -> Output:
        if self.training:
            self._mean += 0.1
        return super().end(maps - self._mean, features)


class CannotTakeOneImage(Whole):
    def end(self, maps: Tensor, features: tuple[Tensor, ...]) -> Output:
        output = super().end(maps, features)
        return output._replace(logits=output.logits.squeeze(0))


class DropsByGenerator(Whole):
    def drop(self, maps: Tensor, keys: Tensor | None) -> Tensor:
        return F.dropout(maps, self.rate, self.training)


class DropsByPlace(Whole):
    def drop(self, maps: Tensor, keys: Tensor | None) -> Tensor:
        return super().drop(maps, torch.arange(len(maps)))


class DropsAlways(Whole):
    """The same elements in every epoch."""

    def drop(self, maps: Tensor, keys: Tensor | None) -> Tensor:
        return super().drop(maps, torch.zeros(len(maps), dtype=torch.int64))


class NormalisesItsShare(Whole):
    """By a layer of its own, which looks at this worker's images alone."""

    def end(self, maps: Tensor, features: tuple[Tensor, ...]) -> Output:
        if self.training:
            maps = maps / (1 + maps.square().sum())
        return super().end(maps, features)
