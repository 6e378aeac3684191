"""Keyed randomness: fixed streams, uniform, independent of who draws what in which order."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from refilled.keyed import derive_seed, keyed_integers, keyed_permutation, keyed_uint64, keyed_uniform

IMAGES = torch.arange(1 << 16)


def chi_square_z(draws: torch.Tensor, num_bins: int) -> float:
    """How many standard deviations the chi-square statistic of uniform [0, 1) draws lies from its mean."""
    counts = torch.bincount((draws * num_bins).long(), minlength=num_bins).double()
    expected = draws.numel() / num_bins
    statistic = ((counts - expected).square() / expected).sum().item()
    return (statistic - (num_bins - 1)) / math.sqrt(2 * (num_bins - 1))


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([first, second]))[0, 1].item()


def test_streams_are_the_ones_they_always_were() -> None:
    """Golden values: if this fails, every run of the past becomes irreproducible."""
    assert keyed_uint64(0).item() == -9076525107929867504
    assert keyed_uint64(-1, -5, 2**63).item() == 186000981616042296
    assert keyed_uint64(7, 1, torch.arange(4)).tolist() == [
        1915620798071911679,
        -6582846890868475283,
        -3556897632284713170,
        9190441211075499681,
    ]
    exact = ["0x1.c9222939ddf13p-1", "0x1.02295480b8ff4p-3", "0x1.a41df0b4079fap-1"]
    rounded = ["0x1.c922280000000p-1", "0x1.0229500000000p-3", "0x1.a41df00000000p-1"]
    assert [x.hex() for x in keyed_uniform(7, torch.arange(3)).tolist()] == exact
    assert [x.hex() for x in keyed_uniform(7, torch.arange(3), dtype=torch.float32).tolist()] == rounded
    assert keyed_integers(162, 7, torch.arange(6)).tolist() == [10, 44, 72, 76, 106, 96]
    assert keyed_permutation(8, 7, 3).tolist() == [7, 3, 1, 5, 0, 4, 6, 2]
    assert derive_seed(7) == 2757945933952484189
    assert derive_seed(7, "search", 3) == 2761836478625864206


def test_tensor_arithmetic_equals_unsigned_arithmetic() -> None:
    def mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return words ^ (words >> np.uint64(31))

    seed = np.array([5], dtype=np.uint64)
    keys = IMAGES.numpy().astype(np.uint64)
    state = mix(seed + np.uint64(0xD1B54A32D192ED03))
    expected = mix(state ^ mix(keys + np.uint64(0x9E3779B97F4A7C15)))
    np.testing.assert_array_equal(keyed_uint64(5, IMAGES).numpy(), expected.view(np.int64))


def test_integers_and_tensors_are_the_same_keys() -> None:
    ids = torch.tensor([-3, 0, 9, 2**62], dtype=torch.int64)
    by_tensor = keyed_uint64(11, ids, 4, ids, torch.tensor(8, dtype=torch.uint8))
    assert by_tensor.tolist() == [keyed_uint64(11, i, 4, i, 8).item() for i in ids.tolist()]


def test_keys_broadcast_and_are_not_changed() -> None:
    rows, columns = torch.arange(3).unsqueeze(1), torch.arange(5)
    grid = keyed_uint64(1, rows, columns)
    assert grid.shape == (3, 5)
    assert grid[2, 4] == keyed_uint64(1, 2, 4)
    assert torch.equal(rows.flatten(), torch.arange(3))
    assert torch.equal(columns, torch.arange(5))


def test_any_share_in_any_order_draws_what_the_whole_draws() -> None:
    ids = torch.arange(1000) * 37
    whole = keyed_uniform(3, 5, ids)
    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keyed_uniform(3, 5, ids[shuffled]), whole[shuffled])
    for num_workers in (2, 3, 7):
        shares = [keyed_uniform(3, 5, ids[worker::num_workers]) for worker in range(num_workers)]
        for worker, share in enumerate(shares):
            assert torch.equal(share, whole[worker::num_workers])


def test_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = (keyed_uniform(3, IMAGES), keyed_permutation(100, 3), keyed_integers(7, 3, IMAGES))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = (keyed_uniform(3, IMAGES), keyed_permutation(100, 3), keyed_integers(7, 3, IMAGES))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 1])
def test_uniform(seed: int, dtype: torch.dtype) -> None:
    draws = keyed_uniform(seed, 2, IMAGES, dtype=dtype)
    assert draws.dtype == dtype
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(chi_square_z(draws, 256)) < 4
    assert abs(draws.mean().item() - 0.5) < 4 * math.sqrt(1 / 12 / IMAGES.numel())
    assert abs(correlation(draws[1:], draws[:-1])) < 4 / math.sqrt(IMAGES.numel())


def test_low_and_high_bits_are_uniform() -> None:
    bits = keyed_uint64(4, IMAGES)
    ones = torch.stack([((bits >> place) & 1).double().mean() for place in range(64)])
    assert (ones - 0.5).abs().max() < 4.5 * 0.5 / math.sqrt(IMAGES.numel())


def test_epochs_seeds_and_layers_are_independent() -> None:
    base = keyed_uniform(1, 2, IMAGES)
    others = [keyed_uniform(1, 3, IMAGES), keyed_uniform(2, 2, IMAGES), keyed_uniform(2, 1, IMAGES)]
    others += [keyed_uniform(1, IMAGES), keyed_uniform(1, IMAGES, 2), keyed_uniform(1, 2, IMAGES, 0)]
    for other in others:
        assert (base != other).float().mean() > 0.999
        assert abs(correlation(base, other)) < 4 / math.sqrt(IMAGES.numel())
    epochs = keyed_uniform(1, torch.arange(256).unsqueeze(1), torch.arange(256))
    assert abs(chi_square_z(epochs[:, 0], 16)) < 4  # one image through the epochs
    pairs = (epochs[1:] * 16).long() * 16 + (epochs[:-1] * 16).long()  # joint law of neighbouring epochs
    assert abs(chi_square_z((pairs.flatten() + 0.5) / 256, 256)) < 4


def test_seed_and_key_are_not_interchangeable() -> None:
    grid = keyed_uint64(0, torch.arange(64).unsqueeze(1), torch.arange(64))
    assert grid.unique().numel() == 64 * 64
    by_seed = torch.stack([keyed_uint64(seed, torch.arange(64)) for seed in range(64)])
    assert by_seed.unique().numel() == 64 * 64


@pytest.mark.parametrize("high", [1, 2, 162, 2**40])
def test_integers(high: int) -> None:
    draws = keyed_integers(high, 9, IMAGES)
    assert draws.dtype == torch.int64
    assert draws.min() >= 0
    assert draws.max() < high
    if high == 162:
        assert abs(chi_square_z((draws + 0.5) / high, high)) < 4


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_permutation_holds_every_place_once(n: int) -> None:
    order = keyed_permutation(n, 5, 0)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(n))


def test_permutations_are_uniform_and_differ_by_epoch() -> None:
    orders = torch.stack([keyed_permutation(4, 8, epoch) for epoch in range(2400)])
    codes = (orders * torch.tensor([64, 16, 4, 1])).sum(dim=1)
    counts = torch.unique(codes, return_counts=True)[1].double()
    assert counts.numel() == 24
    assert ((counts - 100).square() / 100).sum() < 23 + 4 * math.sqrt(46)


def test_derived_seeds_are_distinct_and_in_range() -> None:
    seeds = [derive_seed(0), derive_seed(1), derive_seed(0, "a"), derive_seed(0, "b"), derive_seed(0, "1")]
    seeds += [
        derive_seed(0, 1),
        derive_seed(0, "ab", "c"),
        derive_seed(0, "a", "bc"),
        derive_seed(0, "λ"),
        derive_seed(-1),
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(derive_seed(0, i) for i in range(100)))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="integer tensors"):
        keyed_uint64(0, torch.zeros(3))
    with pytest.raises(TypeError, match="integer tensors"):
        keyed_uint64(0, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="dtype must be"):
        keyed_uniform(0, IMAGES, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="high must be"):
        keyed_integers(0, 0, IMAGES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_the_same_bits() -> None:
    assert torch.equal(keyed_uint64(3, 1, IMAGES.cuda()).cpu(), keyed_uint64(3, 1, IMAGES))
    assert torch.equal(keyed_uniform(3, IMAGES.cuda()).cpu(), keyed_uniform(3, IMAGES))
    assert torch.equal(keyed_permutation(5000, 3, 1, device="cuda").cpu(), keyed_permutation(5000, 3, 1))
