"""Where a run's bank belongs: found there, fetched from an object store, or built by all workers of a group."""

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

from refilled import distributed
from refilled.config import RunConfig, content_hash
from refilled.config.bank import GIB
from refilled.data.views import Views
from refilled.embedding_cache.mirror import download
from refilled.embedding_cache.rows import (
    ROWS,
    BankFormat,
    DamagedError,
    Rows,
    open_bank,
    partial_of,
    seal_partial,
    start_partial,
)
from refilled.errors import UserError
from refilled.stages import stages_of
from refilled.storage import mirror
from refilled.tasks.classification import Task
from refilled.teacher import FrozenTeacher
from refilled.training.compute import Compute

FORMAT = 1  # part of every bank's identity: raise it when the rows or their order change
BATCH_SIZE = 512  # images a teacher's forward pass while building

_log = logging.getLogger(__name__)


def epochs_with_teacher(config: RunConfig) -> int:
    """Epochs of a run whose steps ask the teacher what a bank can answer."""
    return sum(stage.num_epochs for stage in stages_of(config) if stage.is_cacheable)


def bank_pays(config: RunConfig, num_views: int, num_sharing_runs: int) -> bool:
    """Whether building a bank passes the data through the teacher less often than all its runs without it would."""
    return num_views < epochs_with_teacher(config) * num_sharing_runs


@dataclass(frozen=True)
class BankSite:
    """A bank that may not be there yet, and all that is needed to build it."""

    config: RunConfig
    task: Task
    teacher: FrozenTeacher
    compute: Compute
    path: Path
    views: Views
    bank_format: BankFormat

    @classmethod
    def of(cls, config: RunConfig, task: Task, teacher: FrozenTeacher, storage: Path, compute: Compute) -> BankSite:
        """Where the bank of a run is or will be: a folder named by the hash of all that determines its bytes."""
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

    def open(self, *, quiet: bool = False) -> Rows | None:
        """The bank's rows, if every worker of the group can use them."""
        rows = None
        try:
            rows = open_bank(self.path, self.bank_format)
        except (DamagedError, OSError) as error:
            if not quiet:
                _log.warning("Bank %s is damaged and is not used: %s.", self.path.name, error)
        missing = torch.tensor(int(rows is None), device=self.compute.device)
        if int(distributed.sum_over_workers(missing)) > 0 or rows is None:
            return None
        return rows

    def fetch(self) -> Rows | None:
        """The bank's rows as an object store has them, if every worker of the group gets them."""
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
