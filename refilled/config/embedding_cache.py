"""Whether the teacher's embeddings are kept, how precisely, and how much room they may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from refilled.config.base import Config
from refilled.config.fields import PositiveFloat

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class EmbeddingCacheConfig(Config):
    """Teacher embeddings of every (training image, view), computed once and shared by all runs that need the same."""

    _prefix = "embedding_cache."
    mode: Literal["auto", "cached", "live"] = "auto"
    """cached: compute it or wait for it; live: the teacher runs in every step; auto: what asks less of the teacher."""
    dtype: Literal["float16", "float32"] = "float16"
    """What teacher embeddings are rounded to, cached and live alike, so that the mode does not change a number."""
    max_gib: PositiveFloat = 20.0
    """Most room that all embedding caches in the storage may take, in GiB; the least recently used go first."""

    @property
    def max_bytes(self) -> int:
        """`max_gib` in bytes."""
        return int(self.max_gib * GIB)
