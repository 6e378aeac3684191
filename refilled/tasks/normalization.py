"""What a network sees of pixels: how large, and scaled by which mean and standard deviation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from refilled.data.pixels import Pixels, chunks


@dataclass(frozen=True)
class Normalization:
    """What a network sees of pixels: how large, and scaled by which mean and standard deviation.

    Attributes:
        mean: Of each channel, pixels in [0, 1], float64 [C].
        std: Likewise, the standard deviation.
        size: Height and width to which images are resized first (bicubic, with antialiasing); none: as they are.
    """

    mean: Tensor
    std: Tensor
    size: int | None = None

    def apply(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Scale uint8 [B, C, H, W] to zero mean and unit variance a channel, in the memory format it has.

        Grey images become as many equal channels as the mean has.
        """
        if self.size is not None and tuple(images.shape[2:]) != (self.size, self.size):
            images = F.interpolate(
                images.to(dtype), (self.size, self.size), mode="bicubic", align_corners=False, antialias=True
            ).clamp_(0, 255)
        if images.shape[1] == 1 < len(self.mean):
            images = images.expand(-1, len(self.mean), -1, -1)
        mean = (self.mean * 255).to(images.device, dtype)[:, None, None]
        scale = (1 / (self.std * 255)).to(images.device, dtype)[:, None, None]
        return images.to(dtype, copy=True).sub_(mean).mul_(scale)  # in place: half the memory traffic


def measure(images: Pixels) -> Normalization:
    """Exact mean and standard deviation a channel from a histogram of the 256 levels."""
    num_channels = images.shape[1]
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = torch.empty(num_channels, dtype=torch.float64), torch.empty(num_channels, dtype=torch.float64)
    histograms = torch.zeros(num_channels, 256, dtype=torch.float64)
    for chunk in chunks(images):
        for part in torch.split(chunk, 4096):  # bincount counts in int64, eight times the pixels' size
            for channel in range(num_channels):
                histograms[channel] += torch.bincount(part[:, channel].flatten(), minlength=256)
    for channel, histogram in enumerate(histograms):
        share = histogram / histogram.sum()
        mean[channel] = (share * levels).sum()
        std[channel] = (share * (levels - mean[channel]) ** 2).sum().sqrt()
    return Normalization(mean=mean, std=std.clamp_min(1e-3))  # a channel of one level has nothing to scale
