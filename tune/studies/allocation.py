"""Which cell gets the next trial, and when the search has spent its budget.

Every study first gets an equal share of the trials and of the epochs. What is held back (`adaptive_share`), and what
studies left unspent, then goes where a winner is least certain: one more trial for every method that is compared there,
or for none, so that nobody compares a long search with a short one.

By batches (`deterministic`) such trials are given out in rounds, each decided when nothing runs, and stored first; a
search that continues finds the same decision.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optuna.trial import TrialState

from tune.studies.cell_study import CellStudy

MOST_TIMES = 2  # a cell never gets more than this many times its share of the trials


@dataclass(frozen=True)
class Budget:
    """What a search may spend beside the trials of its plans; fields as in `SearchConfig`."""

    max_epochs_total: int | None = None
    adaptive_share: float = 0.0
    deadline_s: float | None = None
    """On the clock of `time.monotonic`; no trial starts later, or that would miss it at the cell's pace so far."""


class Allocation:
    """Serves the cells of a search.

    Args:
        cells: The studies in the order of their plans; source cells come before those that start from them.
        budget: What the search may spend.
        deterministic: Decide only when what the decision looks at can no longer change.
        transfer: Let cells wait for the winners of their source cells where that leaves no slot idle (with
            `deterministic`: always).
    """

    def __init__(self, cells: Sequence[CellStudy], budget: Budget, *, deterministic: bool, transfer: bool) -> None:
        self._cells = list(cells)
        self._by_key = {cell.plan.key: cell for cell in cells}
        self._budget = budget
        self._deterministic = deterministic
        self._transfer = transfer
        self._rounds = list(cells[0].study.user_attrs.get("rounds", [])) if deterministic else []
        for cell in cells:
            cell.allowed = cell.plan.num_trials - math.floor(cell.plan.num_trials * budget.adaptive_share)
        for allowed in self._rounds:
            self._allow(allowed)

    def next_cell(self) -> tuple[CellStudy, int] | None:
        """The cell that gets the next trial, and how many of its trials the budget has room for; none for now."""
        open_cells = [cell for cell in self._cells if cell.remaining and self._room(cell)]
        if self._deterministic:
            if not open_cells and not any(cell.running for cell in self._cells) and self._begin_round():
                open_cells = [cell for cell in self._cells if cell.remaining and self._room(cell)]
            open_cells = [cell for cell in open_cells if cell.can_draw and self._is_ready(cell)]
        elif not open_cells:
            cell = self._next_extra(self._num_extra())
            if cell is None:
                return None
            cell.allowed = cell.started + 1
            return cell, 1
        if not open_cells:
            return None
        cell = self._most_urgent(open_cells)
        return cell, self._room(cell)

    def is_settled(self, cell: CellStudy) -> bool:
        """Whether the cell had its equal share, so that others may start from its winner."""
        return cell.running == 0 and (cell.remaining == 0 or self._room(cell) == 0)

    def source_cells(self, cell: CellStudy) -> list[CellStudy]:
        """The cells whose winners a cell tries first; none where transfer is off."""
        return [self._by_key[key] for key in cell.plan.source_cells] if self._transfer else []

    def _most_urgent(self, candidates: Sequence[CellStudy]) -> CellStudy:
        """Cells whose source cells are settled go first, a few trials side by side, so that others can start from them.

        Without transfer, and where hours may end the search at any time, the cell that is furthest behind goes first.
        """
        if not self._transfer or self._budget.deadline_s is not None:
            return min(candidates, key=lambda cell: cell.started / cell.plan.num_trials)
        ready = [cell for cell in candidates if self._is_ready(cell)]
        narrow = [cell for cell in ready if cell.running < max(2, cell.plan.num_trials // 4)]
        begun = [cell for cell in candidates if cell.started]
        return (narrow or ready or begun or list(candidates))[0]

    def _is_ready(self, cell: CellStudy) -> bool:
        return all(self.is_settled(source) for source in self.source_cells(cell))

    def _room(self, cell: CellStudy) -> int:
        """Trials for which the cell's share has room; a share has room for one trial at least."""
        if self._misses_deadline(cell):
            return 0
        most = self._budget.max_epochs_total
        if most is None or self._rounds:
            return cell.remaining
        share = max(int(most * (1 - self._budget.adaptive_share) / len(self._cells)), cell.plan.num_epochs)
        left = (share - cell.epochs_spent - cell.epochs_reserved) // cell.plan.num_epochs
        return max(0, min(cell.remaining, left))

    def _misses_deadline(self, cell: CellStudy) -> bool:
        deadline_s = self._budget.deadline_s
        return deadline_s is not None and time.monotonic() + cell.trial_s >= deadline_s

    def _num_extra(self) -> int:
        """Trials that the budget still has for anyone; those of cells that gave up are not counted."""
        cells = [cell for cell in self._cells if not cell.gave_up]
        left = sum(cell.plan.num_trials - cell.started for cell in cells)
        if cells and self._budget.max_epochs_total is not None:
            spent = sum(cell.epochs_spent + cell.epochs_reserved for cell in self._cells)
            left = min(left, (self._budget.max_epochs_total - spent) // cells[0].plan.num_epochs)
        return max(0, left)

    def _next_extra(self, num_extra: int, granted: Mapping[str, int] | None = None) -> CellStudy | None:
        """Who gets an extra trial, of `num_extra` that are left, after those that are granted already.

        A group in which some study is behind is served first. A new round of a group begins only where the budget has
        room for all of it.
        """
        given = granted or {}

        def started(cell: CellStudy) -> int:
            return cell.started + given.get(cell.plan.key, 0)

        groups = [group for group in self._groups(given) if num_extra > 0]
        for group in groups:
            if started(group[0]) < started(group[-1]):
                return group[0]
        # A group that got extra trials in this round already is taken to be surer by as many.
        whole = [group for group in groups if len(group) <= num_extra]
        if not whole:
            return None
        least_certain = max(
            whole, key=lambda group: max(uncertainty(each) / (1 + given.get(each.plan.key, 0)) for each in group)
        )
        return least_certain[0]

    def _groups(self, given: Mapping[str, int]) -> list[list[CellStudy]]:
        """Studies that are compared with each other and may go on, those with the fewest trials first."""
        groups: dict[str, list[CellStudy]] = {}
        for cell in self._cells:
            if not cell.gave_up:
                groups.setdefault(cell.plan.group or cell.plan.key, []).append(cell)
        ordered = [
            sorted(group, key=lambda each: each.started + given.get(each.plan.key, 0))
            for group in groups.values()
            if not any(self._misses_deadline(each) for each in group)
        ]
        return [
            group
            for group in ordered
            if group[0].started + given.get(group[0].plan.key, 0) < MOST_TIMES * group[0].plan.num_trials
        ]

    def _begin_round(self) -> bool:
        """Give out half of what is left, or all of it once that is little; whether there was anything."""
        num_extra = self._num_extra()
        wanted = num_extra if num_extra <= len(self._cells) else (num_extra + 1) // 2
        granted: dict[str, int] = {}
        while (given := sum(granted.values())) < num_extra:
            cell = self._next_extra(num_extra - given, granted)
            if cell is None or (given >= wanted and self._is_level(granted)):
                break
            granted[cell.plan.key] = granted.get(cell.plan.key, 0) + 1
        if not granted:
            return False
        allowed = {cell.plan.key: cell.done + granted.get(cell.plan.key, 0) for cell in self._cells}
        self._rounds.append(allowed)
        self._cells[0].study.set_user_attr("rounds", self._rounds)
        self._allow(allowed)
        return True

    def _is_level(self, granted: Mapping[str, int]) -> bool:
        """Whether all studies of every group would have the same number of trials."""
        counts = [[each.started + granted.get(each.plan.key, 0) for each in group] for group in self._groups(granted)]
        return all(min(group) == max(group) for group in counts)

    def _allow(self, allowed: dict[str, int]) -> None:
        for key, count in allowed.items():
            self._by_key[key].allowed = count


def uncertainty(cell: CellStudy) -> float:
    """Probability that a cell's winner is not the best that could be named, in [0, 1].

    Either chance alone put it before another trial: values are shares of n validation images, so each has a standard
    error of sqrt(p (1 - p) / n), and the difference of two has sqrt(2) times that. Or a next trial beats it, which for
    exchangeable trials happens with probability 1 / (number of trials + 1). A cell without a whole trial is uncertain.
    """
    trials = cell.trials()
    values = sorted((trial.value or 0.0 for trial in trials if trial.state == TrialState.COMPLETE), reverse=True)
    if not values:
        return 1.0
    num_ended = sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in trials)
    images = cell.plan.num_validation_images
    best = min(max(values[0], 0.0), 1.0)
    error = math.sqrt(2 * max(best * (1 - best), 0.5 / images) / images)
    is_best = 1 - 1 / (num_ended + 1)
    for value in values[1:]:
        is_best *= 1 - 0.5 * math.erfc((values[0] - value) / (error * math.sqrt(2)))
    return 1 - is_best
