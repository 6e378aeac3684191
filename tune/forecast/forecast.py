"""What a search will take: epochs, hours by phase and cost, from a few timed steps."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refilled.stages import num_epochs_of
from tune.backend.cluster import Resources
from tune.forecast.measure import SHARE, Timings
from tune.forecast.report import Forecast, PhaseName
from tune.forecast.workload import Work, Workload
from tune.studies.pruning import MIN_TRIALS, REDUCTION, rungs_of

if TYPE_CHECKING:
    from tune.plan import Plan
    from tune.studies.cells import Cell

# What the platform itself takes, seen on two quiet cores on 2026-11-23, without the starting of workers: from the
# command's first line to the first job (imports, Ray, stores), from the last teacher to the first trial (Tune), and
# from the last refit to the end.
START_S, TUNE_START_S, END_S = 16.0, 5.0, 2.5
# Likewise between two trials of a slot, and for a row; and with a new Ray Train group for every run.
TRIAL_S, ROW_S = 0.15, 0.012
GROUP_S, GROUP_ROW_S = 12.0, 0.2
# Likewise for the first winner's student, for each further one, and for an export with its checks and latencies.
FIRST_STUDENT_S, STUDENT_S, EXPORT_S = 2.0, 0.4, 5.0


def forecast(
    plan: Plan,
    resources: Resources,
    timings: Timings,
    *,
    done_trials: Mapping[str, int] | None = None,
    done: Collection[str] = (),
    elapsed_s: float | None = None,
) -> Forecast:
    """What is left of a search on the cluster's nodes of now.

    Args:
        plan: of the search.
        resources: of a trial, and how many fit.
        timings: of all parts of its runs.
        done_trials: trials that cells have already, by the cell's name.
        done: names of cells whose winners are refitted, too.
        elapsed_s: what the command has taken up to here, the timing included; none: what it usually takes.
    """
    search, slots = plan.search, max(1, resources.slots_now)
    workload = Workload(plan, resources.num_workers, done)
    schedule = _Schedule(plan, workload, timings, slots, resources.num_workers)
    left = trials_left(plan.cells, search.trials, done_trials or {})
    before = schedule.teachers(False, fresh=not timings.took_s) if any(left.values()) else _Done()
    trials, whole_epochs = schedule.trials(left, done_trials or {}, before.wall_s + TUNE_START_S)
    again = schedule.teachers(True, fresh=True)
    phases: dict[PhaseName, _Done] = {
        "teachers": before,
        "trials": trials,
        "teachers on all images": again,
        "refits": schedule.jobs(workload.refits(), fresh=not again.wall_s),
        "students": _Done(_writing_s(len(workload.to_refit), len(search.export))),
    }
    beside = {"trials": TUNE_START_S if whole_epochs else 0.0, "students": END_S}
    hours: dict[PhaseName, float] = {"start": (START_S + timings.took_s if elapsed_s is None else elapsed_s) / 3600}
    hours |= {phase: (each.wall_s + beside.get(phase, 0.0)) / 3600 for phase, each in phases.items()}
    busy_hours = sum(each.busy_s for each in phases.values()) / 3600
    price = search.price_per_hour
    return Forecast(
        epochs={phase: round(each.epochs) for phase, each in phases.items()},
        hours=hours,
        busy_hours=busy_hours,
        gpu_hours=busy_hours * resources.num_workers * resources.gpus_per_worker,
        cost=None if price is None else price * sum(hours.values()),
        kept=trials.epochs / whole_epochs if whole_epochs else 1.0,
        slots=slots,
        epoch_s={
            cell.name: {stage: timings.seconds_of(calls) for stage, calls in workload.an_epoch(cell).items()}
            for cell in plan.cells
        },
        timing_s=timings.took_s,
        assumptions=_assumptions(plan, resources, timings),
    )


@dataclass(frozen=True)
class _Done:
    """Seconds until all is done, busy seconds of all slots, and epochs."""

    wall_s: float = 0.0
    busy_s: float = 0.0
    epochs: float = 0.0


class _Schedule:
    """The phases of a search, one after another, each packed on its slots."""

    def __init__(self, plan: Plan, workload: Workload, timings: Timings, slots: int, num_workers: int) -> None:
        self._plan, self._workload, self._timings, self._slots = plan, workload, timings, slots
        self._job_s = GROUP_S if num_workers > 1 else 0.0

    def jobs(self, works: Iterable[Work], *, fresh: bool) -> _Done:
        """Work that nobody stops, on workers that are there or have to be started (`fresh`)."""
        done = [(self._timings.seconds_of(work.calls) + self._job_s, work.num_epochs) for work in works]
        return _pack(done, self._slots, self._timings.worker_start_s if fresh and done else 0.0)

    def teachers(self, on_all: bool, *, fresh: bool) -> _Done:
        """Teachers, then what they say of all images."""
        trained = self.jobs(self._workload.teachers(on_all), fresh=fresh)
        asked = self.jobs(self._workload.shared(on_all), fresh=fresh and not trained.wall_s)
        return _Done(*map(sum, zip(dataclasses.astuple(trained), dataclasses.astuple(asked), strict=True)))

    def trials(self, left: Mapping[str, int], done_trials: Mapping[str, int], after_s: float) -> tuple[_Done, int]:
        """The trials that cells have left, which begin `after_s` seconds after the search, within its limits.

        Returns:
            What they take, and the epochs that they would have if nothing stopped them.
        """
        search, timings = self._plan.search, self._timings
        trial_s, row_s = (GROUP_S, GROUP_ROW_S) if search.trial_backend == "torch_trainer" else (TRIAL_S, ROW_S)
        works = {cell.name: self._workload.trial(cell) for cell in self._plan.cells}
        trials, whole_epochs = [], 0
        for number in range(max(left.values())):
            for name in (name for name, count in left.items() if number < count):
                work, kept = works[name], share_kept(search.pruner, works[name].num_epochs, search.trials)
                seconds = timings.seconds_of(work.calls) + row_s * work.num_epochs
                trials.append((trial_s + kept * seconds, kept * work.num_epochs))
                whole_epochs += work.num_epochs
        packed = _pack(trials, self._slots, timings.worker_start_s if trials else 0.0)
        return _limited(packed, self._plan, works, done_trials, after_s), whole_epochs


def _writing_s(students: int, exports: int) -> float:
    """What the command takes, on no slot, to write the winners' students, each with so many exports."""
    return FIRST_STUDENT_S + students * (STUDENT_S + exports * EXPORT_S) if students else 0.0


