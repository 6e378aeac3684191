from __future__ import annotations

import pytest
import torch

from refilled.config import ViewConfig
from refilled.data.views import Views


def _one_view(image: torch.Tensor, view: int, padding: int) -> torch.Tensor:
    """One view by slicing, the slow way: [C, H, W]."""
    crops = 2 * padding + 1
    flip, dy, dx = view // crops**2, view // crops % crops, view % crops
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=image.dtype)
    padded[:, padding : padding + height, padding : padding + width] = image
    crop = padded[:, dy : dy + height, dx : dx + width]
    return crop.flip(-1) if flip else crop


@pytest.mark.parametrize(("padding", "flip", "count"), [(4, True, 162), (1, False, 9), (0, True, 2), (0, False, 1)])
def test_every_view_of_every_image_equals_slicing(padding: int, flip: bool, count: int) -> None:
    views = Views(ViewConfig(padding=padding, flip=flip))
    assert sorted(views.view_ids.tolist()) == list(range(count))
    image = torch.randint(0, 256, (3, 7, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rendered = views.render(image.expand(count, -1, -1, -1), torch.arange(count))
    for view in range(count):
        assert torch.equal(rendered[view], _one_view(image, view, padding))


def test_plain_view_is_the_image() -> None:
    views = Views(ViewConfig(padding=4, num_views=1))
    image = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert views.view_ids.tolist() == [views.plain]
    assert torch.equal(views.render(image, views.view_ids.expand(2)), image)


def test_draw_depends_on_seed_epoch_and_image_alone() -> None:
    views = Views(ViewConfig())
    ids = torch.arange(1000)
    drawn = views.draw(ids, seed=1, epoch=2)
    some = torch.tensor([500, 3, 999])
    assert torch.equal(views.draw(some, seed=1, epoch=2), drawn[some])
    for other in (views.draw(ids, seed=2, epoch=2), views.draw(ids, seed=1, epoch=3)):
        assert (other == drawn).float().mean() < 0.05  # 1/162 by chance
    counts = torch.bincount(drawn, minlength=162)
    assert len(counts) == 162
    assert counts.max() < 30  # 6.2 expected


def test_few_views_are_spread_over_crops_and_flips() -> None:
    views = Views(ViewConfig(padding=4, flip=True, num_views=16))
    ids = views.view_ids
    assert len(set(ids.tolist())) == 16
    assert 4 <= int((ids >= 81).sum()) <= 12
    assert len({int(view) // 9 % 9 for view in ids}) >= 6
    drawn = views.draw(torch.arange(500), seed=0, epoch=0)
    assert set(drawn.tolist()) == set(ids.tolist())
