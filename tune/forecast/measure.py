"""Timings of a search's runs, taken on the cluster's own workers and kept, so that they are taken once."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import shutil
import statistics
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refilled.config import RunConfig, content_hash
from refilled.errors import UserError
from refilled.storage import mirror
from refilled.storage.mirror import location_of, open_storage
from refilled.storage.store import read_json, write_json
from tune.backend.cluster import Resources, workers_per_gpu

if TYPE_CHECKING:
    from refilled.timing import StepTimes
    from tune.plan import Cell, Plan

FORMAT = 1  # part of every timing's name: raise it when what is timed changes
MOST_TOGETHER = 64  # tasks that measure side by side, however many trials will
WAIT_S = 20.0  # for the others to be ready, and to be done
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timings:
    """What runs take here.

    Attributes:
        kinds: by `kind_of` a cell.
        worker_start_s: from asking for a worker to its first step, most of it Python's imports.
        took_s: how long the measuring took; 0 where everything was known.
    """

    kinds: Mapping[str, StepTimes]
    worker_start_s: float
    took_s: float


def kind_of(cell: Cell) -> str:
    """What its runs' times depend on within a search; overlaps differ in nothing that takes time."""
    return f"{cell.teacher}>{cell.student} {cell.run.method}"


def measure_all(plan: Plan, resources: Resources) -> Timings:
    """Time the runs of every kind of cell, as many side by side as trials will be.

    Raises:
        UserError: where a run, or those that are to share a GPU, do not fit its memory.
    """
    from refilled.timing import StepTimes

    started_s = time.monotonic()
    runs = {kind_of(cell): cell.run for cell in reversed(plan.cells)}
    paths = {kind: _path(plan, run, resources) for kind, run in runs.items()}
    known = {kind: _kept(path) for kind, path in paths.items()}
    records = {kind: record for kind, record in known.items() if record is not None}
    unknown = [kind for kind in paths if kind not in records]
    for together in _rounds(unknown, max(1, min(MOST_TOGETHER, resources.slots_now * resources.num_workers))):
        for kind, record in _measure_together(together, runs, plan.storage, resources).items():
            write_json(paths[kind], record)
            records[kind] = record
    times = {kind: StepTimes(**record["times"]) for kind, record in records.items()}
    for each in times.values():
        workers_per_gpu(each.peak_bytes, each.total_bytes, resources.gpus_per_worker)
    return Timings(
        kinds=times,
        worker_start_s=max(record["worker_start_s"] for record in records.values()),
        took_s=time.monotonic() - started_s if unknown else 0.0,
    )


def _kept(path: Path) -> dict[str, Any] | None:
    """A timing taken earlier, or none where there is none, or none that can be read: it is taken again."""
    from refilled.timing import StepTimes

    if not mirror.fetch(path):
        return None
    try:
        record = read_json(path)
        numbers = [*dataclasses.asdict(StepTimes(**record["times"])).values(), record["worker_start_s"]]
        if all(isinstance(each, int | float) and 0 <= each < math.inf for each in numbers):
            return dict(record)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # what a damaged file can turn out to be
        pass
    _log.warning("Timing %s is damaged; it is taken again.", path)
    return None


def _path(plan: Plan, run: RunConfig, resources: Resources) -> Path:
    """Where a timing is kept: named by what decides it, the machines' kinds included."""
    import ray
    import torch

    kinds = {
        str(
            sorted(
                (name, count) for name, count in node["Resources"].items() if name in ("CPU", "GPU") or "type" in name
            )
        )
        for node in ray.nodes()
        if node["Alive"]
    }
    what = run.to_dict() | {"overlap": None, "seed": None, "epochs": None, "teacher_epochs": None}
    parts = [FORMAT, what, dataclasses.asdict(resources), sorted(kinds), os.cpu_count(), torch.__version__]
    return plan.storage / "timings" / f"{content_hash(parts)}.json"


def _rounds(kinds: Sequence[str], together: int) -> Iterator[list[str]]:
    """Groups of `together` kinds; where they run out, some are measured more than once."""
    for start in range(0, len(kinds), together):
        group = list(kinds[start : start + together])
        yield [group[number % len(group)] for number in range(together)]


