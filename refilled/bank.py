"""The bank: the frozen teacher's embeddings of every (training image, view), computed once.

The teacher is frozen and views are finitely many, so what it says can be looked up: for all epochs, both stages, all
students and all trials that share teacher and images. A bank is found by the content hash of what determines it, mapped
into memory, and shared by all processes of a machine.

A run without a bank asks the teacher in every step and rounds what it says to the bank's type, so a run's numbers do
not depend on whether it found a bank. What is left are the last bits of a convolution whose result depends on the size
of the batch; on a CPU it was not seen to, for two images or more.
"""

from __future__ import annotations

import functools
import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from refilled import distributed, mirror
from refilled.bank_mirror import download, upload
from refilled.bank_store import (
    ROWS,
    BankFormat,
    DamagedError,
    Rows,
    open_bank,
    partial_of,
    seal_partial,
    start_partial,
)
from refilled.compute import Compute
from refilled.config import RunConfig, content_hash
from refilled.config.bank import GIB
from refilled.data.task import Task
from refilled.data.views import Views
from refilled.errors import UserError
from refilled.methods import needs_teacher, stages_of
from refilled.store import only_here
from refilled.teacher import FrozenTeacher

FORMAT = 1  # part of every bank's identity: raise it when the rows or their order change
BATCH_SIZE = 512  # images a teacher's forward pass while building

_log = logging.getLogger(__name__)


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
    site = _Site.of(config, task, teacher, storage, compute)
    bank = site.open()
    if bank is None:
        bank = site.fetch()
    if bank is not None or not site.is_wanted(num_sharing_runs):
        return bank
    if distributed.world_size() > 1 and mirror.is_mirrored(site.path):
        site.say(f"Bank {site.path.name} is for one worker to build, as machines share no folder: the teacher runs.")
        return None
    with only_here(site.path, wait=config.bank.mode == "bank") as here:
        if not here:
            site.say(f"Bank {site.path.name} is being built elsewhere: the teacher runs in every step.")
            return None
        bank = site.open(quiet=True)  # who had the lock before may have built it
        if bank is None and site.build():
            upload(site.path)
            bank = site.open()
        return bank


def epochs_with_teacher(config: RunConfig) -> int:
    """Epochs of a run whose steps ask the teacher."""
    return sum(stage.num_epochs for stage in stages_of(config) if needs_teacher(config, stage.name))


def bank_pays(config: RunConfig, num_views: int, num_sharing_runs: int) -> bool:
    """Whether building a bank passes the data through the teacher less often than all its runs without it would."""
    return num_views < epochs_with_teacher(config) * num_sharing_runs


