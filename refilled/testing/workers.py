"""Real gloo processes that are kept from one check to the next: to start them and import torch takes seconds."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_COLLECTIVE_S = 60  # after which a worker that waits for another gives up
_JOB_S = 180
_KEPT_S = 30  # idle workers are replaced after this, and end themselves somewhat later
_kept: list[tuple[BaseProcess, Connection]] = []
_used_s = 0.0


def run_on(num_workers: int, work: Callable[..., Any], *arguments: object) -> list[Any]:
    """Call `work(*arguments)` in every process of a gloo group.

    Args:
        num_workers: Processes of the group.
        work: A module's function.
        arguments: Can be pickled; classes among them can be imported.

    Returns:
        What each worker returned, by rank; tensors of it on the CPU.

    Raises:
        AssertionError: A worker raised something, which the message holds, or did not come to an end.
    """
    try:
        job = pickle.dumps((work, arguments))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise AssertionError(
            f"workers must be able to import what is tested; name it path/file.py:Name ({error})"
        ) from error
    workers = _workers(num_workers)
    with tempfile.TemporaryDirectory() as folder:
        for rank, (_, pipe) in enumerate(workers):
            pipe.send_bytes(pickle.dumps((sys.path, rank, num_workers, f"{folder}/rendezvous", job)))
        results, failure = _collect([pipe for _, pipe in workers])
    if failure:
        _end_workers()  # the others may wait for the one that failed
        raise AssertionError(f"one of {num_workers} workers failed:\n{failure}")
    return results


def _collect(pipes: list[Connection]) -> tuple[list[Any], str]:
    """What the workers returned, or the first failure."""
    results: dict[Connection, Any] = {}
    ends_s = time.monotonic() + _JOB_S
    while len(results) < len(pipes):
        ready = wait([pipe for pipe in pipes if pipe not in results], max(0.0, ends_s - time.monotonic()))
        if not ready:
            return [], f"no end after {_JOB_S} s"
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                has_worked, result = pickle.loads(pipe.recv_bytes())
            except EOFError:
                return [], "the process ended"
            if not has_worked:
                return [], str(result)
            results[pipe] = result
    return [results[pipe] for pipe in pipes], ""


def _workers(count: int) -> list[tuple[BaseProcess, Connection]]:
    """So many live processes, kept ones first."""
    global _used_s
    if time.monotonic() - _used_s > _KEPT_S or not all(process.is_alive() for process, _ in _kept):
        _end_workers()
    context = multiprocessing.get_context("forkserver")
    # Imported once for all of them; a step imports torch._dynamo, which takes as long as torch.
    context.set_forkserver_preload(["refilled.testing.bench", "torch._dynamo"])
    while len(_kept) < count:
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there,), daemon=True)
        process.start()
        there.close()
        _kept.append((process, here))
    _used_s = time.monotonic()
    return _kept[:count]


def _end_workers() -> None:
    for process, pipe in _kept:
        process.kill()
        process.join()
        pipe.close()
    _kept.clear()


def _serve(pipe: Connection) -> None:
    """Do what the pipe says until it says nothing more."""
    torch.set_num_threads(1)
    while pipe.poll(2 * _KEPT_S + _JOB_S):
        try:
            message = pipe.recv_bytes()
        except EOFError:
            break
        path, rank, num_workers, rendezvous, job = pickle.loads(message)
        sys.path[:] = path
        try:
            answer = (True, _take_part(rank, num_workers, rendezvous, job))
        except BaseException:  # whatever it is, whoever waits for the answer is to know
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
    os._exit(0)  # gloo's threads have been seen to abort an interpreter at its end


def _take_part(rank: int, num_workers: int, rendezvous: str, job: bytes) -> Any:
    work, arguments = pickle.loads(job)
    dist.init_process_group(
        "gloo",
        init_method=Path(rendezvous).as_uri(),
        rank=rank,
        world_size=num_workers,
        timeout=datetime.timedelta(seconds=_COLLECTIVE_S),
    )
    # Workers of a real run differ in what their global generators were used for.
    torch.manual_seed(num_workers * 100 + rank)
    random.seed(num_workers * 100 + rank)
    result = work(*arguments)
    dist.barrier()  # who leaves while another still talks to it takes that one down
    dist.destroy_process_group()
    return result
