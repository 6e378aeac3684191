"""How a contract finds what it tests, and how it compares numbers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from refilled.config import Sources
from refilled.methods import is_users
from refilled.user_code import read_source


def located(name: str, test: type) -> str:
    """A name with the path as it can be read: relative paths are looked up beside the test's file first."""
    if not is_users(name):
        return name
    path, _, attribute = name.rpartition(":")
    beside = Path(inspect.getfile(test)).parent / path
    return f"{beside}:{attribute}" if beside.exists() else name


def sources_of(name: str) -> Sources:
    """The text of the file that a located name names; nothing for the package's own."""
    return read_source(name, "the tested name") if is_users(name) else Sources()


def differing(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, tolerance: float = 0.0) -> list[str]:
    """Names of tensors that differ, or that one side lacks.

    Args:
        found: Tensors by name.
        expected: Likewise.
        tolerance: Relative to the largest entry of each tensor.
    """
    both = found.keys() & expected.keys()
    odd = set(found.keys() ^ expected.keys())
    return sorted(odd | {name for name in both if not _is_close(found[name], expected[name], tolerance)})


def _is_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    largest = expected.nan_to_num().abs().max().item() if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=0.0, atol=tolerance * max(largest, 1e-3), equal_nan=True)
