"""One Optuna study a cell behind one Ray Tune Searcher and one Scheduler.

The Optuna storage is the truth about trials. What is told to it:

- every row's `val_accuracy`, once, as the intermediate value at step `epoch`, before anyone decides about the row;
- COMPLETE with `best_val_accuracy`, when the last row of a whole run was seen;
- PRUNED, when the study's own pruner stopped the trial;
- FAIL for everything else: an error, a value that is not finite, no row, an end before the last epoch.

A driver that starts again finds RUNNING trials of the one before and takes them over: their runs continue from their
folders and repeat their rows, of which each is told once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from tune.backend.worker import STOP_SEARCH
from tune.studies.allocation import Allocation, Budget
from tune.studies.cell_study import CellStudy, Rules
from tune.studies.study_store import StudyPlan, epochs_shared, epochs_trained, open_storage, overrides_of

__all__ = ["Budget", "Counts", "Rules", "StudyPlan", "StudyScheduler", "StudySearcher", "open_storage", "overrides_of"]

Row = Mapping[str, Any]
MAX_LOST_STARTS = 5  # of one trial, before it is taken for the reason itself


@dataclass(frozen=True)
class Counts:
    """How a study's trials ended, over all drivers it had, and the epochs they trained and took from others."""

    complete: int
    pruned: int
    failed: int
    running: int
    epochs: int
    epochs_shared: int

    @property
    def done(self) -> int:
        """Trials that count towards the budget."""
        return self.complete + self.pruned


@dataclass
class _Live:
    """A trial that Tune runs, and what is known of it so far."""

    cell: CellStudy
    trial: optuna.Trial
    told: dict[int, float]  # epoch -> value; with the epochs that it told under an earlier driver
    decisions: dict[int, bool] = field(default_factory=dict)  # epoch -> whether to stop there
    shared: set[int] = field(default_factory=set)  # epochs of another trial's embedding stage
    is_finite: bool = True
    last_row: Row | None = None
    stopped_because: str = ""


