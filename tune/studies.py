"""One Optuna study a cell behind one Ray Tune Searcher and one Scheduler.

The Optuna storage is the truth about trials. What is told to it:

- every row's `val_accuracy`, once, as the intermediate value at step `epoch`, before anyone decides about the row;
- COMPLETE with `best_val_accuracy`, when the last row of a whole run was seen;
- PRUNED, when the study's own pruner stopped the trial;
- FAIL for everything else: an error, a value that is not finite, no row, an end before the last epoch.

A driver that starts again finds RUNNING trials of the one before: they become FAIL, their points are tried again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from tune.ledger import StudyPlan, carry_over_values, open_storage, open_study, overrides_of
from tune.pruning import HalvingPruner, halving_rungs
from tune.space import sample

__all__ = ["Counts", "StudyPlan", "StudyScheduler", "StudySearcher", "halving_pruner", "open_storage", "overrides_of"]

Row = Mapping[str, Any]
DONE = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Counts:
    """How a study's trials ended, over all drivers it had."""

    complete: int
    pruned: int
    failed: int
    running: int

    @property
    def done(self) -> int:
        """Trials that count towards `num_trials`."""
        return self.complete + self.pruned


@dataclass
class _Live:
    """A trial that Tune runs, and what is known of it so far."""

    cell: _Cell
    trial: optuna.Trial
    told: dict[int, float]  # epoch -> value; with the epochs of the interrupted trial that it goes on with
    decisions: dict[int, bool] = field(default_factory=dict)  # epoch -> whether to stop there
    is_finite: bool = True
    last_row: Row | None = None


