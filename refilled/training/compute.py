"""Where and how precisely a run computes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from refilled.config import Precision
from refilled.models import Output
from refilled.tasks.normalization import Normalization

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True)
class Compute:
    """A device and a precision: prepares models and batches, and runs models under the right casts.

    bfloat16 means autocast over float32 weights and channels-last memory; float32 and float64 are plain.
    """

    device: torch.device
    precision: Precision

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and of normalised images."""
        return torch.float64 if self.precision == "float64" else torch.float32

    @property
    def memory_format(self) -> torch.memory_format:
        """Layout of images and convolution weights."""
        return torch.channels_last if self.precision == "bfloat16" else torch.contiguous_format

    def place_model(self, model: ModelT) -> ModelT:
        """Move a model to the device in the precision's type and memory layout."""
        return model.to(self.device, self.dtype).to(memory_format=self.memory_format)

    def place_images(self, images: Tensor, normalization: Normalization) -> Tensor:
        """Normalise uint8 [B, C, H, W] on the device."""
        scaled = normalization.apply(images.to(self.device, non_blocking=True), self.dtype)
        return scaled.contiguous(memory_format=self.memory_format)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context in which models run forward."""
        if self.precision == "bfloat16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def forward(self, model: Callable[..., Output], images: Tensor, dropout_keys: Tensor | None = None) -> Output:
        """Run a model, or what it was compiled to, on normalised images."""
        with self.autocast():
            return model(images, dropout_keys)
