"""Ray: start it here or join the one this runs in, and know what fits."""

from __future__ import annotations

import logging
import math
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from refilled.config import SearchConfig
from refilled.errors import UserError

# Read by Ray's processes when they start. The first makes a row cost 0.2 s instead of 2 s on its way from a Train
# worker to Tune; the second bounds the wait for workers that a shrinking cluster cannot give.
_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the other output prints a panel even at verbosity 0
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow has the rows; no CSV and TensorBoard files beside it
}


@dataclass(frozen=True)
class Resources:
    """What one worker takes, how many make a trial, and how many trials fit side by side."""

    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    slots: int

    @property
    def num_threads(self) -> int:
        """Threads of one worker's torch."""
        return max(1, int(self.cpus_per_worker))

    @property
    def per_worker(self) -> dict[str, float]:
        """In Ray's words."""
        gpu = {"GPU": self.gpus_per_worker} if self.gpus_per_worker else {}
        return {"CPU": self.cpus_per_worker} | gpu


@contextmanager
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


@contextmanager
def ray_cluster(*, with_dashboard: bool) -> Iterator[None]:
    """A Ray to run on: the cluster of the job this is part of (RAY_ADDRESS), or a local one that ends with the block.

    Args:
        with_dashboard: give a local Ray its dashboard, without which stopped TorchTrainer trials leak their workers.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS", "")
    local = {} if address else {"include_dashboard": with_dashboard, "num_cpus": os.cpu_count()}
    try:
        ray.init(address=address or "local", logging_level=logging.WARNING, log_to_driver=False, **local)
    except ConnectionError as error:
        raise UserError(f"RAY_ADDRESS must name a running Ray cluster, got {address!r} ({error}).") from error
    try:
        yield
    finally:
        ray.shutdown()


def fit(search: SearchConfig) -> Resources:
    """How many trials fit on the connected cluster at once.

    Raises:
        UserError: where not even one fits, with the numbers.
    """
    import ray

    have = ray.cluster_resources()
    num_workers, cpus, gpus = search.workers_per_trial, search.cpus_per_worker, search.gpus_per_worker
    slots = math.floor(have.get("CPU", 0.0) / (num_workers * cpus) + 1e-9)
    if gpus:
        slots = min(slots, math.floor(have.get("GPU", 0.0) / (num_workers * gpus) + 1e-9))
    if slots == 0:
        raise UserError(
            f"workers_per_trial, cpus_per_worker and gpus_per_worker must fit the cluster: one trial needs "
            f"{num_workers * cpus:g} CPUs and {num_workers * gpus:g} GPUs, the cluster has {have.get('CPU', 0):g} and "
            f"{have.get('GPU', 0):g}."
        )
    return Resources(num_workers=num_workers, cpus_per_worker=cpus, gpus_per_worker=gpus, slots=slots)
