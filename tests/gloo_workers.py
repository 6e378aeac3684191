"""Processes of a gloo group, for tests of several rooms."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_workers(work: Callable[..., None], folder: Path, num_workers: int, *arguments: object) -> None:
    """Call `work(rank, folder, *arguments)` in every process of a group; they meet at a file of the folder.

    Args:
        work: a module's function.
        folder: where the workers meet; `str` for them, as everything a process is given.
        num_workers: processes.
        arguments: that can be pickled.

    Raises:
        torch.multiprocessing.ProcessExitedException, ProcessRaisedException: a worker failed.
    """
    mp.spawn(_take_part, args=(num_workers, str(folder), work, *arguments), nprocs=num_workers)


def _take_part(rank: int, num_workers: int, folder: str, work: Callable[..., None], *arguments: object) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=num_workers,
        timeout=datetime.timedelta(seconds=60),
    )
    work(rank, folder, *arguments)
    leave_group()


def leave_group() -> NoReturn:
    """End this process, a worker of a group, together with the others."""
    dist.barrier()  # who leaves while another still talks to it takes that one down
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # A worker was once aborted ("terminate called without an active exception"), and never again in 48 tries: most
    # likely by one of gloo's threads at the interpreter's end, which is left out here.
    os._exit(0)
