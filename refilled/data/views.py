"""Finite augmentation: a view is one outcome of the augmentation of one image, named by a small integer.

View v of an image is the crop of the zero-padded image at row offset `dy` and column offset `dx`, mirrored or not, with
v = (flip x crops + dy) x crops + dx and crops = 2 padding + 1. The views are finitely many (162 for padding 4 with
flips), so a frozen teacher sees only finitely many inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refilled.config import ViewConfig
from refilled.keyed import derive_seed, keyed_integers, keyed_permutation


class Views:
    """Draws views by (seed, epoch, image) and renders them in batches on the images' device."""

    def __init__(self, config: ViewConfig) -> None:
        """Fix the list of views in use: all of them, or the plain one and `num_views` - 1 drawn once and for all."""
        self._padding = config.padding
        self._crops = 2 * config.padding + 1
        shuffled = keyed_permutation(config.most, derive_seed(0, "list of views"))
        plain_first = torch.cat([torch.tensor([self.plain]), shuffled[shuffled != self.plain]])
        self.view_ids: Tensor = plain_first if config.num_views is None else plain_first[: config.num_views]

    @property
    def plain(self) -> int:
        """The view that is the image itself."""
        return self._padding * self._crops + self._padding

    def draw(self, image_ids: Tensor, *, seed: int, epoch: int) -> Tensor:
        """A view for every image, a function of (seed, epoch, image) alone.

        Args:
            image_ids: int64 [B], positions in the training set.
            seed: the run's.
            epoch: number of the epoch over both stages.

        Returns:
            View ids, int64 [B].
        """
        chosen = keyed_integers(len(self.view_ids), derive_seed(seed, "views"), epoch, image_ids)
        return self.view_ids.to(image_ids.device)[chosen]

    def render(self, images: Tensor, view_ids: Tensor) -> Tensor:
        """The named views of a batch.

        Args:
            images: [B, C, H, W], any dtype.
            view_ids: int64 [B].

        Returns:
            [B, C, H, W] of the same dtype; pixels outside the image are 0.
        """
        height, width = images.shape[-2:]
        dx = view_ids % self._crops
        dy = view_ids // self._crops % self._crops
        mirrored = view_ids >= self._crops**2
        padded = torch.nn.functional.pad(images, [self._padding] * 4)
        columns = torch.arange(width, device=images.device)
        columns = torch.where(mirrored[:, None], width - 1 - columns, columns) + dx[:, None]
        rows = torch.arange(height, device=images.device) + dy[:, None]
        batch = torch.arange(len(images), device=images.device)[:, None, None]
        # Advanced indices around a slice come first: [B, H, W, C], which is channels-last memory seen as [B, C, H, W].
        return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
