"""The embedding cache: the frozen teacher's embeddings of every (training image, view), computed once.

The teacher is frozen and views are finitely many, so what it says can be looked up: for all epochs, both stages, all
students and all trials that share teacher and images. A cache is an artifact, found by the content hash of what
determines it, mapped into memory, and shared by all processes of a machine.

A run without a cache asks the teacher in every step and rounds what it says to the cache's type, so a run's numbers do
not depend on whether it found one. What is left are the last bits of a convolution whose result depends on the size of
the batch; on a CPU it was not seen to, for two images or more.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refilled import distributed
from refilled.config import RunConfig, content_hash
from refilled.config.embedding_cache import GIB
from refilled.data.views import Views
from refilled.errors import UserError
from refilled.shared_caches import epochs_with_teacher, pays
from refilled.storage import Artifact, Kind, Storage
from refilled.tasks.classification import Task, load_task
from refilled.teacher import FrozenTeacher, input_identity, load_network
from refilled.training.compute import Compute

EMBEDDINGS = Kind("embeddings")
FORMAT = 1  # part of every cache's identity: raise it when the rows or their order change
BATCH_SIZE = 512  # images a teacher's forward pass while building
ROWS = "embeddings.bin"  # little-endian [N, V, D]

_Rows = np.ndarray[Any, np.dtype[Any]]
_log = logging.getLogger(__name__)


class EmbeddingCache:
    """A finished cache, looked up by image and view.

    On a GPU the rows lie in its memory where they fit into a third of what is free, so that other trials on it may do
    the same; else they are gathered on the host, batch by batch.

    Args:
        artifact: Kept as long as this is, so that it is not deleted meanwhile.
        layout: Layout of its rows.
        view_ids: Int64 [V], the views it holds.
        compute: Device and precision.
    """

    def __init__(self, artifact: Artifact, layout: Layout, view_ids: Tensor, compute: Compute) -> None:
        self._artifact = artifact
        self._rows = np.memmap(artifact.path / ROWS, layout.numpy_dtype, "r", shape=(layout.num_rows, layout.dim))
        self._compute = compute
        self._num_views = len(view_ids)
        positions = torch.full((int(view_ids.max()) + 1,), -(2**62))  # a view that is not kept has no row anywhere
        positions[view_ids] = torch.arange(len(view_ids))
        self._positions = positions.to(compute.device)
        self._device_rows = self._copy_to_device() if compute.device.type == "cuda" else None

    def embed(self, image_ids: Tensor, view_ids: Tensor) -> Tensor:
        """Embeddings [B, D] on the run's device and in its type.

        Args:
            image_ids: Int64 [B], positions in the training set, on the run's device.
            view_ids: Int64 [B], views in use, on the run's device.

        Raises:
            IndexError: An image or view is not in the cache (on a GPU a failed assertion of the device).
        """
        index = image_ids * self._num_views + self._positions[view_ids]
        if self._device_rows is not None:
            return self._device_rows.index_select(0, index).to(self._compute.dtype)
        pinned = self._compute.device.type == "cuda"  # torch does not hand out pinned memory whose copy is under way
        found = torch.empty(len(index), self._rows.shape[1], dtype=self._torch_dtype, pin_memory=pinned)
        np.take(self._rows, index.cpu().numpy(), axis=0, out=found.numpy())
        return found.to(self._compute.device, non_blocking=True).to(self._compute.dtype)

    @property
    def _torch_dtype(self) -> torch.dtype:
        return torch.float16 if self._rows.dtype.itemsize == 2 else torch.float32

    def _copy_to_device(self) -> Tensor | None:
        free, _ = torch.cuda.mem_get_info(self._compute.device)
        if 3 * self._rows.nbytes > free:
            return None
        copy = torch.empty(self._rows.shape, dtype=self._torch_dtype, device=self._compute.device)
        step = 2**16
        for start in range(0, len(copy), step):  # in parts, so that the host never holds the whole a second time
            copy[start : start + step] = torch.from_numpy(self._rows[start : start + step].copy())
        return copy


@dataclass(frozen=True)
class Layout:
    """What a cache's rows look like.

    Attributes:
        num_images: N.
        num_views: V.
        dim: D.
        dtype: Type of the stored numbers.
    """

    num_images: int
    num_views: int
    dim: int
    dtype: str

    @property
    def num_rows(self) -> int:
        """N x V; row i x V + v is the v-th view of image i."""
        return self.num_images * self.num_views

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Little-endian, whatever machine wrote it."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def num_bytes(self) -> int:
        """Size of the rows."""
        return self.num_rows * self.dim * self.numpy_dtype.itemsize


def is_cached(config: RunConfig, storage: Storage) -> bool:
    """Whether the cache of a run is there, whose teacher is."""
    task = load_task(config, storage)
    network, identity = load_network(config, task, storage)
    layout = layout_of(config, task, network.embedding_dim)
    return storage.artifacts.open(EMBEDDINGS, _key(config, task, identity, layout)) is not None


def embedding_cache(
    config: RunConfig,
    task: Task,
    teacher: FrozenTeacher,
    storage: Storage,
    compute: Compute,
    *,
    is_wanted: bool | None = None,
) -> EmbeddingCache | None:
    """The cache of a run, found or built, or none where the teacher is to run in every step.

    Where the storage has no room the run goes on without, and says so.

    Args:
        config: The run's configuration.
        task: Its images.
        teacher: Frozen.
        storage: Where caches are kept.
        compute: Device and precision.
        is_wanted: Whether to build a cache that is not there, and to wait for others who do; none: where it pays for
            this run alone, without waiting.

    Raises:
        UserError: The mode asks for a cache that alone is larger than all may be, or numbers of the teacher are too
            large for its type.
    """
    if config.embedding_cache.mode == "live":
        return None
    layout = layout_of(config, task, teacher.embedding_dim)
    key = _key(config, task, teacher.identity, layout)
    max_bytes = config.embedding_cache.max_bytes
    waits = is_wanted or config.embedding_cache.mode == "cached"
    if is_wanted is None:
        is_wanted = pays(config, epochs_with_teacher(config))
    artifact = None
    if is_wanted and _has_room(config, layout):
        build, reserve = _Builder(config, task, teacher, compute, layout).write, {ROWS: layout.num_bytes}
        try:
            artifact = storage.artifacts.make(EMBEDDINGS, key, build, wait=waits, reserve=reserve, max_bytes=max_bytes)
        except OSError as error:
            reason = error.strerror or error
            _log.warning("Embedding cache %s cannot be kept (%s): the teacher runs in every step.", key, reason)
        else:
            if artifact is None:
                _log_once(f"Embedding cache {key} is being computed elsewhere: the teacher runs in every step.")
    else:
        artifact = storage.artifacts.open(EMBEDDINGS, key, max_bytes=max_bytes)
    return None if artifact is None else EmbeddingCache(artifact, layout, Views(config.views).view_ids, compute)


def layout_of(config: RunConfig, task: Task, dim: int) -> Layout:
    """Of a run's cache, for a teacher of D = `dim`."""
    return Layout(len(task.train), len(Views(config.views).view_ids), dim, config.embedding_cache.dtype)


