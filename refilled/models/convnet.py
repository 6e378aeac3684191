"""A small convolutional network for small images, quick on a CPU."""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn

from refilled.models.dropout import KeyedDropout
from refilled.models.output import Family, Model, Output


class ConvNet(Model):
    """Three times conv3x3-BN-ReLU with `width`, 2 and 4 times `width` channels, the second with stride 2.

    `features` are the three outputs of batch normalisation, before the activation that follows.

    Args:
        width: Channels of the first layer, at least 1.
        num_classes: Outputs of the head.
        in_channels: Channels of the images.
        dropout: Rate before the last convolution.
    """

    def __init__(self, width: int, *, num_classes: int, in_channels: int, dropout: float) -> None:
        super().__init__(
            embedding_dim=4 * width, num_classes=num_classes, feature_channels=(width, 2 * width, 4 * width)
        )
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.dropout = KeyedDropout(dropout)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor, dropout_keys: Tensor | None = None) -> Output:
        """See `Model.forward`."""
        first = self.bn1(self.conv1(images))
        second = self.bn2(self.conv2(F.relu(first)))
        third = self.bn3(self.conv3(self.dropout(F.relu(second), dropout_keys)))
        return self.pool_and_classify(F.relu(third), (first, second, third))


FAMILY = Family(
    form="convnet-WIDTH (convnet-16)",
    pattern=re.compile(r"convnet-([1-9][0-9]{0,3})"),
    is_valid=lambda width: True,
    build=ConvNet,
    min_image_size=1,
)
