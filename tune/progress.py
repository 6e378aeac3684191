"""How a search is doing, while it does it: which cells, how far, best so far, time left."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

LINE_EVERY_S = 10.0


@dataclass
class CellProgress:
    """What is shown of one cell."""

    num_trials: int
    num_epochs: int
    complete: int = 0
    pruned: int = 0
    failed: int = 0
    running: int = 0
    best: float | None = None

    @property
    def ended(self) -> int:
        """Trials that count towards the cell's number."""
        return self.complete + self.pruned


class Progress:
    """A live table on a terminal; a line every ten seconds elsewhere, as in a job's log."""

    def __init__(self, console: Console, began_s: float | None = None) -> None:
        """`began_s`, of `time.monotonic`, is when the command began; none: now."""
        self._console = console
        self._cells: dict[str, CellProgress] = {}
        self._phase = "starting"
        self._jobs: tuple[int, int] | None = None
        self._epochs_done = 0
        self._epochs_at_start = 0.0
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
        self._begin("searching")
        self._jobs = None
        self._epochs_done = 0
        self._say(force=True)

    def trial_started(self, cell: str, num_trials: int) -> None:
        """A trial of the cell runs, which is given `num_trials` by now."""
        self._cells[cell].running += 1
        self._cells[cell].num_trials = num_trials

    def epoch_ended(self, cell: str) -> None:
        """A trial of the cell reported a row."""
        self._epochs_done += 1
        self._say()

    def trial_ended(self, cell: str, outcome: str, best: float | None) -> None:
        """A trial of the cell ended as `complete`, `pruned` or `failed`; `best` is the cell's best so far."""
        each = self._cells[cell]
        each.running = max(0, each.running - 1)
        setattr(each, outcome, getattr(each, outcome) + 1)
        each.best = best
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
        """Seconds until the phase ends at the rate so far, its share of pruned epochs included."""
        elapsed_s = time.monotonic() - self._phase_started_s
        if self._jobs is not None:
            done, count = self._jobs
            return elapsed_s * (count - done) / done if done else None
        if not self._epochs_done:
            return None
        ended = sum(each.ended for each in self._cells.values())
        epochs_a_trial = self._epochs_done / max(1, ended)
        most = max((each.num_epochs for each in self._cells.values()), default=1)
        left = sum(max(0, each.num_trials - each.ended) for each in self._cells.values())
        return elapsed_s / self._epochs_done * left * min(epochs_a_trial, most)

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