@dataclass(frozen=True)
class _Site:
    """A bank that may not be there yet, and all that is needed to build it."""

    config: RunConfig
    task: Task
    teacher: FrozenTeacher
    compute: Compute
    path: Path
    views: Views
    bank_format: BankFormat

    @classmethod
    def of(cls, config: RunConfig, task: Task, teacher: FrozenTeacher, storage: Path, compute: Compute) -> _Site:
        views = Views(config.views)
        bank_format = BankFormat(len(task.train), len(views.view_ids), teacher.embedding_dim, config.bank.dtype)
        key = content_hash(
            [
                FORMAT,
                teacher.identity,
                task.train.digest,
                config.views.to_dict(),
                views.view_ids.tolist(),
                compute.precision,
                bank_format.to_dict(),
            ]
        )
        return cls(config, task, teacher, compute, storage / "banks" / key, views, bank_format)

    def open(self, *, quiet: bool = False) -> Bank | None:
        """The bank, if every worker of the group can use it."""
        rows = None
        try:
            rows = open_bank(self.path, self.bank_format)
        except (DamagedError, OSError) as error:
            if not quiet:
                _log.warning("Bank %s is damaged and is not used: %s.", self.path.name, error)
        missing = torch.tensor(int(rows is None), device=self.compute.device)
        if int(distributed.sum_over_workers(missing)) > 0 or rows is None:
            return None
        return Bank(rows, self.views.view_ids, self.compute)

    def fetch(self) -> Bank | None:
        """The bank as an object store has it, if every worker of the group gets it."""
        max_bytes = self.config.bank.max_bytes
        if not mirror.is_mirrored(self.path) or self.bank_format.num_bytes > max_bytes:
            return None
        self._together(functools.partial(download, self.path, self.bank_format, max_bytes))
        return self.open(quiet=True)

    def is_wanted(self, num_sharing_runs: int) -> bool:
        """Whether to build the bank, which is not there."""
        bank, needed = self.config.bank, self.bank_format.num_bytes
        if needed > bank.max_bytes:
            num_images, num_views, dim = self.bank_format.shape
            requirement = (
                f"bank.max_gib must be at least {math.ceil(1000 * needed / GIB) / 1000} for {num_images} images x "
                f"{num_views} views x {dim} numbers of {bank.dtype}, got {bank.max_gib}."
            )
            if bank.mode == "bank":
                raise UserError(requirement)
            self.say(f"{requirement[:-1]}: the teacher runs in every step.")
            return False
        if bank.mode == "bank":
            return True
        pays = bank_pays(self.config, self.bank_format.num_views, num_sharing_runs)
        epochs = epochs_with_teacher(self.config)
        self.say(
            f"Bank {self.path.name} takes {self.bank_format.num_views} passes of the teacher over the data to build, "
            f"{num_sharing_runs} runs of {epochs} epochs without it take {num_sharing_runs * epochs}: "
            f"{'it is built' if pays else 'the teacher runs in every step'}."
        )
        return pays

    def build(self) -> bool:
        """Build the bank under its lock, all workers of the group together; false where it cannot be kept."""
        first, started_s = distributed.rank() == 0, time.perf_counter()
        try:
            kept = (
                self._together(self._start if first else None)
                and self._together(self._fill)
                and self._together(self._seal if first else None)
            )
        finally:
            if first:
                shutil.rmtree(partial_of(self.path), ignore_errors=True)
        if kept:
            size, took_s = self.bank_format.num_bytes / GIB, time.perf_counter() - started_s
            self.say(f"Bank {self.path.name} is built: {size:.3f} GiB in {took_s:.1f} s.")
        return kept

    def say(self, sentence: str) -> None:
        """Log a sentence once for the group."""
        if distributed.rank() == 0:
            _log.info(sentence)

    def _together(self, step: Callable[[], None] | None) -> bool:
        """Whether a step of the building did not fail for the file system on any worker; they wait for each other."""
        failed = torch.zeros((), dtype=torch.int64, device=self.compute.device)
        try:
            if step is not None:
                step()
        except OSError as error:
            reason = error.strerror or str(error)
            _log.warning(
                "Bank %s cannot be kept in %s (%s): the teacher runs in every step.",
                self.path.name,
                self.path.parent,
                reason,
            )
            failed += 1
        return int(distributed.sum_over_workers(failed)) == 0

    def _start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        start_partial(self.path, self.bank_format, self.config.bank.max_bytes)

    def _fill(self) -> None:
        """Write this worker's share of the rows, a range of batches.

        The batches are the same for any number of workers, and so are the bank's bytes.
        """
        num_rows = self.bank_format.num_images * self.bank_format.num_views
        num_batches = math.ceil(num_rows / BATCH_SIZE)
        share = np.array_split(np.arange(num_batches), distributed.world_size())[distributed.rank()].tolist()
        row_bytes = self.bank_format.num_bytes // num_rows
        images = self.task.train.images.to(self.compute.device)
        with (partial_of(self.path) / ROWS).open("r+b") as file:
            for batch in share:  # of even size: a last one of a single image might be convolved differently
                start, stop = num_rows * batch // num_batches, num_rows * (batch + 1) // num_batches
                file.seek(start * row_bytes)
                file.write(self._embed(images, torch.arange(start, stop, device=images.device)).data)

    def _embed(self, images: Tensor, index: Tensor) -> Rows:
        """Rows of the bank by their numbers, int64 [B], as the teacher says them in a step: [B, D]."""
        image_ids = index.div(self.bank_format.num_views, rounding_mode="floor")
        view_ids = self.views.view_ids.to(index.device)[index % self.bank_format.num_views]
        rendered = self.views.render(images[image_ids], view_ids)
        embedding = self.teacher.embed_live(self.compute.place_images(rendered, self.task.normalization))
        rows: Rows = embedding.to(getattr(torch, self.bank_format.dtype)).cpu().numpy()
        if not np.isfinite(rows).all():
            raise UserError("bank.dtype must be float32, because float16 cannot hold the embeddings of this teacher.")
        return rows.astype(self.bank_format.numpy_dtype, copy=False)

    def _seal(self) -> None:
        origin = {
            "format": FORMAT,
            "teacher": self.teacher.identity,
            "train_digest": self.task.train.digest,
            "views": self.views.view_ids.tolist(),
            "precision": self.compute.precision,
            "torch": torch.__version__,
            "numpy": np.__version__,
        }
        seal_partial(self.path, self.bank_format, origin)
