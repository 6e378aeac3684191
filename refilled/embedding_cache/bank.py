"""The bank: the frozen teacher's embeddings of every (training image, view), computed once.

The teacher is frozen and views are finitely many, so what it says can be looked up: for all epochs, both stages, all
students and all trials that share teacher and images. A bank is found by the content hash of what determines it, mapped
into memory, and shared by all processes of a machine.

A run without a bank asks the teacher in every step and rounds what it says to the bank's type, so a run's numbers do
not depend on whether it found a bank. What is left are the last bits of a convolution whose result depends on the size
of the batch; on a CPU it was not seen to, for two images or more.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from refilled import distributed
from refilled.config import RunConfig
from refilled.embedding_cache.mirror import upload
from refilled.embedding_cache.rows import Rows
from refilled.embedding_cache.site import BankSite
from refilled.storage import mirror
from refilled.storage.store import only_here
from refilled.tasks.classification import Task
from refilled.teacher import FrozenTeacher
from refilled.training.compute import Compute


class Bank:
    """A finished bank, looked up by image and view.

    On a GPU the rows lie in its memory where they fit into a third of what is free, so that other trials on it may do
    the same; else they are gathered on the host, batch by batch.
    """

    def __init__(self, rows: Rows, view_ids: Tensor, compute: Compute) -> None:
        """Take the rows [N x V, D] of the views `view_ids`, int64 [V]."""
        self._rows = rows
        self._compute = compute
        self._num_views = len(view_ids)
        positions = torch.full((int(view_ids.max()) + 1,), -(2**62))  # a view that is not kept has no row anywhere
        positions[view_ids] = torch.arange(len(view_ids))
        self._positions = positions.to(compute.device)
        self._device_rows = self._copy_to_device() if compute.device.type == "cuda" else None

    def embed(self, image_ids: Tensor, view_ids: Tensor) -> Tensor:
        """Embeddings [B, D] on the run's device and in its type.

        Args:
            image_ids: int64 [B], positions in the training set, on the run's device.
            view_ids: int64 [B], of views in use, on the run's device.

        Raises:
            IndexError: an image or view that is not in the bank (on a GPU a failed assertion of the device).
        """
        index = image_ids * self._num_views + self._positions[view_ids]
        if self._device_rows is not None:
            return self._device_rows.index_select(0, index).to(self._compute.dtype)
        pinned = self._compute.device.type == "cuda"  # torch does not hand out pinned memory whose copy is under way
        dtype = torch.float16 if self._rows.dtype.itemsize == 2 else torch.float32
        found = torch.empty(len(index), self._rows.shape[1], dtype=dtype, pin_memory=pinned)
        np.take(self._rows, index.cpu().numpy(), axis=0, out=found.numpy())
        return found.to(self._compute.device, non_blocking=True).to(self._compute.dtype)

    def _copy_to_device(self) -> Tensor | None:
        free, _ = torch.cuda.mem_get_info(self._compute.device)
        if 3 * self._rows.nbytes > free:
            return None
        dtype = torch.float16 if self._rows.dtype.itemsize == 2 else torch.float32
        copy = torch.empty(self._rows.shape, dtype=dtype, device=self._compute.device)
        step = 2**16
        for start in range(0, len(copy), step):  # in parts, so that the host never holds the whole a second time
            copy[start : start + step] = torch.from_numpy(self._rows[start : start + step].copy())
        return copy


def bank_for(
    config: RunConfig,
    task: Task,
    teacher: FrozenTeacher,
    storage: Path,
    compute: Compute,
    num_sharing_runs: int = 1,
) -> Bank | None:
    """The bank of a run, found or built, or none where the teacher is to run in every step.

    Mode `bank` builds it, or waits for others who do. Mode `auto` uses a bank that is there; else it builds one where
    that asks less of the teacher than all runs without would, and goes on without where others are at it. Where the
    storage has no room it goes on without in both modes, and says so.

    Args:
        config: of the run.
        task: its images.
        teacher: frozen.
        storage: the search's folder, shared by all workers.
        compute: device and precision.
        num_sharing_runs: runs, this one among them, that will use the same bank.

    Raises:
        UserError: in mode `bank`, when the bank alone is larger than all banks may be; in both, when numbers of the
            teacher are too large for the bank's type.
    """
    if config.bank.mode == "live":
        return None
    site = BankSite.of(config, task, teacher, storage, compute)
    rows = _rows_at(site, num_sharing_runs)
    return None if rows is None else Bank(rows, site.views.view_ids, compute)


def _rows_at(site: BankSite, num_sharing_runs: int) -> Rows | None:
    """The bank's rows, found or built; none where there is to be no bank."""
    rows = site.open()
    if rows is None:
        rows = site.fetch()
    if rows is not None or not site.is_wanted(num_sharing_runs):
        return rows
    if distributed.world_size() > 1 and mirror.is_mirrored(site.path):
        site.say(f"Bank {site.path.name} is for one worker to build, as machines share no folder: the teacher runs.")
        return None
    with only_here(site.path, wait=site.config.bank.mode == "bank") as here:
        if not here:
            site.say(f"Bank {site.path.name} is being built elsewhere: the teacher runs in every step.")
            return None
        rows = site.open(quiet=True)  # who had the lock before may have built it
        if rows is None and site.build():
            upload(site.path)
            rows = site.open()
        return rows