def _key(config: RunConfig, task: Task, teacher: str, layout: Layout) -> str:
    """The hash of all that determines a cache's bytes."""
    shape = {"shape": [layout.num_images, layout.num_views, layout.dim], "dtype": layout.dtype}
    views = [config.views.to_dict(), Views(config.views).view_ids.tolist()]
    return content_hash([FORMAT, teacher, task.train.digest, *views, config.precision, shape, *input_identity(task)])


def _has_room(config: RunConfig, layout: Layout) -> bool:
    """Whether one cache is at most as large as all may be.

    Raises:
        UserError: It is larger, and the mode asks for it.
    """
    if layout.num_bytes <= config.embedding_cache.max_bytes:
        return True
    requirement = (
        f"embedding_cache.max_gib must be at least {math.ceil(1000 * layout.num_bytes / GIB) / 1000} for "
        f"{layout.num_images} images x {layout.num_views} views x {layout.dim} numbers of {layout.dtype}, got "
        f"{config.embedding_cache.max_gib}"
    )
    if config.embedding_cache.mode == "cached":
        raise UserError(f"{requirement}.")
    _log_once(f"{requirement}: the teacher runs in every step.")
    return False


class _Builder:
    """Fills a cache, all workers of a group together.

    The batches are the same for any number of workers, and so are the bytes.
    """

    def __init__(self, config: RunConfig, task: Task, teacher: FrozenTeacher, compute: Compute, layout: Layout) -> None:
        self._task, self._teacher, self._compute, self._layout = task, teacher, compute, layout
        self._views = Views(config.views)

    def write(self, folder: Path | None) -> Mapping[str, Any]:
        """Compute the rows on all workers; the one that has the folder writes them."""
        num_rows, world_size = self._layout.num_rows, distributed.world_size()
        num_batches = math.ceil(num_rows / BATCH_SIZE)
        # Of even size: a last batch of a single image might be convolved differently.
        borders = [num_rows * batch // num_batches for batch in range(num_batches + 1)]
        failure: OSError | None = None
        started_s = time.perf_counter()
        with (Path(os.devnull) if folder is None else folder / ROWS).open("r+b") as file:
            for first in range(0, num_batches, world_size):
                ends = [borders[min(first + rank, num_batches)] for rank in range(world_size + 1)]
                start, stop = ends[distributed.rank()], ends[distributed.rank() + 1]
                rows = self._rows(torch.arange(start, stop, device=self._compute.device))
                gathered = distributed.gather_rows(rows, [after - before for before, after in itertools.pairwise(ends)])
                if not torch.isfinite(gathered).all():
                    raise UserError(
                        "embedding_cache.dtype must be float32, because float16 cannot hold this teacher's embeddings."
                    )
                try:
                    if failure is None:
                        file.write(
                            gathered.cpu().contiguous().numpy().astype(self._layout.numpy_dtype, copy=False).data
                        )
                except OSError as error:  # raised when the others do not wait in a collective
                    failure = error
        if failure is not None:
            raise failure
        size, took_s = self._layout.num_bytes / GIB, time.perf_counter() - started_s
        _log_once(f"Embedding cache is computed: {num_rows} rows, {size:.3f} GiB in {took_s:.1f} s.")
        return {
            "format": FORMAT,
            "teacher": self._teacher.identity,
            "train_digest": self._task.train.digest,
            "shape": [self._layout.num_images, self._layout.num_views, self._layout.dim],
            "dtype": self._layout.dtype,
            "views": self._views.view_ids.tolist(),
            "precision": self._compute.precision,
            "torch": torch.__version__,
            "numpy": np.__version__,
        }

    def _rows(self, index: Tensor) -> Tensor:
        """Rows by their numbers, int64 [B], as the teacher says them in a step: [B, D] in the cache's type."""
        dtype = getattr(torch, self._layout.dtype)
        if len(index) == 0:  # of the last batches, which not all workers have
            return torch.empty(0, self._layout.dim, dtype=dtype, device=index.device)
        image_ids = index.div(self._layout.num_views, rounding_mode="floor")
        view_ids = self._views.view_ids.to(index.device)[index % self._layout.num_views]
        return self._teacher.embed_live(self._teacher.images(image_ids, view_ids)).to(dtype)


def _log_once(sentence: str) -> None:
    """Log a sentence once for a group."""
    if distributed.rank() == 0:
        _log.info(sentence)
