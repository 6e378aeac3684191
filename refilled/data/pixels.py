"""Pixels in memory, or in the file of decoded images, from which they are gathered batch by batch and one batch ahead.

Both give the same bytes for the same index, so a run's numbers do not depend on where its images lie.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CHUNK_BYTES = 2**26  # read at once where a whole set is passed over


class StoredPixels:
    """Some images of a file, uint8 [N, C, H, W], read when they are asked for.

    They are read into new memory, not mapped: mapped pages would count as the process's own, as many as are touched.

    Args:
        path: An `.npy` file of uint8 [M, C, H, W] in C order.
        rows: Int64 [N], which of its M images, in which order; none: all.
    """

    dtype = torch.uint8
    device = torch.device("cpu")

    def __init__(self, path: Path, rows: Tensor | None = None) -> None:
        whole = np.load(path, mmap_mode="r", allow_pickle=False)
        assert whole.dtype == np.uint8
        assert whole.flags.c_contiguous
        self._path, self._first_byte = path, int(whole.offset)
        self._file = os.open(path, os.O_RDONLY)
        self._rows = torch.arange(len(whole)) if rows is None else rows
        self.shape = torch.Size((len(self._rows), *whole.shape[1:]))
        self._ahead: deque[tuple[Tensor, Future[Tensor]]] = deque(maxlen=2)  # the present batch and the next
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gather-images")

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def __len__(self) -> int:
        return len(self._rows)

    def dim(self) -> int:
        """Number of dimensions, 4."""
        return len(self.shape)

    def select(self, index: Tensor) -> StoredPixels:
        """Some of the images, still in the file."""
        return StoredPixels(self._path, self._rows[index])

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Images [B, C, H, W] in memory, by int64 [B] or a slice."""
        wanted = torch.arange(len(self))[index] if isinstance(index, slice) else index.cpu()
        for expected in list(self._ahead):
            if torch.equal(expected[0], wanted):
                self._ahead.remove(expected)
                return expected[1].result()
        return self._gathered(wanted)

    def expect(self, index: Tensor) -> None:
        """Gather in the background what will be asked for next."""
        wanted = index.cpu()
        self._ahead.append((wanted, self._thread.submit(self._gathered, wanted)))

    def chunks(self) -> Iterator[Tensor]:
        """All images in order, as many at a time as take `CHUNK_BYTES`."""
        at_once = max(1, CHUNK_BYTES // self.shape[1:].numel())
        for start in range(0, len(self), at_once):
            yield self[start : start + at_once]

    def _gathered(self, index: Tensor) -> Tensor:
        """An image that is asked for several times, as in several views, is read once."""
        wanted, places = np.unique(self._rows[index].numpy(), return_inverse=True)
        size = self.shape[1:].numel()
        found = np.empty((len(wanted), size), dtype=np.uint8)
        starts = np.flatnonzero(np.diff(wanted, prepend=-2) != 1).tolist()  # of runs of neighbours, which are one read
        for start, stop in zip(starts, [*starts[1:], len(wanted)], strict=False):
            self._read(found[start:stop].reshape(-1), self._first_byte + int(wanted[start]) * size)
        images = torch.from_numpy(found).view(len(wanted), *self.shape[1:])
        return images[torch.from_numpy(places.reshape(-1))]

    def _read(self, into: np.ndarray[tuple[int], np.dtype[np.uint8]], offset: int) -> None:
        view = memoryview(into.data)
        while len(view):
            count = os.preadv(self._file, [view], offset)
            if not count:
                raise OSError(f"{self._path} is shorter than it was")
            view, offset = view[count:], offset + count


Pixels = Tensor | StoredPixels


def chosen(pixels: Pixels, index: Tensor, max_bytes: int) -> Pixels:
    """Some images: in memory where they take at most so many bytes, else where they are."""
    if isinstance(pixels, StoredPixels) and len(index) * pixels.shape[1:].numel() > max_bytes:
        return pixels.select(index)
    return pixels[index]


def chunks(pixels: Pixels) -> Iterator[Tensor]:
    """All images in order, in parts."""
    if isinstance(pixels, StoredPixels):
        yield from pixels.chunks()
    else:
        yield from torch.split(pixels, max(1, CHUNK_BYTES // max(1, pixels.shape[1:].numel())))


def on_device(pixels: Pixels, device: torch.device) -> Pixels:
    """The pixels where steps take batches from: on the device, channels-last, where they fit there."""
    if isinstance(pixels, StoredPixels):
        return pixels
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if 2 * pixels.numel() > free:
            return pixels
    return pixels.to(device, memory_format=torch.channels_last)


def gather(pixels: Pixels, index: Tensor) -> Tensor:
    """Images [B, C, H, W] on the index's device."""
    return pixels[index.to(pixels.device)].to(index.device, non_blocking=True)


def free_bytes() -> int:
    """Memory that a process could take now without anything being swapped out, the container's limit respected."""
    available = {}
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, amount = line.partition(":")
        available[name] = int(amount.split()[0]) * 1024
    free = available["MemAvailable"]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, taken = (Path("/sys/fs/cgroup", name).read_text(encoding="ascii").strip() for name in (limit, used))
            free = min(free, int(most) - int(taken))
        except (OSError, ValueError):  # another version of control groups, or no limit
            continue
    return max(0, free)
