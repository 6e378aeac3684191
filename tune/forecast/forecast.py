"""What a search will take: epochs, hours by phase and cost, from a few timed steps; and what it took beside that."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from tune.backend.cluster import Resources
from tune.forecast.measure import Timings
from tune.forecast.simulate import REPEATS, Done, Work, pack, simulate_pruning
from tune.forecast.workload import Workload

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tune.plan import Cell, Plan

PhaseName = Literal["start", "teachers", "trials", "teachers on all images", "refits"]
PHASES: tuple[PhaseName, ...] = get_args(PhaseName)

# Seen on two cores, of the command itself, without the starting of workers: from its first line to the first job
# (imports, Ray, stores), from the last teacher to the first trial (Tune), and from the last refit to its end.
START_S, TUNE_START_S, END_S = 16.0, 5.0, 2.5


@dataclass(frozen=True)
class Forecast:
    """What a search will take on the cluster of now.

    Attributes:
        epochs: by phase, those of teachers, trials and refits.
        hours: by phase.
        busy_hours: of all trials' and jobs' slots together.
        gpu_hours: busy hours times the GPUs of a slot.
        cost: hours times the price of an hour of the cluster; none without a price.
        kept: share of the trials' epochs that pruning and limits leave.
        slots: trials side by side.
        assumptions: sentences.
    """

    epochs: Mapping[PhaseName, int]
    hours: Mapping[PhaseName, float]
    busy_hours: float
    gpu_hours: float
    cost: float | None
    kept: float
    slots: int
    assumptions: tuple[str, ...]

    @property
    def total_hours(self) -> float:
        """Of the whole command."""
        return sum(self.hours.values())

    def to_json(self) -> dict[str, Any]:
        """Everything, with the sum."""
        return dataclasses.asdict(self) | {"total_hours": self.total_hours, "total_epochs": sum(self.epochs.values())}

    def table(self) -> RenderableType:
        """Phases with epochs and hours, for people, and the assumptions."""
        from rich.console import Group
        from rich.table import Table

        cost = "" if self.cost is None else f", cost {self.cost:.2f}"
        gpus = f", {self.gpu_hours:.2f} GPU-hours" if self.gpu_hours else ""
        table = Table(title=f"Forecast: {say_hours(self.total_hours)} on {self.slots} slots{gpus}{cost}")
        for name in ("phase", "epochs", "time"):
            table.add_column(name, justify="left" if name == "phase" else "right")
        for phase in PHASES:
            table.add_row(phase, f"{self.epochs.get(phase, 0):,}", say_hours(self.hours[phase]))
        return Group(table, *self.assumptions)


@dataclass(frozen=True)
class Actual:
    """What a search took: epochs and hours by phase, as far as they were counted."""

    epochs: Mapping[PhaseName, int]
    hours: Mapping[PhaseName, float]


@dataclass(frozen=True)
class Comparison:
    """Forecast beside what came."""

    forecast: Forecast
    actual: Actual

    @property
    def hours_ratio(self) -> float | None:
        """Forecast hours over actual hours of the phases that were counted; none where nothing was."""
        came = sum(self.actual.hours.values())
        return sum(self.forecast.hours[phase] for phase in self.actual.hours) / came if came else None

    def to_json(self) -> dict[str, Any]:
        """Both, and their ratio."""
        return {
            "forecast": self.forecast.to_json(),
            "actual": dataclasses.asdict(self.actual),
            "hours_ratio": self.hours_ratio,
        }

    def table(self) -> RenderableType:
        """Phases with forecast and actual epochs and times, for people."""
        from rich.table import Table

        ratio = "" if self.hours_ratio is None else f": {100 * self.hours_ratio - 100:+.0f} % in time"
        table = Table(title=f"Forecast against actual{ratio}")
        for name in ("phase", "epochs forecast", "epochs", "time forecast", "time"):
            table.add_column(name, justify="left" if name == "phase" else "right")
        for phase in PHASES:
            came = self.actual.hours.get(phase)
            table.add_row(
                phase,
                f"{self.forecast.epochs.get(phase, 0):,}",
                f"{self.actual.epochs[phase]:,}" if phase in self.actual.epochs else "",
                say_hours(self.forecast.hours[phase]),
                "" if came is None else say_hours(came),
            )
        return table


def compare(forecast: Forecast, actual: Actual) -> Comparison:
    """A forecast beside what came."""
    return Comparison(forecast, actual)


def forecast(
    plan: Plan,
    resources: Resources,
    timings: Timings,
    *,
    done_trials: Mapping[str, int] | None = None,
    elapsed_s: float | None = None,
) -> Forecast:
    """What is left of a search on the cluster's nodes of now.

    Args:
        plan: of the search.
        resources: of a trial, and how many fit.
        timings: of every kind of its cells.
        done_trials: trials that cells have already, by the cell's name.
        elapsed_s: what the command has taken up to here, the measuring included; none: what it usually takes.
    """
    search, slots, start_s = plan.search, max(1, resources.slots_now), timings.worker_start_s
    workload = Workload(plan, resources, timings)
    teachers = workload.teachers(on_all=False)
    # Workers that have just measured are there for the first jobs.
    warm = slots if timings.took_s else 0
    before = _pack_all(teachers, slots, slots - warm, start_s)
    limit_s = None
    if search.max_hours is not None:
        limit_s = max(0.0, 3600 * search.max_hours - before.wall_s - TUNE_START_S)
    trials, whole = _trials(plan, workload, slots, start_s, limit_s, done_trials or {})
    again = workload.teachers(on_all=True)
    between = _pack_all(again, slots, slots, start_s)
    refits = _pack_all(workload.refits(), slots, slots - min(slots, len(again)), start_s)
    seconds: dict[PhaseName, float] = {
        "start": START_S + timings.took_s if elapsed_s is None else elapsed_s,
        "teachers": before.wall_s,
        "trials": trials.wall_s + (TUNE_START_S if trials.epochs else 0.0),
        "teachers on all images": between.wall_s,
        "refits": refits.wall_s + END_S,
    }
    done: dict[PhaseName, Done] = {
        "teachers": before,
        "trials": trials,
        "teachers on all images": between,
        "refits": refits,
    }
    hours = {phase: value / 3600 for phase, value in seconds.items()}
    busy_hours = sum(each.busy_s for each in done.values()) / 3600
    price = search.price_per_hour
    return Forecast(
        epochs={phase: round(each.epochs) for phase, each in done.items()},
        hours=hours,
        busy_hours=busy_hours,
        gpu_hours=busy_hours * resources.num_workers * resources.gpus_per_worker,
        cost=None if price is None else price * sum(hours.values()),
        kept=trials.epochs / whole if whole else 1.0,
        slots=slots,
        assumptions=_assumptions(plan, resources),
    )


def _pack_all(works: Sequence[Work], slots: int, fresh_slots: int, worker_start_s: float) -> Done:
    """Everything, whole."""
    whole = [(work, work.num_epochs) for work in works]
    return pack(whole, slots, fresh_slots=fresh_slots, worker_start_s=worker_start_s)


def _trials(
    plan: Plan,
    workload: Workload,
    slots: int,
    worker_start_s: float,
    limit_s: float | None,
    done_trials: Mapping[str, int],
) -> tuple[Done, int]:
    """The trials as simulated on average, and the epochs they would have if every one were whole."""
    search, cells = plan.search, plan.cells
    left = trials_left(cells, search.trials, done_trials)
    works = {cell.name: workload.trial(cell) for cell in cells}
    studies = {
        epochs: simulate_pruning(search.pruner, epochs, search.trials)
        for epochs in {work.num_epochs for work in works.values()}
    }
    outcomes = []
    for repeat in range(min(REPEATS, max(len(each) for each in studies.values()))):
        order: list[tuple[float, int, Work, int]] = []
        for position, cell in enumerate(cells):
            work, count = works[cell.name], left[cell.name]
            simulated = studies[work.num_epochs]
            # Each cell another simulated study; what a cell has already are its first trials.
            lengths = simulated[(repeat + position) % len(simulated)]
            lengths = lengths[len(lengths) - count :] if count <= len(lengths) else lengths
            order += [(number / len(lengths), position, work, epochs) for number, epochs in enumerate(lengths)]
        queue = [(work, epochs) for _, _, work, epochs in sorted(order, key=lambda each: each[:2])]
        outcomes.append(
            pack(
                queue,
                slots,
                fresh_slots=slots,
                worker_start_s=worker_start_s,
                limit_s=limit_s,
                max_epochs=_epochs_left(plan, works, done_trials),
            )
        )
    mean = Done(*(statistics.mean(values) for values in zip(*map(dataclasses.astuple, outcomes), strict=True)))
    return mean, sum(left[cell.name] * works[cell.name].num_epochs for cell in cells)


def trials_left(cells: Sequence[Cell], trials: int, done_trials: Mapping[str, int]) -> dict[str, int]:
    """Trials that every cell still gets, where some may have had more than their equal share of all."""
    left = {cell.name: max(0, trials - done_trials.get(cell.name, 0)) for cell in cells}
    total = max(0, trials * len(cells) - sum(done_trials.get(cell.name, 0) for cell in cells))
    while sum(left.values()) > total:
        left[max(left, key=lambda name: left[name])] -= 1
    return left


def _epochs_left(plan: Plan, works: Mapping[str, Work], done_trials: Mapping[str, int]) -> int | None:
    most = plan.search.max_epochs_total
    if most is None:
        return None
    # How far trials went that are done is not known here; they are taken to be whole.
    return max(0, most - sum(count * works[name].num_epochs for name, count in done_trials.items() if name in works))


def _assumptions(plan: Plan, resources: Resources) -> tuple[str, ...]:
    search = plan.search
    said = [
        f"The cluster stays as it is, {max(1, resources.slots_now)} trials side by side, with no other load.",
        "No run fails or is interrupted; sampled settings change nothing in a step's time.",
    ]
    if search.pruner != "none":
        said.append(
            f"Pruner {search.pruner} meets trials in order, whose values are random and keep their rank over epochs "
            "(a sampler that learns has more of its trials go on)."
        )
    if resources.num_workers > 1:
        said.append(
            f"A step of {resources.num_workers} workers takes as long as a batch of one worker's share on one of them."
        )
    if search.share_embeddings:
        said.append("Every trial trains its stage embedding itself.")
    if resources.slots > resources.slots_now:
        said.append(f"The cluster may grow to {resources.slots} trials side by side, which would take less time.")
    return tuple(said)


def say_hours(hours: float) -> str:
    """For people: `3 h 20 min`, `12 min`, `40 s`."""
    seconds = round(3600 * hours)
    if seconds < 120:
        return f"{seconds} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 120 else f"{minutes} min"
