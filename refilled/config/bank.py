"""The teacher bank: whether teacher embeddings are kept, how precisely, and how much room they may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from refilled.config.base import Config, is_positive, require

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class BankConfig(Config):
    """Teacher embeddings of every (training image, view), computed once and shared by all runs that need the same."""

    mode: Literal["auto", "bank", "live"] = "auto"
    """bank: build it or wait for it; live: the teacher runs every step; auto: whichever asks less of the teacher."""
    dtype: Literal["float16", "float32"] = "float16"
    """What teacher embeddings are rounded to, from the bank and live alike, so the mode does not change a number."""
    max_gib: float = 20.0
    """Most room that all banks in the storage folder may take, in GiB; the least recently used go first."""

    def __post_init__(self) -> None:
        """Check every field."""
        require(self.mode in ("auto", "bank", "live"), "bank.mode", "auto, bank or live", self.mode)
        require(self.dtype in ("float16", "float32"), "bank.dtype", "float16 or float32", self.dtype)
        require(is_positive(self.max_gib), "bank.max_gib", "above 0", self.max_gib)

    @property
    def max_bytes(self) -> int:
        """`max_gib` in bytes."""
        return int(self.max_gib * GIB)
