"""All Optuna studies of a search behind one Ray Tune Searcher and one Scheduler.

The Optuna storage is the record of the trials. What is written to it:

- every row's `val_accuracy`, once, as the intermediate value at step `epoch`, before anyone decides about the row;
- COMPLETE with `best_val_accuracy`, when the last row of a whole run was seen;
- PRUNED, when the study's own pruner stopped the trial;
- FAIL for everything else: an error, a value that is not finite, no row, an end before the last epoch.

A driver that starts again finds RUNNING trials of the one before and takes them over: their runs continue from their
folders and report their rows again, of which each is stored once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from refilled.metrics import END, EpochMetrics, TrialEnd
from tune.studies.allocation import Allocation, Budget
from tune.studies.cell_study import CellStudy, Counts, Rules
from tune.studies.study_store import StudyPlan, open_storage, overrides_of

__all__ = ["Budget", "Counts", "Rules", "StudyPlan", "StudyScheduler", "StudySearcher", "open_storage", "overrides_of"]

Report = Mapping[str, Any]
"""What a trial reports: an epoch's row, or how it ended, as a dict, with fields that Tune adds."""
MAX_LOST_STARTS = 5  # of one trial, before it is taken for the reason itself


@dataclass
class _Live:
    """A trial that Tune runs, and what is known of it so far."""

    cell: CellStudy
    trial: optuna.Trial
    values: dict[int, float]  # by epoch, those reported under an earlier driver included
    decisions: dict[int, bool] = field(default_factory=dict)  # epoch -> whether to stop there
    last_row: EpochMetrics | None = None
    end: TrialEnd | None = None