@dataclass
class _Cell:
    """A study and how far this driver is with it."""

    plan: StudyPlan
    study: optuna.Study
    done: int = field(init=False)
    running: int = 0
    failed: int = 0  # since this driver opened the study

    def __post_init__(self) -> None:
        self.done = sum(trial.state in DONE for trial in self.study.get_trials(deepcopy=False))

    @property
    def remaining(self) -> int:
        return 0 if self.gave_up else max(0, self.plan.num_trials - self.done - self.running)

    @property
    def gave_up(self) -> bool:
        return self.failed > max(2, self.plan.num_trials // 2)

    @property
    def is_closed(self) -> bool:
        """No trial will be needed any more, however the running ones end."""
        return self.gave_up or self.done >= self.plan.num_trials

    @property
    def progress(self) -> float:
        return (self.done + self.running) / self.plan.num_trials


def halving_pruner(plan: StudyPlan) -> BasePruner:
    """Asynchronous halving within the cell, by epoch."""
    return HalvingPruner(halving_rungs(plan.num_epochs))


class StudySearcher(Searcher):  # type: ignore[misc]  # Ray has no types
    """Serves all cells of a search in one Tune run, the one that is furthest behind first.

    Only one live driver a study: trials that another driver runs would be taken for a dead driver's.

    Args:
        plans: the cells.
        storage: from `open_storage`, or any Optuna storage.
        seed: of the samplers; with it goes the cell's name and how many trials the study already holds, so that a
            continued study does not draw the same points again.
        make_pruner: makes a cell's pruner.
    """

    def __init__(
        self,
        plans: Sequence[StudyPlan],
        storage: BaseStorage,
        *,
        seed: int,
        make_pruner: Callable[[StudyPlan], BasePruner] = halving_pruner,
    ) -> None:
        super().__init__()
        for what, names in (("key", [plan.key for plan in plans]), ("name", [plan.name for plan in plans])):
            if len(set(names)) < len(names):
                raise ValueError(f"every study plan needs its own {what}, got {names}")
        self._cells = {
            plan.key: _Cell(plan, open_study(plan, storage, seed=seed, pruner=make_pruner(plan))) for plan in plans
        }
        self._live: dict[str, _Live] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial of the cell that is furthest behind.

        Returns:
            `cell` (the plan's key), `number` (in its study), `overrides` (dotted) and `config` (the whole run as a
            dict); or None while running trials may still need a successor; or FINISHED, which Tune takes as final.
        """
        open_cells = [cell for cell in self._cells.values() if cell.remaining]
        if not open_cells:
            is_over = all(cell.is_closed for cell in self._cells.values())
            return str(Searcher.FINISHED) if is_over else None
        cell = min(open_cells, key=lambda each: each.progress)
        trial = cell.study.ask()
        overrides = sample(trial, cell.plan.run)
        trial.set_user_attr("overrides", overrides)
        self._live[trial_id] = _Live(cell, trial, told=carry_over_values(cell.study, trial))
        cell.running += 1
        return {
            "cell": cell.plan.key,
            "number": trial.number,
            "overrides": overrides,
            "config": cell.plan.run.with_overrides(overrides).to_dict(),
        }

    def on_trial_result(self, trial_id: str, result: Row) -> None:
        """Tell a row. Tune calls this after the scheduler, and not for a row at which the scheduler stopped."""
        live = self._live.get(trial_id)
        if live is None or "val_accuracy" not in result:
            return
        if live.last_row is None and "run_key" in result:
            live.trial.set_user_attr("run_key", result["run_key"])
        live.last_row = dict(result)
        epoch, value = int(result["epoch"]), float(result["val_accuracy"])
        if not math.isfinite(value) or not math.isfinite(result.get("best_val_accuracy", 0.0)):
            live.is_finite = False
        elif epoch not in live.told:
            live.trial.report(value, epoch)
            live.told[epoch] = value

    def should_prune(self, trial_id: str, row: Row) -> bool:
        """Tell a row, then ask the study's pruner about it; the last row of a whole run is never pruned.

        An epoch is judged once: a row that comes again (Tune repeats the last one when a function returns, a trial
        that Tune restarts repeats all) gets the first answer again.
        """
        self.on_trial_result(trial_id, row)
        live = self._live.get(trial_id)
        if live is None or "val_accuracy" not in row:
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
        if live is None:
            return
        cell, trial, row = live.cell, live.trial, live.last_row
        cell.running -= 1
        if live.is_finite and row is not None and row.get("finished", False) and "best_val_accuracy" in row:
            if "best_epoch" in row:
                trial.set_user_attr("epoch", int(row["best_epoch"]))
            cell.study.tell(trial, float(row["best_val_accuracy"]))
            cell.done += 1
        elif live.is_finite and row is not None and live.decisions.get(int(row["epoch"]), False):
            trial.set_user_attr("epoch", max(live.told))
            cell.study.tell(trial, state=TrialState.PRUNED)
            cell.done += 1
        else:
            trial.set_user_attr("failure", _failure(live, error))
            cell.study.tell(trial, state=TrialState.FAIL)
            cell.failed += 1

    def best(self, key: str) -> FrozenTrial | None:
        """The complete trial with the highest value, the earliest of equals; none where no trial completed."""
        complete = self._cells[key].study.get_trials(deepcopy=True, states=(TrialState.COMPLETE,))
        return max(complete, key=lambda trial: (trial.value, -trial.number), default=None)

    def trials(self, key: str) -> list[FrozenTrial]:
        """All trials of a cell's study, over all drivers it had."""
        return self._cells[key].study.get_trials(deepcopy=True)

    def counts(self, key: str) -> Counts:
        """How the trials of a cell's study ended."""
        states = [trial.state for trial in self._cells[key].study.get_trials(deepcopy=False)]
        return Counts(
            complete=states.count(TrialState.COMPLETE),
            pruned=states.count(TrialState.PRUNED),
            failed=states.count(TrialState.FAIL),
            running=states.count(TrialState.RUNNING),
        )

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

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Row) -> str:
        """Tell the row and ask; Tune calls this before it calls the searcher."""
        is_over = self._searcher.should_prune(trial.trial_id, result)
        return str(TrialScheduler.STOP if is_over else TrialScheduler.CONTINUE)


def _failure(live: _Live, error: bool) -> str:
    if not live.is_finite:
        return "a validation accuracy was not finite"
    if error:
        return "the trial raised an error"
    return "the trial reported no row" if live.last_row is None else "the trial ended before its last epoch"
