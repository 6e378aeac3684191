"""Jobs beside the trials: teachers and their embedding caches before the search, refits after it."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from refilled.config import RunConfig
from refilled.errors import DataChangedError
from refilled.interruption import has_come
from refilled.storage import Storage
from tune.backend.cluster import Resources
from tune.backend.trainer import train_on_group
from tune.backend.worker import Job, work


@dataclass(frozen=True)
class JobSpec:
    """One job; `name` is unique among the jobs of a search."""

    kind: Job
    name: str
    run: RunConfig


@dataclass(frozen=True)
class JobResult:
    """How a job ended: without an error, or with one."""

    job: JobSpec
    error: Exception | None


def run_jobs(jobs: Sequence[JobSpec], storage: Storage, resources: Resources) -> Iterator[JobResult]:
    """Do all jobs, as many side by side as fit, and yield each as it ends; a failed one does not stop the others."""
    done: queue.SimpleQueue[JobResult] = queue.SimpleQueue()

    def do(job: JobSpec) -> None:
        try:
            if resources.num_workers == 1:
                _on_one_worker(job, storage, resources)
            else:
                name = f"{job.kind}-{job.run.content_hash()}"
                train_on_group(job.kind, job.run.to_dict(), storage, resources, name)
        except Exception as error:  # whatever ends one job must reach the caller, not end a thread silently
            done.put(JobResult(job, error))
        else:
            done.put(JobResult(job, None))

    pool = ThreadPoolExecutor(max_workers=max(1, min(resources.slots, len(jobs))))
    try:
        for job in jobs:
            pool.submit(do, job)
        for _ in jobs:
            yield done.get()
    finally:
        # A command that is interrupted ends with all its threads. From Python the process goes on, and a thread that
        # still waits for its group would abort it when Ray is shut down: what runs is waited for.
        pool.shutdown(wait=not has_come(), cancel_futures=True)


def raise_if_of_all(error: Exception) -> None:
    """Raise what ended a job and would end all others too, such as images that have changed.

    Raises:
        DataChangedError: That is what it was; from a worker's process it comes wrapped.
    """
    cause = getattr(error, "cause", error)
    if isinstance(cause, DataChangedError):
        raise cause


def _on_one_worker(job: JobSpec, storage: Storage, resources: Resources) -> None:
    import ray

    task = ray.remote(work).options(
        num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker, max_retries=2
    )
    ray.get(
        task.remote(
            job.kind,
            job.run.to_dict(),
            storage,
            num_threads=resources.num_threads,
            num_gpus=resources.gpus_per_worker,
        )
    )