class StudySearcher(Searcher):  # type: ignore[misc]  # Ray has no types
    """Serves all cells of a search in one Tune run.

    Only one live driver a study: trials that another driver runs would be taken for a dead driver's.

    Args:
        plans: the cells, donors before those that they give to.
        storage: from `open_storage`, or any Optuna storage.
        rules: how trials are drawn and judged.
        budget: beside the plans' trials.

    Attributes:
        stopped_because: why no trial goes on, such as a full disk; those that ran then stay RUNNING in their studies,
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
            for donor in self._allocation.donors(cell):
                cell.learn_from(donor, is_settled=False)
            cell.resume()
        self._live: dict[str, _Live] = {}
        self.stopped_because = ""
        self._lost_starts: Counter[tuple[str, int]] = Counter()  # by cell and number
        self._to_repeat: set[str] = set()  # ids, of Tune's, of trials that are handed out again under another id

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial.

        Returns:
            `cell` (the plan's key), `number` (in its study), `origin` (default, transfer, reuse or sampled),
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
        for donor in self._allocation.donors(cell):
            cell.learn_from(donor, is_settled=self._allocation.is_settled(donor))
        trial = cell.next_trial(room)
        if trial is None:
            return None
        stored = cell.study.get_trials(deepcopy=False)[trial.number]
        self._live[trial_id] = _Live(cell, trial, told=dict(stored.intermediate_values))
        overrides = overrides_of(stored)
        return {
            "cell": cell.plan.key,
            "number": trial.number,
            "origin": stored.user_attrs.get("origin", "sampled"),
            "overrides": overrides,
            "config": cell.plan.run.with_overrides(overrides).to_dict(),
        }

    def on_trial_result(self, trial_id: str, result: Row) -> None:
        """Tell a row. Tune calls this after the scheduler, and not for a row at which the scheduler stopped."""
        live = self._live.get(trial_id)
        if live is None or "val_accuracy" not in result:
            return
        if STOP_SEARCH in result:
            self.stopped_because = live.stopped_because = str(result[STOP_SEARCH])
            return
        if live.last_row is None and "run_key" in result:
            live.trial.set_user_attr("run_key", result["run_key"])
        live.last_row = dict(result)
        epoch, value = int(result["epoch"]), float(result["val_accuracy"])
        if result.get("shared", False):
            live.shared.add(epoch)
        if not math.isfinite(value) or not math.isfinite(result.get("best_val_accuracy", 0.0)):
            live.is_finite = False
        elif epoch not in live.told:
            live.trial.report(value, epoch)
            live.told[epoch] = value
            if epoch not in live.shared:
                epochs, seconds = live.cell.pace
                live.cell.pace = epochs + 1, seconds + float(result.get("epoch_s", 0.0))

    def should_prune(self, trial_id: str, row: Row) -> bool:
        """Tell a row, then ask the study's pruner about it; the last row of a whole run is never pruned.

        An epoch is judged once: a row that comes again (Tune repeats the last one when a function returns, a trial
        that Tune restarts repeats all) gets the first answer again.
        """
        self.on_trial_result(trial_id, row)
        live = self._live.get(trial_id)
        if live is None or "val_accuracy" not in row or STOP_SEARCH in row:
            return False
        epoch = int(row["epoch"])
        if epoch not in live.decisions:
            is_newest = epoch == max(live.told, default=epoch)
            may_prune = is_newest and not row.get("finished", False)
            live.decisions[epoch] = not live.is_finite or (may_prune and live.trial.should_prune())
        return live.decisions[epoch]

    def on_trial_complete(self, trial_id: str, result: Row | None = None, error: bool = False) -> None:
        """Tell how a trial ended. A whole run counts even if its process then failed to end in peace."""
        if result:
            self.on_trial_result(trial_id, result)
        live = self._live.pop(trial_id, None)
        if live is None or live.stopped_because:
            return
        if trial_id in self._to_repeat:
            live.cell.again(live.trial)
            return
        cell, trial, row = live.cell, live.trial, live.last_row
        if live.shared:
            trial.set_user_attr("epochs_shared", len(live.shared))
        is_done = True
        if live.is_finite and row is not None and row.get("finished", False) and "best_val_accuracy" in row:
            if "best_epoch" in row:
                trial.set_user_attr("epoch", int(row["best_epoch"]))
            cell.study.tell(trial, float(row["best_val_accuracy"]))
        elif live.is_finite and row is not None and live.decisions.get(int(row["epoch"]), False):
            trial.set_user_attr("epoch", max(live.told))
            cell.study.tell(trial, state=TrialState.PRUNED)
        else:
            trial.set_user_attr("failure", _failure(live, error))
            cell.study.tell(trial, state=TrialState.FAIL)
            is_done = False
        cell.ended(is_done=is_done, epochs=len(live.told) - len(live.shared))

    def lost_while_starting(self, trial_id: str) -> None:
        """A trial's process ended before the trial began, for which Tune gives the trial up at once.

        It is handed out again, under a new id of Tune's and the same number, up to `MAX_LOST_STARTS` times.
        """
        live = self._live.get(trial_id)
        if live is None:
            return
        place = live.cell.plan.key, live.trial.number
        self._lost_starts[place] += 1
        if self._lost_starts[place] <= MAX_LOST_STARTS:
            self._to_repeat.add(trial_id)

    def comes_again(self, trial_id: str) -> bool:
        """Whether what Tune calls a failed trial is handed out again."""
        return trial_id in self._to_repeat

    def best(self, key: str) -> FrozenTrial | None:
        """The complete trial with the highest value, the earliest of equals; none where no trial completed."""
        return self._cells[key].best()

    def trials(self, key: str) -> list[FrozenTrial]:
        """All trials of a cell's study, over all drivers it had."""
        return self._cells[key].study.get_trials(deepcopy=True)

    def counts(self, key: str) -> Counts:
        """How the trials of a cell's study ended."""
        trials = self._cells[key].trials()
        states = [trial.state for trial in trials]
        return Counts(
            complete=states.count(TrialState.COMPLETE),
            pruned=states.count(TrialState.PRUNED),
            failed=states.count(TrialState.FAIL),
            running=states.count(TrialState.RUNNING),
            epochs=sum(epochs_trained(trial) for trial in trials),
            epochs_shared=sum(epochs_shared(trial) for trial in trials),
        )

    def allowed(self, key: str) -> int:
        """Complete or pruned trials that a cell may have by now; extra trials raise it."""
        return self._cells[key].allowed

    def remaining(self, key: str) -> int:
        """Trials of a cell that are still to be started."""
        return self._cells[key].remaining

    def gave_up(self, key: str) -> bool:
        """Whether so many trials failed since the study was opened that no more are started."""
        return self._cells[key].gave_up

    def set_search_properties(self, metric: str | None, mode: str | None, config: Row, **spec: Any) -> bool:
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
    """First come, first served; whether a trial goes on is for its study's pruner to say."""

    _supports_buffered_results = False  # a buffered row would be judged epochs after the trial went past it

    def __init__(self, searcher: StudySearcher) -> None:
        super().__init__()
        self._searcher = searcher

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Tune gave a trial up; called before the searcher is told."""
        if trial.status == trial.PENDING:
            self._searcher.lost_while_starting(trial.trial_id)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Row) -> str:
        """Tell the row and ask; Tune calls this before it calls the searcher."""
        is_over = self._searcher.should_prune(trial.trial_id, result)
        return str(TrialScheduler.STOP if is_over else TrialScheduler.CONTINUE)


def _failure(live: _Live, error: bool) -> str:
    if live.last_row is not None and "failure" in live.last_row:
        return str(live.last_row["failure"])
    if not live.is_finite:
        return "a validation accuracy was not finite"
    if error:
        return "the trial raised an error"
    return "the trial reported no row" if live.last_row is None else "the trial ended before its last epoch"
