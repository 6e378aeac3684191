"""Timings of a search's parts, taken on the cluster's own workers and kept, so that they are taken once."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from refilled.config import content_hash
from refilled.errors import UserError
from refilled.storage import Kind, Storage
from refilled.tasks.classification import load_task
from refilled.timing import Part, Timed, time_part, work_of
from tune.backend.cluster import Resources, workers_per_gpu
from tune.backend.nodes import nodes_now
from tune.forecast.workload import Calls
from tune.plan import Plan

TIMINGS = Kind("timings")
FORMAT = 2  # part of every timing's name: raise it when what is timed changes
SHARE = 0.05  # of what is forecast, that timing may take
FLOOR_S = 2.0  # that it may take however short the search is
LEAST_S, MOST_S = 0.1, 1.0  # for the calls of one part, one call at least


@dataclass(frozen=True)
class Timings:
    """What parts of runs take here.

    Attributes:
        seconds: Of one call.
        estimated: Names of parts that were not timed, but taken from others by the number of parameters.
        worker_start_s: From asking for workers to their first step, most of it Python's imports.
        took_s: How long the timing took, without the start of workers, which stay; 0 where everything was known.
    """

    seconds: Mapping[Part, float]
    estimated: tuple[str, ...]
    worker_start_s: float
    took_s: float

    def seconds_of(self, calls: Calls) -> float:
        """What calls take one after another."""
        return sum(count * self.seconds[part] for part, count in calls.items())


def measure(plan: Plan, calls: Calls, resources: Resources, say: Callable[[str], None]) -> Timings:
    """Time a few calls of every part, for at most `SHARE` of what all calls of the search take.

    Steps come first, and of them those that the search spends most on. Where time is short, the rest is estimated from
    what was timed.

    Args:
        plan: Of the search.
        calls: How often the search does every part.
        resources: Of a trial, and how many fit.
        say: Told what is being timed.

    Raises:
        UserError: A run, or those that are to share a GPU, do not fit its memory.
    """
    keys = {part: _key(part, resources) for part in calls}
    kept = {part: record for part, key in keys.items() if (record := _kept(plan.storage, key)) is not None}
    timed = {part: Timed(**record["timed"]) for part, record in kept.items()}
    start_s = max((record["worker_start_s"] for record in kept.values()), default=0.0)
    unknown = [part for part in keys if part not in timed]
    took_s, seconds_of = 0.0, {part: one.seconds for part, one in timed.items()}
    if unknown:
        say(f"Timing {len(unknown)} parts of the runs, when workers have started.")
        time_together, began_s = _timer(plan.storage, resources), time.monotonic()
        # Small, and yet it takes a first step, with all that only a process's first one does.
        time_together(next((part for part in unknown if part.kind == "epoch"), unknown[0]), 0.0)
        start_s, began_s = time.monotonic() - began_s, time.monotonic()
        work = {part: work_of(part, load_task(part.run, plan.storage)) for part in calls}
        order = ("epoch", "step", "image", "teacher")
        unknown.sort(key=lambda part: (order.index(part.kind), -calls[part] * work[part]))
        overhead_s = 0.0
        for number, part in enumerate(unknown):
            seconds_of = _with_estimates(work, timed)
            total_s = sum(calls[each] * each_s for each, each_s in seconds_of.items()) / max(1, resources.slots_now)
            part_began_s = time.monotonic()
            left_s = max(FLOOR_S, SHARE * total_s) - (part_began_s - began_s)
            must = not work[part] or resources.gpus_per_worker or not any(work[each] for each in timed)
            if not must and left_s < seconds_of[part] + overhead_s:
                continue
            say(f"Timing {part.name} ({number + 1} of {len(unknown)}).")
            seconds = min(MOST_S, max(LEAST_S, left_s / (len(unknown) - number) - overhead_s))
            timed[part] = time_together(part, seconds)
            # Networks that are built, images that are found, Ray's task.
            overhead_s = max(0.0, time.monotonic() - part_began_s - max(seconds, timed[part].seconds))
            record = {"part": part.name, "timed": dataclasses.asdict(timed[part]), "worker_start_s": start_s}
            _keep(plan.storage, keys[part], record)
        took_s = time.monotonic() - began_s
        seconds_of = _with_estimates(work, timed)
    for one in timed.values():
        workers_per_gpu(one.peak_bytes, one.total_bytes, resources.gpus_per_worker)
    return Timings(
        seconds=seconds_of,
        estimated=tuple(part.name for part in calls if part not in timed),
        worker_start_s=start_s,
        took_s=took_s,
    )


def _with_estimates(work: Mapping[Part, float], timed: Mapping[Part, Timed]) -> dict[Part, float]:
    """Seconds of every part: those timed, and others at the pace of what is most like them.

    That is the same kind of part of the same network, else another part of it, else any.
    """
    pace = {part: one.seconds / work[part] for part, one in timed.items() if work[part]}
    found = {part: one.seconds for part, one in timed.items()}
    for part in work.keys() - timed.keys() if pace else ():
        same = [other for other in pace if other.run.student == part.run.student]
        like = [other for other in same if other.kind == part.kind] or same or list(pace)
        found[part] = work[part] * statistics.median(pace[other] for other in like)
    return found


def _kept(storage: Storage, key: str) -> Mapping[str, Any] | None:
    """A timing taken earlier, or none where there is none that is whole: it is taken again."""
    artifact = storage.artifacts.open(TIMINGS, key)
    return None if artifact is None else artifact.about


def _keep(storage: Storage, key: str, record: Mapping[str, Any]) -> None:
    storage.artifacts.make(TIMINGS, key, lambda _: record)


def _key(part: Part, resources: Resources) -> str:
    """Hash of what decides a timing, the machines' kinds included."""
    import ray
    import torch

    kinds = (
        sorted({(node.cpus, node.gpus) for node in nodes_now()}),
        sorted(name for name in ray.cluster_resources() if "type" in name),
    )
    parts = [FORMAT, part.key, dataclasses.asdict(resources), kinds, os.cpu_count(), torch.__version__]
    return content_hash(parts)


def _timer(storage: Storage, resources: Resources) -> Callable[[Part, float], Timed]:
    """Times a part on as many workers as run side by side on one node: who has company is slower."""
    import ray

    cpus, gpus = resources.cpus_per_worker, resources.gpus_per_worker
    on_a_node = max((node.num_workers(cpus, gpus) for node in nodes_now()), default=0)
    num_workers = max(1, min(on_a_node, resources.slots_now * resources.num_workers))
    task = ray.remote(_time).options(num_cpus=cpus, num_gpus=gpus, max_retries=0)
    arguments = (storage, resources.num_threads, gpus)

    def time_together(part: Part, seconds: float) -> Timed:
        """The median time and the most memory."""
        try:
            answers = ray.get([task.remote(part, seconds, *arguments) for _ in range(num_workers)])
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from error
            raise
        most: Timed = max(answers, key=lambda each: each.peak_bytes)
        return dataclasses.replace(most, seconds=statistics.median(each.seconds for each in answers))

    return time_together


def _time(part: Part, seconds: float, storage: Storage, num_threads: int, num_gpus: float) -> Timed:
    """Runs on a worker: time a part."""
    import torch

    from refilled.training.compute import Compute

    torch.set_num_threads(num_threads)
    device = torch.device("cuda", torch.cuda.current_device()) if num_gpus else torch.device("cpu")
    try:
        return time_part(part, storage, Compute(device=device, precision=part.run.precision), seconds=seconds)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"global_batch_size must be smaller: {part.name} does not fit the GPU beside what is on it "
            f"({str(error).splitlines()[0]})"
        ) from error