class StudySearcher(Searcher):  # type: ignore[misc]  # Ray has no types
    """Serves all cells of a search in one Tune run.

    Only one live driver a study: trials that another driver runs would be taken for a dead driver's.

    Args:
        plans: The studies, source cells before those that start from them.
        storage: An Optuna storage, as from `open_storage`.
        rules: How trials are drawn and judged.
        budget: What the search may spend beside the plans' trials.

    Attributes:
        stopped_because: Why no trial goes on, such as a full disk; those that ran then stay RUNNING in their studies,
            to be taken over by the next driver. Empty while all is well.
    """

    def __init__(
        self,
        plans: Sequence[StudyPlan],
        storage: BaseStorage,
        rules: Rules = Rules(),  # noqa: B008  # frozen
        budget: Budget = Budget(),  # noqa: B008  # frozen
    ) -> None:
        super().__init__()
        for what, names in (("key", [plan.key for plan in plans]), ("name", [plan.name for plan in plans])):
            if len(set(names)) < len(names):
                raise ValueError(f"every study plan needs its own {what}, got {names}")
        self._cells = {plan.key: CellStudy(plan, storage, rules) for plan in plans}
        self._allocation = Allocation(
            list(self._cells.values()), budget, deterministic=rules.deterministic, transfer=rules.transfer
        )
        for cell in self._cells.values():
            for source in self._allocation.source_cells(cell):
                cell.learn_from(source, is_settled=False)
            cell.resume()
        self._live: dict[str, _Live] = {}
        self.stopped_because = ""
        self._lost_starts: Counter[tuple[str, int]] = Counter()  # by cell and number
        self._requeued: set[str] = set()  # Tune's ids of trials that are handed out again under another id

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial.

        Returns:
            `cell` (the plan's key), `number` (in its study), `origin` (default, transfer or sampled),
            `overrides` (dotted) and `config` (the whole run as a dict); or None while running trials may still need a
            successor; or FINISHED, which Tune takes as final.
        """
        if self.stopped_because:
            return None if self._live else str(Searcher.FINISHED)
        chosen = self._allocation.next_cell()
        if chosen is None:
            if self._live:
                return None
            for cell in self._cells.values():
                cell.drop_leftovers()
            return str(Searcher.FINISHED)
        cell, room = chosen
        for source in self._allocation.source_cells(cell):
            cell.learn_from(source, is_settled=self._allocation.is_settled(source))
        trial = cell.next_trial(room)
        if trial is None:
            return None
        stored = cell.study.get_trials(deepcopy=False)[trial.number]
        self._live[trial_id] = _Live(cell, trial, values=dict(stored.intermediate_values))
        overrides = overrides_of(stored)
        return {
            "cell": cell.plan.key,
            "number": trial.number,
            "origin": stored.user_attrs.get("origin", "sampled"),
            "overrides": overrides,
            "config": cell.plan.run.with_overrides(overrides).to_dict(),
        }

    def on_trial_result(self, trial_id: str, result: Report) -> None:
        """Store a row. Tune calls this after the scheduler, and not for a row at which the scheduler stopped."""
        live = self._live.get(trial_id)
        if live is None:
            return
        if END in result:
            live.end = TrialEnd.from_dict(result)
            if live.end.is_of_all:
                self.stopped_because = live.end.reason
        elif "epoch" in result:
            self._note_row(live, EpochMetrics.from_dict(result))

    def _note_row(self, live: _Live, row: EpochMetrics) -> None:
        live.last_row = row
        if row.val_accuracy is not None and row.epoch not in live.values:
            live.trial.report(row.val_accuracy, row.epoch)
            live.values[row.epoch] = row.val_accuracy
            epochs, seconds = live.cell.pace
            live.cell.pace = epochs + 1, seconds + row.epoch_s

    def should_prune(self, trial_id: str, result: Report) -> bool:
        """Store a row, then ask the study's pruner about it; the last row of a whole run is never pruned.

        An epoch is judged once: a row that is reported again (Tune repeats the last one when a function returns, a
        trial that Tune restarts repeats all) gets the first answer.
        """
        self.on_trial_result(trial_id, result)
        live = self._live.get(trial_id)
        if live is None or live.last_row is None or live.end is not None:
            return False
        row = live.last_row
        if row.epoch not in live.decisions:
            is_newest = row.epoch == max(live.values, default=row.epoch)
            live.decisions[row.epoch] = is_newest and not row.finished and live.trial.should_prune()
        return live.decisions[row.epoch]

    def on_trial_complete(self, trial_id: str, result: Report | None = None, error: bool = False) -> None:
        """Store how a trial ended. A whole run counts even if its process failed afterwards."""
        if result:
            self.on_trial_result(trial_id, result)
        live = self._live.pop(trial_id, None)
        if live is None or (live.end is not None and live.end.is_of_all):
            return
        if trial_id in self._requeued:
            live.cell.requeue(live.trial)
            return
        cell, trial, row = live.cell, live.trial, live.last_row
        is_done = live.end is None and row is not None
        if is_done and row is not None and row.finished and row.best_val_accuracy is not None:
            trial.set_user_attr("epoch", row.best_epoch)
            cell.study.tell(trial, row.best_val_accuracy)
        elif is_done and row is not None and live.decisions.get(row.epoch, False):
            trial.set_user_attr("epoch", max(live.values))
            cell.study.tell(trial, state=TrialState.PRUNED)
        else:
            trial.set_user_attr("failure", _failure(live, error))
            cell.study.tell(trial, state=TrialState.FAIL)
            is_done = False
        cell.ended(is_done=is_done, epochs=len(live.values))

    def on_actor_lost_before_start(self, trial_id: str) -> None:
        """A trial's actor was lost before the trial began, after which Tune does not retry.

        The trial is handed out again, under a new id of Tune's and the same number, up to `MAX_LOST_STARTS` times.
        """
        live = self._live.get(trial_id)
        if live is None:
            return
        place = live.cell.plan.key, live.trial.number
        self._lost_starts[place] += 1
        if self._lost_starts[place] <= MAX_LOST_STARTS:
            self._requeued.add(trial_id)

    def will_retry(self, trial_id: str) -> bool:
        """Whether a trial that failed for Tune is handed out again."""
        return trial_id in self._requeued

    def best(self, key: str) -> FrozenTrial | None:
        """The complete trial with the highest value, the earliest of equals; none where no trial completed."""
        return self._cells[key].best()

    def trials(self, key: str) -> list[FrozenTrial]:
        """All trials of a cell's study, over all drivers it had."""
        return self._cells[key].study.get_trials(deepcopy=True)

    def counts(self, key: str) -> Counts:
        """How the trials of a cell's study ended."""
        return self._cells[key].counts()

    def allowed(self, key: str) -> int:
        """Complete or pruned trials that a cell may have by now; extra trials raise it."""
        return self._cells[key].allowed

    def remaining(self, key: str) -> int:
        """Trials of a cell that are still to be started."""
        return self._cells[key].remaining

    def gave_up(self, key: str) -> bool:
        """Whether so many trials failed since the study was opened that no more are started."""
        return self._cells[key].gave_up

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: Mapping[str, Any], **spec: Any
    ) -> bool:
        """Tune's own metric and mode change nothing here."""
        return True

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Leave the limit to Tune's ConcurrencyLimiter."""
        return False

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: Tune calls this every few seconds, and the storage holds everything already."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing, for the same reason."""

    def restore_from_dir(self, checkpoint_dir: str) -> None:
        """Refuse: a search is continued by starting it again."""
        raise RuntimeError("the Optuna storage is the record of a search; start the search again to continue it")

    def restore(self, checkpoint_path: str) -> None:
        """Refuse: a search is continued by starting it again."""
        self.restore_from_dir(checkpoint_path)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its whole configuration into a file, where the storage's password must not be."""
        return {}


class StudyScheduler(FIFOScheduler):  # type: ignore[misc]  # Ray has no types
    """First come, first served; a study's pruner decides whether a trial goes on."""

    _supports_buffered_results = False  # a buffered row would be judged epochs after the trial went past it

    def __init__(self, searcher: StudySearcher) -> None:
        super().__init__()
        self._searcher = searcher

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Tune gave a trial up; called before the searcher's `on_trial_complete`."""
        if trial.status == trial.PENDING:
            self._searcher.on_actor_lost_before_start(trial.trial_id)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Report) -> str:
        """Store the row and ask the pruner; Tune calls this before it calls the searcher."""
        is_over = self._searcher.should_prune(trial.trial_id, result)
        return str(TrialScheduler.STOP if is_over else TrialScheduler.CONTINUE)


def _failure(live: _Live, error: bool) -> str:
    if live.end is not None:
        return live.end.reason
    if error:
        return "the trial raised an error"
    return "the trial reported no row" if live.last_row is None else "the trial ended before its last epoch"
