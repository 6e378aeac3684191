"""A search on recorded curves: real searchers and schedulers, simulated trials, in the order of Tune's controller.

What `ray/tune/execution/tune_controller.py` of Ray 2.60 does with a function that reports rows:

- a searcher is asked when a slot is free (`max_concurrent_trials` = slots), and again after every event if it had None;
- a new trial goes to `scheduler.on_trial_add`;
- a row goes to `scheduler.on_trial_result`; unless that says STOP it goes to `searcher.on_trial_result`;
- after STOP, and when the function has returned, the last row goes to `scheduler.on_trial_complete`, then to
  `searcher.on_trial_complete`;
- a function that raises goes to `scheduler.on_trial_error`, then to `searcher.on_trial_complete(error=True)`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from analysis.simulator.table import Answers, Point, Row, Table

Suggestion = Mapping[str, Any]


@dataclass(frozen=True)
class Contender:
    """A way to search: what drives the trials, and how its suggestions are read."""

    searcher: Any
    scheduler: Any
    read: Callable[[Suggestion], tuple[str, Point]]
    """The table's name and Optuna's parameters."""


@dataclass(frozen=True)
class Whole:
    """A trial that ran to its end, and what the search had spent by then."""

    table: str
    value: float
    epochs: int
    """Trained by all trials of the table until then, this one's and the pruned ones' among them."""
    all_epochs: int
    """The same over all tables."""
    time: float


@dataclass
class Outcome:
    """What a simulated search did so far."""

    whole: list[Whole] = field(default_factory=list)
    epochs: dict[str, int] = field(default_factory=dict)
    """Trained so far, by table."""
    pruned: int = 0
    failed: int = 0
    time: float = 0.0
    """When the last row came: epochs or seconds, as the simulation's `epoch_time` says."""
    answers: dict[str, Answers] = field(default_factory=dict)
    """By table."""

    @property
    def num_epochs(self) -> int:
        """Epochs over all tables."""
        return sum(self.epochs.values())

    def first_at(self, table: str, target: float) -> Whole | None:
        """The first whole trial that reached a value."""
        return next((each for each in self.whole if each.table == table and each.value >= target), None)

    def best_within(self, table: str, epochs: int) -> float:
        """The best value of the whole trials that ended within so many epochs of the table; 0 if none did."""
        return max((each.value for each in self.whole if each.table == table and each.epochs <= epochs), default=0.0)


@dataclass
class _Slot:
    trial: Trial
    table: Table
    rows: list[Row]
    next_row: int = 0


def simulate(
    contender: Contender,
    tables: Mapping[str, Table],
    *,
    slots: int,
    is_over: Callable[[Outcome], bool],
    epoch_time: Callable[[Table, Row], float] = lambda table, row: 1.0,
    answers: Mapping[str, Answers] | None = None,
) -> Outcome:
    """Run a search until its searcher has no more or `is_over` says so.

    Args:
        contender: The search; used up by it.
        tables: The problems by name.
        slots: Trials side by side.
        is_over: Asked after every row.
        epoch_time: How long an epoch takes; the unit is the caller's.
        answers: Answers of a search that this one continues; none: there are none yet.
    """
    run = _Simulation(contender, tables, slots, epoch_time)
    run.outcome.answers |= answers or {name: Answers(table) for name, table in tables.items()}
    run.fill()
    while run.events:
        run.step()
        if is_over(run.outcome):
            break
        run.fill()
    return run.outcome


class _Simulation:
    """The state of a simulated search; `events` holds the next row of every busy slot, as (time, order, slot)."""

    def __init__(
        self,
        contender: Contender,
        tables: Mapping[str, Table],
        slots: int,
        epoch_time: Callable[[Table, Row], float],
    ) -> None:
        self.outcome = Outcome()
        self.events: list[tuple[float, int, _Slot]] = []
        self._contender, self._tables, self._slots, self._epoch_time = contender, tables, slots, epoch_time
        self._num_started = self._num_events = 0

    def fill(self) -> None:
        """Start trials in free slots, as far as the searcher has any for now."""
        while len(self.events) < self._slots:
            trial_id = f"{self._num_started:08d}"
            suggestion = self._contender.searcher.suggest(trial_id)
            if suggestion is None or suggestion == Searcher.FINISHED:
                return
            self._num_started += 1
            name, point = self._contender.read(suggestion)
            table = self._tables[name]
            rows = self.outcome.answers[name].curve(point).rows(table.num_epochs)
            # A stub is a whole Trial but for its trainable, which only Ray's processes would need.
            trial = Trial("simulated", config=dict(suggestion), trial_id=trial_id, stub=True)
            trial.set_status(Trial.RUNNING)
            self._contender.scheduler.on_trial_add(None, trial)
            self._await_next(_Slot(trial, table, rows), self.outcome.time)

    def step(self) -> None:
        """Take the next row of whichever trial comes first, and hand it on."""
        now, _, slot = heapq.heappop(self.events)
        searcher, scheduler, trial = self._contender.searcher, self._contender.scheduler, slot.trial
        self.outcome.time = now
        if slot.next_row == len(slot.rows):  # the recorded run raised in this epoch
            self.outcome.failed += 1
            scheduler.on_trial_error(None, trial)
            searcher.on_trial_complete(trial.trial_id, error=True)
            return
        row = {**slot.rows[slot.next_row], "trial_id": trial.trial_id}
        slot.next_row += 1
        name = slot.table.name
        self.outcome.epochs[name] = self.outcome.epochs.get(name, 0) + 1
        is_stopped = scheduler.on_trial_result(None, trial, row) == TrialScheduler.STOP
        if not is_stopped:
            searcher.on_trial_result(trial.trial_id, row)
        trial.update_last_result(row)
        if is_stopped or row["finished"]:
            self._complete(slot, row, now)
        else:
            self._await_next(slot, now)

    def _complete(self, slot: _Slot, row: Row, now: float) -> None:
        if row["finished"]:
            name = slot.table.name
            value = row["best_val_accuracy"]
            self.outcome.whole.append(Whole(name, value, self.outcome.epochs[name], self.outcome.num_epochs, now))
        else:
            self.outcome.pruned += 1
        self._contender.scheduler.on_trial_complete(None, slot.trial, row)
        self._contender.searcher.on_trial_complete(slot.trial.trial_id, result=row)
        slot.trial.set_status(Trial.TERMINATED)

    def _await_next(self, slot: _Slot, now: float) -> None:
        """An epoch that raises takes as long as the one before would have."""
        upcoming = slot.rows[min(slot.next_row, len(slot.rows) - 1)] if slot.rows else {"stage": "embedding"}
        self._num_events += 1
        heapq.heappush(self.events, (now + self._epoch_time(slot.table, upcoming), self._num_events, slot))
