"""MobileNet v1 (Howard et al., 2017, arXiv:1704.04861), for small images and large ones."""

from __future__ import annotations

import re
from decimal import Decimal

import torch.nn.functional as F
from torch import Tensor, nn

from refilled.models.dropout import KeyedDropout
from refilled.models.output import Family, Model, Output

_STEM_CHANNELS = 32
# Channels and stride of the 13 depthwise separable blocks, at width 1.
_BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)),
)
_GROUP_ENDS = (2, 4, 10, 12)  # blocks whose outputs are the feature maps: the last two resolutions and two before
_SMALL = 64  # pixels up to which the stem keeps the resolution: with stride 2 an image of 32 ends as a single pixel


class _Block(nn.Module):
    """Depthwise conv3x3-BN-ReLU, pointwise conv1x1-BN; the ReLU that follows is the caller's."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, 3, stride=stride, padding=1, groups=in_channels, bias=False
        )
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, inputs: Tensor) -> Tensor:
        normalised: Tensor = self.bn2(self.pointwise(F.relu(self.bn1(self.depthwise(inputs)))))
        return normalised


class MobileNet(Model):
    """A stem and 13 depthwise separable blocks, every width `width` times the paper's.

    `features` are the outputs of blocks 3, 5, 11 and 13 before their last activation. The dropout rate applies to the
    pooled embedding's input, the last activations.

    Args:
        width: Factor on the channels, above 0.
        stem_stride: Stride of the first convolution; 0: 1 for images of at most 64 pixels a side, else 2.
        num_classes: Outputs of the head.
        in_channels: Channels of the images.
        dropout: Rate before the pooling.
        image_size: Height and width of the images, which decide a stem stride of 0.
    """

    def __init__(
        self, width: float, stem_stride: int, *, num_classes: int, in_channels: int, dropout: float, image_size: int
    ) -> None:
        widths = [int(channels * width) for channels, _ in _BLOCKS]
        super().__init__(
            embedding_dim=widths[-1],
            num_classes=num_classes,
            feature_channels=tuple(widths[block] for block in _GROUP_ENDS),
        )
        stride = stem_stride or (1 if image_size <= _SMALL else 2)
        stem = int(_STEM_CHANNELS * width)
        self.conv = nn.Conv2d(in_channels, stem, 3, stride=stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(stem)
        self.blocks = nn.ModuleList(
            _Block(before, after, stride)
            for before, after, (_, stride) in zip([stem, *widths], widths, _BLOCKS, strict=False)
        )
        self.dropout = KeyedDropout(dropout)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor, dropout_keys: Tensor | None = None) -> Output:
        """See `Model.forward`."""
        activations = F.relu(self.bn(self.conv(images)))
        features = []
        for number, block in enumerate(self.blocks):
            normalised = block(activations)
            if number in _GROUP_ENDS:
                features.append(normalised)
            activations = F.relu(normalised)
        return self.pool_and_classify(self.dropout(activations, dropout_keys), tuple(features))


def _sizes(groups: tuple[str, ...]) -> tuple[int | float, ...]:
    width, stem = groups
    return float(Decimal(width)), int(stem or 0)


FAMILY = Family(
    form="mobilenet-WIDTH, or mobilenet-WIDTH-stem2 for a stem of stride 2 (mobilenet-0.5)",
    pattern=re.compile(r"mobilenet-((?:0|[1-9][0-9]?)(?:\.[0-9]{0,3}[1-9])?)(?:-stem([12]))?"),
    is_valid=lambda width, _: 1 / 16 <= width <= 16,
    build=MobileNet,
    min_image_size=4,
    knows_image_size=True,
    parse_sizes=_sizes,
)
