"""Ray: start it here or join the one this runs in, and know what fits, now and at its largest."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from refilled.config import SearchConfig
from refilled.errors import UserError
from refilled.interruption import at_end, has_come, own_handlers
from tune.backend.nodes import Nodes, may_grow_to, nodes_now
from tune.backend.ray_private import require_answer

# Read by Ray's processes when they start. The first makes a row cost 0.2 s instead of 2 s on its way from a Train
# worker to Tune; the second bounds the wait for workers that a shrinking cluster cannot give.
_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the other output prints a panel even at verbosity 0
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would end trials as if they had come to their end
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow has the rows; no CSV and TensorBoard files beside it
}

MAX_SLOTS = 512  # trials that one driver is let to look after, however large the cluster may grow
CONNECT_S = 30.0  # for a cluster to answer that may just be starting
# Allowed to each process on a GPU beside its tensors: CUDA's context, its libraries, what the allocator cannot reuse.
PROCESS_BYTES = 2**30


@dataclass(frozen=True)
class Resources:
    """What one worker takes, how many make a trial, and how many trials fit side by side.

    Attributes:
        num_workers: Workers of a trial.
        cpus_per_worker: CPUs of each of them.
        gpus_per_worker: GPUs of each of them.
        slots: Trials side by side on the cluster at its largest.
        slots_now: Trials side by side on the nodes that are there; 0 where the cluster has yet to grow.
    """

    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    slots: int
    slots_now: int

    @property
    def num_threads(self) -> int:
        """Threads of one worker's torch."""
        return max(1, int(self.cpus_per_worker))

    @property
    def per_worker(self) -> dict[str, float]:
        """CPUs and GPUs by Ray's names."""
        gpu = {"GPU": self.gpus_per_worker} if self.gpus_per_worker else {}
        return {"CPU": self.cpus_per_worker} | gpu


@contextlib.contextmanager
def ray_environment() -> Iterator[None]:
    """The environment that Ray and its processes read; enter it before anything imports `ray`.

    A local Ray asks for a token of its own, in a file that only this user can read and that ends with the block.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ.get("RAY_ADDRESS", "").startswith(("http://", "https://")):
        del os.environ["RAY_ADDRESS"]  # the address for `ray job submit`, not one that a driver can join
    is_guarded = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if "RAY_ADDRESS" in os.environ or is_guarded:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="refilled-") as folder:
        token = Path(folder) / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        try:
            yield
        finally:
            for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
                os.environ.pop(name, None)


@contextlib.contextmanager
def ray_cluster(*, with_dashboard: bool) -> Iterator[None]:
    """A Ray to run on: the cluster of the job this is part of (RAY_ADDRESS), or a local one that ends with the block.

    Args:
        with_dashboard: Give a local Ray its dashboard, without which stopped TorchTrainer trials leak their workers.

    Raises:
        UserError: RAY_ADDRESS names no cluster that can be reached, or one that asks for another token.
    """
    import ray

    if not os.environ.get("RAY_ADDRESS"):
        at_end(_kill_local_ray)
    connect(with_dashboard=with_dashboard)
    try:
        yield
    finally:
        # Threads of an interrupted command may be in calls of Ray, which abort the process when it is shut down: they
        # end with it, as does its job on a cluster.
        if not has_come():
            ray.shutdown()


def _kill_local_ray() -> None:
    """Kill what this process began, which is the local Ray: some of it would outlive a process that ends at once."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def connect(*, with_dashboard: bool) -> None:
    """Begin a job of this driver; see `ray_cluster`. One that there is already ends, and a local Ray with it."""
    import ray
    from ray.exceptions import AuthenticationError

    ray.shutdown()
    address = os.environ.get("RAY_ADDRESS", "")
    local = {} if address else {"include_dashboard": with_dashboard, "num_cpus": os.cpu_count()}
    try:
        if address and address != "auto" and "://" not in address:
            require_answer(address, CONNECT_S)
        with own_handlers():  # Ray's own for SIGTERM prints half a page of its stack
            ray.init(address=address or "local", logging_level=logging.WARNING, log_to_driver=False, **local)
    except AuthenticationError as error:
        raise UserError(
            f"RAY_AUTH_TOKEN_PATH must name a readable file with the Ray cluster's token ({error.message})."
        ) from error
    except ConnectionError as error:
        raise UserError(f"RAY_ADDRESS must name a running Ray cluster, got {address!r} ({error}).") from error


