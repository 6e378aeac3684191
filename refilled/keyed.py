"""Randomness as a pure function of integer keys.

A draw is a hash of (seed, keys), never the next number of a stream. So whoever draws for image 17 in epoch 3 draws the
same number, however many workers share the images and in whichever order they come. Only wrapping 64-bit integer
arithmetic is used: the bits are equal on every device and in every version of torch.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_WORD = (1 << 64) - 1


def _signed(word: int) -> int:
    """The int64 with the bits of the last 64 bits of `word`."""
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word


# The finaliser of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), variant 13.
_SHIFTS = (30, 27, 31)
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
# Seeds and keys start from different offsets, so that (seed 1, key 2) and (seed 2, key 1) are different draws.
_SEED_OFFSET = 0xD1B54A32D192ED03
_KEY_OFFSET = 0x9E3779B97F4A7C15


def _mix_int(word: int) -> int:
    """A bijection of 64-bit words in which every output bit depends on every input bit; unsigned in and out."""
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        word = ((word ^ (word >> shift)) * multiplier) & _WORD
    return word ^ (word >> _SHIFTS[-1])


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical right shift: torch's `>>` copies the sign bit in, the mask takes it out again."""
    return (bits >> count).bitwise_and_((1 << (64 - count)) - 1)


def _mix_(bits: Tensor) -> Tensor:
    """`_mix_int` on a tensor, in place: the tensors are as large as activations where dropout is drawn."""
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        bits.bitwise_xor_(_shift_right(bits, shift)).mul_(_signed(multiplier))
    return bits.bitwise_xor_(_shift_right(bits, _SHIFTS[-1]))


def keyed_uint64(seed: int, *keys: Tensor | int) -> Tensor:
    """64 random bits for every combination of keys.

    Args:
        seed: Any integer; its last 64 bits count.
        keys: Integers or integer tensors, broadcast against each other. Their order and number matter.

    Returns:
        Int64 tensor of the broadcast shape of the keys (0-dimensional, on the CPU, if all are Python integers), to be
        read as 64 bits: half of the values are negative. For fixed other keys it is a bijection of any one key, so
        different keys never share a value.

    Raises:
        TypeError: A key is a tensor that does not hold integers.
    """
    state: int | Tensor = _mix_int((seed + _SEED_OFFSET) & _WORD)
    for key in keys:
        if isinstance(key, Tensor):
            if key.is_floating_point() or key.is_complex() or key.dtype == torch.bool:
                raise TypeError(f"keys must be integer tensors, not {key.dtype}")
            mixed = _mix_(key.to(torch.int64) + _signed(_KEY_OFFSET))
            state = _mix_(mixed ^ (_signed(state) if isinstance(state, int) else state))
        else:
            word = _mix_int((key + _KEY_OFFSET) & _WORD)
            state = _mix_int(state ^ word) if isinstance(state, int) else _mix_(state ^ _signed(word))
    return torch.tensor(_signed(state), dtype=torch.int64) if isinstance(state, int) else state


def keyed_uniform(seed: int, *keys: Tensor | int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Uniform numbers in [0, 1): multiples of 2^-53 (float64) or of 2^-24 (float32), so 1 is never reached.

    Args:
        seed: See `keyed_uint64`.
        keys: See `keyed_uint64`.
        dtype: Float64 or float32.

    Returns:
        Tensor of `dtype`, of the broadcast shape of the keys.

    Raises:
        ValueError: `dtype` is another one.
    """
    if dtype not in (torch.float64, torch.float32):
        raise ValueError(f"dtype must be torch.float64 or torch.float32, not {dtype}")
    num_bits = 53 if dtype == torch.float64 else 24
    return _shift_right(keyed_uint64(seed, *keys), 64 - num_bits).to(dtype).mul_(2.0**-num_bits)


def keyed_integers(high: int, seed: int, *keys: Tensor | int) -> Tensor:
    """Uniform integers in [0, high), as int64; the remainder's bias is below high / 2^63.

    Args:
        high: The exclusive upper bound, at least 1.
        seed: See `keyed_uint64`.
        keys: See `keyed_uint64`.

    Returns:
        Int64 tensor of the broadcast shape of the keys.

    Raises:
        ValueError: `high` is below 1.
    """
    if high < 1:
        raise ValueError(f"high must be at least 1, not {high}")
    return _shift_right(keyed_uint64(seed, *keys), 1).remainder_(high)


def keyed_permutation(n: int, seed: int, *keys: int, device: torch.device | str | None = None) -> Tensor:
    """A random order of 0 .. n-1: the places 0 .. n-1 sorted by their keyed bits, which are all different.

    Args:
        n: Length, at least 0.
        seed: See `keyed_uint64`.
        keys: Integers, for example the epoch.
        device: Where the result lies; the numbers are the same everywhere.

    Returns:
        Int64 [n].
    """
    places = torch.arange(n, dtype=torch.int64, device=device)
    return torch.argsort(keyed_uint64(seed, *keys, places), stable=True)


def derive_seed(seed: int, *names: int | str) -> int:
    """A seed of its own for a named purpose, so that two purposes never share their draws.

    Args:
        seed: The seed it comes from.
        names: What it is for; 1 and "1" are different names, and so are ("ab", "c") and ("a", "bc").

    Returns:
        Integer in [0, 2^63): the first 63 bits of a SHA-256.
    """
    parts = [f"i{int(name)};" if isinstance(name, int) else f"s{len(name)}:{name};" for name in (seed, *names)]
    return int.from_bytes(hashlib.sha256("".join(parts).encode()).digest()[:8], "big") >> 1
