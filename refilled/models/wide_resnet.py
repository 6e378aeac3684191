"""Wide residual networks for small images (Zagoruyko & Komodakis, 2016, arXiv:1605.07146)."""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn

from refilled.models.dropout import KeyedDropout
from refilled.models.output import Family, Model, Output

_STEM_CHANNELS = 16


class _Block(nn.Module):
    """Pre-activation block: BN-ReLU-conv3x3, BN-ReLU-dropout-conv3x3, plus the shortcut.

    Where the width changes, the shortcut is a 1x1 convolution of the activated input; else it is the raw input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float, layer: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.dropout = KeyedDropout(dropout, layer)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, inputs: Tensor, dropout_keys: Tensor | None) -> Tensor:
        activated = F.relu(self.bn1(inputs))
        residual = F.relu(self.bn2(self.conv1(activated)))
        residual = self.conv2(self.dropout(residual, dropout_keys))
        total: Tensor = residual + (inputs if self.shortcut is None else self.shortcut(activated))
        return total


class WideResNet(Model):
    """WRN-depth-width: three groups of (depth - 4) / 6 blocks with 16, 32 and 64 times `width` channels.

    `features` are the outputs of the three groups, before the activation that follows.

    Args:
        depth: 6n + 4, at least 10.
        width: Factor on the channels, at least 1.
        num_classes: Outputs of the head.
        in_channels: Channels of the images.
        dropout: Rate between the two convolutions of each block.
    """

    borders_end_in_relu = False

    def __init__(self, depth: int, width: int, *, num_classes: int, in_channels: int, dropout: float) -> None:
        widths = (16 * width, 32 * width, 64 * width)
        super().__init__(embedding_dim=widths[-1], num_classes=num_classes, feature_channels=widths)
        num_blocks = (depth - 4) // 6
        self.conv = nn.Conv2d(in_channels, _STEM_CHANNELS, 3, padding=1, bias=False)
        self.groups = nn.ModuleList()
        channels = _STEM_CHANNELS
        for group, group_channels in enumerate(widths):
            blocks = nn.ModuleList()
            for block in range(num_blocks):
                stride = 2 if group > 0 and block == 0 else 1
                blocks.append(_Block(channels, group_channels, stride, dropout, group * num_blocks + block))
                channels = group_channels
            self.groups.append(blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor, dropout_keys: Tensor | None = None) -> Output:
        """See `Model.forward`."""
        activations = self.conv(images)
        features = []
        for blocks in self.groups:
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                activations = block(activations, dropout_keys)
            features.append(activations)
        return self.pool_and_classify(F.relu(self.bn(activations)), tuple(features))


FAMILY = Family(
    form="wrn-DEPTH-WIDTH with DEPTH = 6n + 4 (wrn-40-2)",
    pattern=re.compile(r"wrn-([1-9][0-9]{0,3})-([1-9][0-9]{0,2})"),
    is_valid=lambda depth, width: depth >= 10 and depth % 6 == 4,
    build=WideResNet,
    min_image_size=4,
)
