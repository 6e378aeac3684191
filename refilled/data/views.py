"""Finite augmentation: a view is one outcome of the augmentation of one image, named by a small integer.

`shifts`, for small images: view v is the crop of the zero-padded image at row offset `dy` and column offset `dx`,
mirrored or not, with v = (flip x crops + dy) x crops + dx and crops = 2 padding + 1. `resized_crops`, for larger ones:
view v is a box of the image, of random area and aspect, resized to the whole, mirrored in every other view; the box is
a function of v alone. Views are finitely many, so a frozen teacher sees only finitely many inputs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from refilled.config import ViewConfig
from refilled.keyed import derive_seed, keyed_integers, keyed_permutation, keyed_uniform


class Views:
    """Draws views by (seed, epoch, image) and renders them in batches on the images' device.

    Args:
        config: The augmentation.
        scale: Side of the images over that of the images for which the augmentation is meant: shifts are as much
            larger, rounded to pixels, so that a view shows the same part of an image at either size.

    Attributes:
        view_ids: Int64 [V], the views in use, the plain image first.
        plain: The view that is the image itself.
    """

    def __init__(self, config: ViewConfig, scale: float = 1.0) -> None:
        self._config = config
        self._scale = scale
        self._crops = 2 * config.padding + 1
        self.plain = config.padding * self._crops + config.padding if config.kind == "shifts" else 0
        shuffled = keyed_permutation(config.most, derive_seed(0, "list of views"))
        plain_first = torch.cat([torch.tensor([self.plain]), shuffled[shuffled != self.plain]])
        self.view_ids: Tensor = plain_first if config.num_views is None else plain_first[: config.num_views]
        self._boxes = _boxes(config) if config.kind == "resized_crops" else None

    def draw(self, image_ids: Tensor, *, seed: int, epoch: int) -> Tensor:
        """A view for every image, a function of (seed, epoch, image) alone.

        Args:
            image_ids: Int64 [B], positions in the training set.
            seed: The run's.
            epoch: Number of the epoch over both stages.

        Returns:
            View ids, int64 [B].
        """
        self.view_ids = self.view_ids.to(image_ids.device)
        return self.view_ids[keyed_integers(len(self.view_ids), derive_seed(seed, "views"), epoch, image_ids)]

    def render(self, images: Tensor, view_ids: Tensor) -> Tensor:
        """The named views of a batch.

        Args:
            images: Uint8 [B, C, H, W].
            view_ids: Int64 [B].

        Returns:
            [B, C, H, W] on the scale of the input: uint8 of `shifts`, where pixels outside the image are 0, and
            float32 of `resized_crops`, which interpolates.
        """
        if self._boxes is None:
            return self._shift(images, view_ids)
        self._boxes = self._boxes.to(images.device)
        grid = F.affine_grid(self._boxes[view_ids], list(images.shape), align_corners=False)
        return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)

    def _shift(self, images: Tensor, view_ids: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        dx = view_ids % self._crops
        dy = view_ids // self._crops % self._crops
        mirrored = view_ids >= self._crops**2
        padding = self._config.padding
        if self._scale != 1:
            offsets = torch.arange(self._crops, dtype=torch.float64, device=images.device)
            moved = ((offsets - padding) * self._scale).round().long()
            padding = int(moved.max())
            dy, dx = moved[dy] + padding, moved[dx] + padding
        padded = F.pad(images.permute(0, 2, 3, 1).contiguous(), [0, 0, padding, padding, padding, padding])
        # Every crop of every image without a copy, [B, crops, crops, C, H, W]; picking one a picture copies whole rows
        # and takes half the time of indexing pixels. The memory stays channels-last.
        crops = padded.unfold(1, height, 1).unfold(2, width, 1)
        chosen = crops[torch.arange(len(images), device=images.device), dy, dx]
        return torch.where(mirrored[:, None, None, None], chosen.flip(-1), chosen)


def _boxes(config: ViewConfig) -> Tensor:
    """The map of every view from output to input coordinates in [-1, 1], float32 [V, 2, 3].

    Areas are uniform in [min_area, 1] of the image, aspects log-uniform in [3/4, 4/3], cut to the image, as in torch's
    RandomResizedCrop; view 0 is the whole image.
    """
    views = torch.arange(config.most)
    seed = derive_seed(0, "boxes of views")
    area, log_aspect, x, y = (keyed_uniform(seed, number, views) for number in range(4))
    area = config.min_area + (1 - config.min_area) * area
    aspect = torch.exp((2 * log_aspect - 1) * math.log(4 / 3))
    width = (area * aspect).sqrt().clamp(max=1)
    height = (area / aspect).sqrt().clamp(max=1)
    width[0] = height[0] = 1
    sign = torch.where(views % 2 == 1, -1.0, 1.0) if config.flip else torch.ones(len(views))
    boxes = torch.zeros(len(views), 2, 3, dtype=torch.float64)
    boxes[:, 0, 0], boxes[:, 0, 2] = width * sign, (2 * x - 1) * (1 - width)
    boxes[:, 1, 1], boxes[:, 1, 2] = height, (2 * y - 1) * (1 - height)
    return boxes.float()