def fit(search: SearchConfig) -> Resources:
    """How many trials fit on the connected cluster side by side, now and at its largest.

    A worker must find its room on one node; the workers of a trial may lie on several. They are placed together or not
    at all, so trials that wait for room never hold a part of it.

    Raises:
        UserError: Where not even one ever fits, with the numbers.
    """
    now = nodes_now()
    return fit_nodes(search, now, may_grow_to() or now)


def fit_nodes(search: SearchConfig, now: Sequence[Nodes], largest: Sequence[Nodes]) -> Resources:
    """`fit` for the nodes that are there and those that there may be.

    Raises:
        UserError: As `fit`.
    """
    num_workers, cpus, gpus = search.workers_per_trial, search.cpus_per_worker, search.gpus_per_worker
    slots_now = _num_workers(now, cpus, gpus) // num_workers
    slots = max(slots_now, _num_workers(largest, cpus, gpus) // num_workers)
    if slots == 0:
        every = [*now, *largest]
        if not any(each.num_workers(cpus, gpus) for each in every):
            raise UserError(
                f"cpus_per_worker and gpus_per_worker must fit a node: one worker needs {_format(cpus, gpus)}, "
                f"{_largest_node(every)}."
            )
        totals = [_total(now), _total(largest)]
        raise UserError(
            f"workers_per_trial must fit the cluster: one trial needs {num_workers} workers of {_format(cpus, gpus)}, "
            f"the cluster's nodes have room for {max(_num_workers(each, cpus, gpus) for each in (now, largest))} "
            f"({_format(*max(totals))} in all)."
        )
    return Resources(
        num_workers=num_workers,
        cpus_per_worker=cpus,
        gpus_per_worker=gpus,
        slots=min(slots, MAX_SLOTS),
        slots_now=min(slots_now, MAX_SLOTS),
    )


def workers_per_gpu(peak_bytes: int, total_bytes: int, gpus_per_worker: float) -> int:
    """How many workers one GPU's memory holds.

    Args:
        peak_bytes: Most that a worker's tensors were measured to take.
        total_bytes: The GPU's memory.
        gpus_per_worker: GPUs of the search; 0 computes on CPUs, where nothing is checked.

    Returns:
        The number that fits, 0 where not even one does.

    Raises:
        UserError: Where `gpus_per_worker` puts more workers on one GPU than fit, with the numbers.
    """
    fitting = total_bytes // (peak_bytes + PROCESS_BYTES)
    promised = math.floor(1 / gpus_per_worker + 1e-9) if 0 < gpus_per_worker < 1 else int(gpus_per_worker > 0)
    if promised > fitting:
        gib = 2**30
        least = f"at least {math.ceil(100 / fitting) / 100:g}" if fitting else "smaller batches or networks beside it"
        raise UserError(
            f"gpus_per_worker must be {least}: {gpus_per_worker:g} puts {promised} workers on one GPU, each takes "
            f"{(peak_bytes + PROCESS_BYTES) / gib:.2f} GiB ({peak_bytes / gib:.2f} measured), and it has "
            f"{total_bytes / gib:.2f} GiB, which holds {fitting}."
        )
    return fitting


def _num_workers(nodes: Sequence[Nodes], cpus: float, gpus: float) -> int:
    return sum(each.count * each.num_workers(cpus, gpus) for each in nodes)


def _total(nodes: Sequence[Nodes]) -> tuple[float, float]:
    return sum(each.count * each.cpus for each in nodes), sum(each.count * each.gpus for each in nodes)


def _largest_node(nodes: Sequence[Nodes]) -> str:
    if not nodes:
        return "and the cluster has no node"
    largest = max(nodes, key=lambda each: (each.gpus, each.cpus))
    return f"the largest node has {_format(largest.cpus, largest.gpus)}"


def _format(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPUs and {gpus:g} GPUs"
