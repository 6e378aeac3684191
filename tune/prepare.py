"""Before trials or refits: the teachers that they need, and the embedding caches that pay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from refilled.config import RunConfig
from refilled.embedding_cache import is_cached
from refilled.shared_caches import SharedCache, pays, shared_caches
from refilled.stages import needs_teacher
from refilled.storage import Storage
from refilled.teacher import teacher_folder
from tune.backend.cluster import Resources
from tune.backend.jobs import JobSpec, raise_if_of_all, run_jobs
from tune.progress import Progress

TEACHERS, CACHES = "pre-training teachers", "computing embedding caches"
ON_ALL = " on all images"  # after either phase's name, before refits


def prepare(
    runs: Sequence[tuple[RunConfig, int]],
    storage: Storage,
    progress: Progress,
    resources: Resources,
    *,
    suffix: str = "",
) -> None:
    """Pre-train teachers, then compute the embedding caches that ask less of them than the runs without would.

    A run whose teacher or cache fails here tries again by itself.

    Args:
        runs: Runs to come, and how many there are of each.
        storage: Where teachers and caches are kept.
        progress: Shows both phases.
        resources: What a job takes.
        suffix: Ends the phases' names.
    """
    teachers: dict[str, RunConfig] = {}
    for run, _ in runs:
        if needs_teacher(run) and run.teacher_weights is None:
            folder = teacher_folder(run, storage)
            if folder.result() is None:
                teachers.setdefault(folder.path.name, run)
    jobs = [JobSpec("teacher", name, run) for name, run in teachers.items()]
    _run(jobs, TEACHERS + suffix, storage, progress, resources)
    caches = shared_caches(runs, storage)
    wanted = {name: each for name, each in caches.items() if pays(each.run, each.epochs)}
    jobs = [JobSpec("embeddings", n, each.run) for n, each in wanted.items() if not is_cached(each.run, storage)]
    if jobs or len(wanted) < len(caches):
        progress.note(_decision(caches, wanted))
    _run(jobs, CACHES + suffix, storage, progress, resources)


def _decision(caches: Mapping[str, SharedCache], wanted: Mapping[str, SharedCache]) -> str:
    most = max(caches.values(), key=lambda each: each.epochs)
    return (
        f"Embedding caches: {len(wanted)} of {len(caches)} pay. The teacher passes over the data {most.num_views} "
        f"times to compute one of all views, and up to {most.epochs} times in the steps of all runs without it."
    )


def _run(jobs: Sequence[JobSpec], phase: str, storage: Storage, progress: Progress, resources: Resources) -> None:
    if not jobs:
        return
    progress.start_jobs(phase, len(jobs))
    for result in run_jobs(jobs, storage, resources):
        if result.error is not None:
            raise_if_of_all(result.error)
            what = f"{result.job.kind} of {result.job.run.teacher}"
            progress.note(f"{phase.capitalize()}: {what} failed: {str(result.error).strip().splitlines()[-1]}")
        progress.job_ended()
