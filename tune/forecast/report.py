"""A forecast as it is kept and shown, and beside what came."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from rich.console import RenderableType

PhaseName = Literal["start", "teachers", "trials", "teachers on all images", "refits", "students"]
PHASES: tuple[PhaseName, ...] = get_args(PhaseName)


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
        epoch_s: seconds of a trial's epoch, by the cell's name and the stage's.
        timing_s: what timing took of the start; 0 where everything was known.
        assumptions: sentences.
    """

    epochs: Mapping[PhaseName, int]
    hours: Mapping[PhaseName, float]
    busy_hours: float
    gpu_hours: float
    cost: float | None
    kept: float
    slots: int
    epoch_s: Mapping[str, Mapping[str, float]]
    timing_s: float
    assumptions: tuple[str, ...]

    def at_pace(self, ratio: float) -> Forecast:
        """The forecast where the trials were seen to take `ratio` times as long."""
        paced = {"trials", "teachers on all images", "refits"}  # not what is the same for every network
        hours = {phase: value * (ratio if phase in paced else 1.0) for phase, value in self.hours.items()}
        longer = sum(hours.values()) / self.total_hours
        return dataclasses.replace(self, hours=hours, cost=None if self.cost is None else self.cost * longer)

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
        table = Table(title=f"Forecast: {format_hours(self.total_hours)} on {self.slots} slots{gpus}{cost}")
        for name in ("phase", "epochs", "time"):
            table.add_column(name, justify="left" if name == "phase" else "right")
        for phase in PHASES:
            table.add_row(phase, f"{self.epochs.get(phase, 0):,}", format_hours(self.hours[phase]))
        return Group(table, *self.assumptions)


@dataclass(frozen=True)
class Comparison:
    """A forecast beside what came.

    Attributes:
        forecast: made at the start.
        corrected: by the first trials; none where too few ended.
        epochs: that were trained, by phase, as far as they were counted.
        hours: that it took, likewise.
    """

    forecast: Forecast
    corrected: Forecast | None
    epochs: Mapping[PhaseName, int]
    hours: Mapping[PhaseName, float]

    @property
    def hours_ratio(self) -> float | None:
        """Forecast hours over actual hours of the phases that were counted; none where nothing was."""
        came = sum(self.hours.values())
        return sum(self.forecast.hours[phase] for phase in self.hours) / came if came else None

    def to_json(self) -> dict[str, Any]:
        """All of it, and the ratio."""
        return {
            "forecast": self.forecast.to_json(),
            "corrected": None if self.corrected is None else self.corrected.to_json(),
            "actual": {"epochs": self.epochs, "hours": self.hours},
            "hours_ratio": self.hours_ratio,
        }

    def table(self) -> RenderableType:
        """Phases with forecast and actual epochs and times, for people."""
        from rich.table import Table

        ratio = "" if self.hours_ratio is None else f": {100 * self.hours_ratio - 100:+.0f} % in time"
        table = Table(title=f"Forecast against actual{ratio}")
        for name in ("phase", "epochs forecast", "epochs", "time forecast", "after first trials", "time"):
            table.add_column(name, justify="left" if name == "phase" else "right")
        for phase in PHASES:
            came = self.hours.get(phase)
            table.add_row(
                phase,
                f"{self.forecast.epochs.get(phase, 0):,}",
                f"{self.epochs[phase]:,}" if phase in self.epochs else "",
                format_hours(self.forecast.hours[phase]),
                "" if self.corrected is None else format_hours(self.corrected.hours[phase]),
                "" if came is None else format_hours(came),
            )
        return table


def format_hours(hours: float) -> str:
    """For people: `3 h 20 min`, `12 min`, `40 s`."""
    seconds = round(3600 * hours)
    if seconds < 120:
        return f"{seconds} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 120 else f"{minutes} min"