def _measure_together(
    kinds: Sequence[str], runs: Mapping[str, RunConfig], storage: Path, resources: Resources
) -> dict[str, Any]:
    """One round; what is kept of each of its kinds, the median of those measured more than once."""
    import ray

    task = ray.remote(_measure).options(
        num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker, max_retries=0
    )
    meeting = storage / "timings" / f".round-{uuid.uuid4().hex}"
    meeting.mkdir(parents=True)
    try:
        asked = [
            task.remote(
                _share(runs[kind], resources.num_workers).to_dict(),
                location_of(storage),
                str(meeting),
                number,
                len(kinds),
                time.time(),
                resources.num_threads,
                resources.gpus_per_worker,
            )
            for number, kind in enumerate(kinds)
        ]
        answers = ray.get(asked)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from error
        raise
    finally:
        shutil.rmtree(meeting, ignore_errors=True)
    return _records(kinds, answers)


def _records(kinds: Sequence[str], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is kept of a round, by kind."""
    records: dict[str, Any] = {}
    for kind in set(kinds):
        same = [answer for each, answer in zip(kinds, answers, strict=True) if each == kind]
        times = {name: statistics.median(answer["times"][name] for answer in same) for name in same[0]["times"]}
        times["alone"] = answers[0]["times"]["alone"]  # the first was timed alone, whatever its kind
        most = {name: max(answer["times"][name] for answer in same) for name in ("peak_bytes", "total_bytes")}
        start_s = max(answer["worker_start_s"] for answer in answers)
        records[kind] = {"kind": kind, "times": times | most, "worker_start_s": start_s}
    return records


def _share(run: RunConfig, num_workers: int) -> RunConfig:
    """The run with one worker's share of its batches, as if it were the whole."""
    if num_workers == 1:
        return run
    recipe = run.pretraining
    recipe = dataclasses.replace(recipe, global_batch_size=max(2, recipe.global_batch_size // num_workers))
    return dataclasses.replace(run, global_batch_size=max(2, run.global_batch_size // num_workers), pretraining=recipe)


def _measure(
    config: Mapping[str, Any],
    storage: str,
    meeting: str,
    number: int,
    count: int,
    asked_s: float,
    num_threads: int,
    num_gpus: float,
) -> dict[str, Any]:
    """Runs on a worker: measure beside `count` - 1 others, which meet in a folder.

    Args:
        config: of a `RunConfig`, as a dict.
        storage: the search's folder.
        meeting: folder where each says when it is ready and done.
        number: this one's among them.
        count: of them.
        asked_s: when it was asked for, by `time.time`.
        num_threads: of torch.
        num_gpus: this worker's share.
    """
    import torch

    from refilled.timing import measure
    from refilled.training.compute import Compute

    folder, ready_s = Path(meeting), 0.0

    def wait(what: str) -> Iterator[bool]:
        """Say that this one is `what`, then whether others are not yet, for a while."""
        folder.mkdir(parents=True, exist_ok=True)  # where machines share no folder each meets those on its own
        (folder / f"{number}.{what}").touch()
        deadline_s = time.monotonic() + WAIT_S
        while len(list(folder.glob(f"*.{what}"))) < count and time.monotonic() < deadline_s:
            yield True
        yield False

    def start_together() -> None:
        nonlocal ready_s
        ready_s = time.time()
        for _ in wait("ready"):
            time.sleep(0.02)

    run = RunConfig.from_dict(config)
    torch.set_num_threads(num_threads)
    device = torch.device("cuda", torch.cuda.current_device()) if num_gpus else torch.device("cpu")
    compute = Compute(device=device, precision=run.precision)
    try:
        done = wait("done")
        times = measure(
            run,
            open_storage(storage),
            compute,
            start_together=start_together,
            others_measure=lambda: next(done, False),
            then_alone=number == 0 and count > 1,
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"global_batch_size must be smaller: one step of {run.teacher} > {run.student} on {run.global_batch_size} "
            f"images does not fit the GPU beside what is on it ({str(error).splitlines()[0]})"
        ) from error
    return {"times": dataclasses.asdict(times), "worker_start_s": max(0.0, ready_s - asked_s)}