def _pack(works: Sequence[tuple[float, float]], slots: int, start_s: float) -> _Done:
    """Work of so many seconds and epochs in its order, each to the slot that is free first."""
    free_s = [start_s] * slots
    for seconds, _ in works:
        heapq.heapreplace(free_s, free_s[0] + seconds)
    return _Done(max(free_s), sum(seconds for seconds, _ in works), sum(epochs for _, epochs in works))


def _limited(
    trials: _Done, plan: Plan, works: Mapping[str, Work], done_trials: Mapping[str, int], after_s: float
) -> _Done:
    """What the search's limits leave of the trials, which begin `after_s` seconds after it; earlier ones were whole."""
    search, parts = plan.search, [1.0]
    if search.max_epochs_total is not None and trials.epochs:
        spent = sum(count * works[name].num_epochs for name, count in done_trials.items() if name in works)
        parts.append(max(0, search.max_epochs_total - spent) / trials.epochs)
    if search.max_hours is not None and trials.wall_s:
        parts.append(max(0.0, 3600 * search.max_hours - after_s) / trials.wall_s)
    return _Done(*(min(parts) * value for value in dataclasses.astuple(trials)))


def share_kept(pruner: str, num_epochs: int, trials: int) -> float:
    """Share of a study's epochs that a pruner leaves, where a trial's rank is chance."""
    if pruner != "halving":
        return 1.0
    reaching, saved = float(trials), 0.0
    for rung in rungs_of(num_epochs):
        # Of n trials that have reached a rung, ceil(n / REDUCTION) may go on.
        judged = range(MIN_TRIALS, round(reaching) + 1)
        stopped = sum(1 - math.ceil(n / REDUCTION - 1e-9) / n for n in judged)
        saved += stopped * (num_epochs - rung)
        reaching -= stopped
    return 1 - saved / (trials * num_epochs)


def trials_left(cells: Sequence[Cell], trials: int, done_trials: Mapping[str, int]) -> dict[str, int]:
    """Trials that every cell still gets, where some may have had more than their equal share of all."""
    left = {cell.name: max(0, trials - done_trials.get(cell.name, 0)) for cell in cells}
    total = max(0, trials * len(cells) - sum(done_trials.get(cell.name, 0) for cell in cells))
    while sum(left.values()) > total:
        left[max(left, key=lambda name: left[name])] -= 1
    return left


def _assumptions(plan: Plan, resources: Resources, timings: Timings) -> tuple[str, ...]:
    search = plan.search
    said = [
        f"The cluster stays as it is, {max(1, resources.slots_now)} trials side by side, with no other load.",
        "No run fails or is interrupted; sampled settings change nothing in a step's time.",
    ]
    if search.pruner != "none":
        kept = {share_kept(search.pruner, num_epochs_of(cell.run), search.trials) for cell in plan.cells}
        said.append(f"Pruner {search.pruner} leaves {100 * min(kept):.0f} % of the epochs, by chance alone.")
    if resources.num_workers > 1:
        said.append(
            f"A step of {resources.num_workers} workers takes as long as a batch of one worker's share on one of them."
        )
    if resources.slots > resources.slots_now:
        said.append(f"The cluster may grow to {resources.slots} trials side by side, which would take less time.")
    if timings.estimated:
        said.append(
            f"Timing may take {100 * SHARE:.0f} % of the search. Not timed, but taken from others by their numbers of "
            f"parameters: {'; '.join(timings.estimated)}."
        )
    return tuple(said)
