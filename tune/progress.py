"""How a search is doing, while it does it: which cells, how far, best so far, time left."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table

from refilled.metrics import EpochMetrics

if TYPE_CHECKING:
    from tune.forecast.report import Forecast

LINE_EVERY_S = 10.0


@dataclass
class CellProgress:
    """What is shown of one cell; `epochs` are those of this command's trials, which took `epochs_s` in all."""

    num_trials: int
    num_epochs: int
    complete: int = 0
    pruned: int = 0
    failed: int = 0
    running: int = 0
    best: float | None = None
    ended_before: int = 0
    epochs: int = 0
    epochs_s: float = 0.0

    @property
    def ended(self) -> int:
        """Trials that count towards the cell's number."""
        return self.complete + self.pruned


class Progress:
    """A live table on a terminal; a line every ten seconds elsewhere, as in a job's log."""

    def __init__(self, console: Console, began_s: float | None = None, forecast: Forecast | None = None) -> None:
        """Show nothing yet.

        Args:
            console: Where to.
            began_s: When the command began, of `time.monotonic`; none: now.
            forecast: What was thought to come; the pace of the first trials corrects it.
        """
        self._console = console
        self._forecast = forecast
        self.corrected: Forecast | None = None
        self._cells: dict[str, CellProgress] = {}
        self._phase = "starting"
        self._jobs: tuple[int, int] | None = None
        self._first_epoch_s: float | None = None
        self._expected_s = 0.0
        self._last_line_s = time.monotonic()
        self._started_s = self._phase_started_s = self._last_line_s if began_s is None else began_s
        self._seconds: dict[str, float] = {}
        self._live = Live(get_renderable=self.table, console=console, refresh_per_second=2, transient=True)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()
        if isinstance(error, KeyboardInterrupt):
            error.add_note(self._state())

    def start_jobs(self, phase: str, count: int) -> None:
        """Begin a phase of `count` jobs."""
        self._begin(phase)
        self._jobs = (0, count)
        self._say(force=True)

    def job_ended(self) -> None:
        """One more job of the phase is done."""
        if self._jobs is not None:
            self._jobs = (self._jobs[0] + 1, self._jobs[1])
        self._say()

    def start_trials(self, cells: Iterable[tuple[str, CellProgress]]) -> None:
        """Begin the search with each cell as its study has it."""
        self._cells = dict(cells)
        for each in self._cells.values():
            each.ended_before = each.ended
        self._begin("searching")
        self._jobs = None
        self._say(force=True)

    def trial_started(self, cell: str, num_trials: int) -> None:
        """A trial of the cell runs, which is given `num_trials` by now."""
        self._cells[cell].running += 1
        self._cells[cell].num_trials = num_trials

    def epoch_ended(self, cell: str, row: EpochMetrics) -> None:
        """A trial of the cell reported a row."""
        each = self._cells[cell]
        each.epochs += 1
        each.epochs_s += row.epoch_s
        if self._forecast is not None:
            self._expected_s += self._forecast.epoch_s[cell][row.stage]
        if self._first_epoch_s is None:
            self._first_epoch_s = time.monotonic() - row.epoch_s
        self._say()

    def trial_ended(self, cell: str, outcome: str, best: float | None) -> None:
        """A trial of the cell ended as `complete`, `pruned` or `failed`; `best` is the cell's best so far."""
        each = self._cells[cell]
        each.running = max(0, each.running - 1)
        setattr(each, outcome, getattr(each, outcome) + 1)
        each.best = best
        self._correct()
        self._say()

    def phase_seconds(self) -> dict[str, float]:
        """How long every phase has taken, the present one until now; the first is `starting`."""
        now_s = time.monotonic()
        present = {self._phase: self._seconds.get(self._phase, 0.0) + now_s - self._phase_started_s}
        return self._seconds | present

    def _begin(self, phase: str) -> None:
        self._seconds = self.phase_seconds()
        self._phase, self._phase_started_s = phase, time.monotonic()

    def note(self, text: str) -> None:
        """Something to read once."""
        self._console.print(text, highlight=False, markup=False)

    def time_left_s(self) -> float | None:
        """Seconds until the phase ends: of jobs at the rate so far, of trials at the pace of their epochs so far."""
        now_s = time.monotonic()
        if self._jobs is not None:
            done, count = self._jobs
            return (now_s - self._phase_started_s) * (count - done) / done if done else None
        done_s = sum(each.epochs_s for each in self._cells.values())
        if self._first_epoch_s is None or not done_s:
            return None
        left_s = sum(self._epochs_left(each) * self._epoch_s(name) for name, each in self._cells.items())
        return left_s * (now_s - self._first_epoch_s) / done_s

    def _pace(self) -> float | None:
        """Seconds that trials' epochs took, over those forecast; none before the first, or without a forecast."""
        return sum(each.epochs_s for each in self._cells.values()) / self._expected_s if self._expected_s else None

    def _epochs_left(self, cell: CellProgress) -> float:
        kept = 1.0 if self._forecast is None else self._forecast.kept
        forecast = (cell.num_trials - cell.ended_before) * cell.num_epochs * kept - cell.epochs
        return max(0.0, min(forecast, (cell.num_trials - cell.ended) * cell.num_epochs))

    def _epoch_s(self, name: str) -> float:
        """Mean of a cell's epochs: those seen, else those forecast at the pace seen, else those of all cells."""
        cell, pace = self._cells[name], self._pace()
        if cell.epochs:
            return cell.epochs_s / cell.epochs
        if self._forecast is not None and pace is not None:
            return pace * statistics.mean(self._forecast.epoch_s[name].values())
        cells = self._cells.values()
        return sum(each.epochs_s for each in cells) / sum(each.epochs for each in cells)

    def _correct(self) -> None:
        """Correct the forecast once, when as many trials have ended as run side by side."""
        ended, pace = sum(each.ended - each.ended_before for each in self._cells.values()), self._pace()
        if self._forecast is None or self.corrected is not None or pace is None or ended < self._forecast.slots:
            return
        self.corrected = self._forecast.at_pace(pace)
        hours = _duration(3600 * self.corrected.total_hours)
        self.note(f"After the first {ended} trials the forecast is {hours} in all.")

    def table(self) -> Table:
        """The present state."""
        table = Table(title=self._headline(), title_justify="left")
        for name in ("cell", "trials", "running", "pruned", "failed", "best validation accuracy"):
            table.add_column(name, justify="left" if name == "cell" else "right")
        for name, each in self._cells.items():
            best = "" if each.best is None else f"{100 * each.best:.2f} %"
            numbers = (f"{each.ended}/{each.num_trials}", str(each.running), str(each.pruned), str(each.failed), best)
            table.add_row(name, *numbers)
        return table

    def _state(self) -> str:
        """For an interruption: what it came into, and what it leaves undone."""
        if self._jobs is not None:
            done, count = self._jobs
            return f"{self._phase}: {done} of {count} done; summary.json is as it was before"
        if not self._cells:
            return f"{self._phase}: nothing was trained yet"
        cells = self._cells.values()
        ended, running = sum(each.ended for each in cells), sum(each.running for each in cells)
        return (
            f"{self._phase}: {ended} of {sum(each.num_trials for each in cells)} trials done, {running} begun; no "
            f"winner was refitted or tested, summary.json is as it was before"
        )

    def _headline(self) -> str:
        left_s = self.time_left_s()
        left = "" if left_s is None else f", about {_duration(left_s)} left in this phase"
        jobs = "" if self._jobs is None else f" {self._jobs[0]}/{self._jobs[1]}"
        return f"[{_duration(time.monotonic() - self._started_s)}] {self._phase}{jobs}{left}".replace("[", r"\[")

    def _say(self, *, force: bool = False) -> None:
        now_s = time.monotonic()
        if self._console.is_terminal or (not force and now_s - self._last_line_s < LINE_EVERY_S):
            return
        self._last_line_s = now_s
        cells = "; ".join(
            f"{name}: {each.ended}/{each.num_trials}" + ("" if each.best is None else f" best {100 * each.best:.2f} %")
            for name, each in self._cells.items()
            if self._jobs is None
        )
        self._console.print(self._headline() + (f": {cells}" if cells else ""), highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
