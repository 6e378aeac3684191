from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

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


def _one_box(image: torch.Tensor, left: float, top: float, width: float, height: float, mirrored: bool) -> torch.Tensor:
    """A box resized to the whole by bilinear interpolation at pixel centres, loop by loop: [C, H, W]."""
    channels, rows, columns = image.shape
    out = torch.zeros(channels, rows, columns)
    for row in range(rows):
        for column in range(columns):
            across = (columns - 1 - column if mirrored else column) + 0.5
            x = min(max((left + width * across / columns) * columns - 0.5, 0), columns - 1)
            y = min(max((top + height * (row + 0.5) / rows) * rows - 0.5, 0), rows - 1)
            x0, y0 = int(x), int(y)
            x1, y1 = min(x0 + 1, columns - 1), min(y0 + 1, rows - 1)
            fx, fy = x - x0, y - y0
            upper = image[:, y0, x0] * (1 - fx) + image[:, y0, x1] * fx
            lower = image[:, y1, x0] * (1 - fx) + image[:, y1, x1] * fx
            out[:, row, column] = upper * (1 - fy) + lower * fy
    return out


def test_resized_crops_equal_bilinear_interpolation_of_their_box() -> None:
    views = Views(ViewConfig(kind="resized_crops", num_views=16))
    image = torch.randint(0, 256, (3, 11, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert views.view_ids[0] == views.plain == 0
    rendered = views.render(image.expand(16, -1, -1, -1), views.view_ids)
    assert torch.allclose(rendered[0], image.float(), atol=1e-3)
    assert views._boxes is not None
    for view, found in zip(views.view_ids.tolist(), rendered, strict=True):
        (scale_x, _, shift_x), (_, scale_y, shift_y) = views._boxes[view].tolist()
        width, height = abs(scale_x), scale_y
        left, top = (shift_x - width + 1) / 2, (shift_y - height + 1) / 2
        assert min(left, top) > -1e-6
        assert max(left + width, top + height) < 1 + 1e-6
        assert 0.18 <= width * height <= 1  # 0.25 at the least, less what is cut to the image
        expected = _one_box(image.float(), left, top, width, height, mirrored=scale_x < 0)
        assert torch.allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("kind", ["shifts", "resized_crops"])
@pytest.mark.parametrize("times", [2, 3])
def test_a_view_shows_the_same_part_of_an_image_at_another_size(kind: str, times: int) -> None:
    config = ViewConfig(kind=kind, padding=3)  # type: ignore[arg-type]  # a literal
    coarse = torch.rand(6, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * 255
    small = F.interpolate(coarse, (12, 12), mode="bilinear").byte()  # smooth, as photographs are
    large = small.repeat_interleave(times, 2).repeat_interleave(times, 3)
    view_ids = Views(config).view_ids[:6]
    plain, scaled = Views(config).render(small, view_ids), Views(config, scale=times).render(large, view_ids)
    if kind == "shifts":
        assert torch.equal(scaled, plain.repeat_interleave(times, 2).repeat_interleave(times, 3))
    else:  # boxes are interpolated: alike on the average of what a small pixel has become
        means = F.avg_pool2d(scaled, times)
        assert (means - plain).abs().mean() < 0.05 * plain.std()
