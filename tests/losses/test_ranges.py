import pytest
import torch

from refilled.losses.ranges import range_cover, range_sums


def random_ranges(size: int, longest: int, num_ranges: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    end = torch.randint(0, size + 1, (2, num_ranges), generator=generator)
    length = torch.randint(0, longest + 1, (2, num_ranges), generator=generator)
    return (end - length).clamp(min=0), end


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 31, 64])
@pytest.mark.parametrize("bound", [1, 2, 5, None])
def test_range_sums_and_their_transpose_equal_slices(size: int, bound: int | None) -> None:
    longest = min(bound or size, size)
    for seed in range(5):
        begin, end = random_ranges(size, longest, num_ranges=12, seed=seed)
        values = torch.randn(3, 2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        weights = torch.rand(3, 2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 100))
        weights = torch.where(end > begin, weights, 0.0)
        sums, cover = torch.zeros_like(weights), torch.zeros_like(values)
        for row in range(2):
            for k in range(12):
                inside = slice(int(begin[row, k]), int(end[row, k]))
                sums[:, row, k] = values[:, row, inside].sum(-1)
                cover[:, row, inside] += weights[:, row, k, None]
        torch.testing.assert_close(range_sums(values, begin, end, longest), sums, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(range_cover(weights, begin, end, longest, size), cover, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size", [1, 5, 16])
def test_ranges_without_begin_start_at_0(size: int) -> None:
    _, end = random_ranges(size, size, num_ranges=9, seed=0)
    begin = torch.zeros_like(end)
    values = torch.rand(2, 2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = torch.where(end > 0, torch.rand(2, 2, 9, dtype=torch.float64), 0.0)
    torch.testing.assert_close(range_sums(values, None, end, size), range_sums(values, begin, end, size))
    torch.testing.assert_close(
        range_cover(weights, None, end, size, size), range_cover(weights, begin, end, size, size)
    )


def test_small_terms_beside_large_ones_keep_every_digit() -> None:
    # A difference of prefix sums gives (1 + 3e-30) - 1 = 0 here.
    values = torch.tensor([[[1.0, 1e-30, 2e-30, 1.0]]], dtype=torch.float64)
    begin, end = torch.tensor([[1]]), torch.tensor([[3]])
    assert range_sums(values, begin, end, 4).item() == pytest.approx(3e-30, rel=1e-15)
    weights = torch.tensor([[[1.0, 1e-30]]], dtype=torch.float64)
    cover = range_cover(weights, torch.tensor([[0, 2]]), torch.tensor([[2, 4]]), 4, 4)
    assert cover.flatten().tolist() == [1.0, 1.0, 1e-30, 1e-30]
