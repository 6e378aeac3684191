"""The trials of all cells, in one Tune run, and what came of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from optuna.storages import BaseStorage

from refilled.config import SearchConfig
from refilled.errors import UserError
from tune.backend.cluster import Resources
from tune.backend.tuner import run_trials, trial_function
from tune.plan import Plan
from tune.progress import Progress
from tune.refits import Winner
from tune.studies.searcher import Budget, Rules, StudyScheduler, StudySearcher
from tune.studies.warm_start import WarmStartReport, warm_start_report
from tune.tracking.recorder import Recorder, SearchCallback, cell_progress, record_earlier_trials


@dataclass(frozen=True)
class TrialsResult:
    """What the trials of a search came to.

    Attributes:
        winners: Best trials by the study's name; a study without a whole trial has none.
        warm_starts: How warm starts did, for each study that has a winner.
        epochs: Epochs that this command's trials trained.
        trials: Trials that ended in this command, however they did.
    """

    winners: dict[str, Winner]
    warm_starts: dict[str, WarmStartReport]
    epochs: int
    trials: int

    def to_json(self) -> dict[str, Any]:
        """For the search's own record."""
        return {
            "epochs": self.epochs,
            "trials": self.trials,
            "transfer": {name: each.to_json() for name, each in self.warm_starts.items()},
        }


def run_search(
    plan: Plan,
    study_storage: BaseStorage,
    recorder: Recorder,
    progress: Progress,
    resources: Resources,
    *,
    deadline_s: float | None,
) -> TrialsResult:
    """Search every cell until the budget is spent.

    Args:
        plan: The search's plan.
        study_storage: Optuna's storage.
        recorder: Gives MLflow the trials.
        progress: Shows them.
        resources: What a trial takes, and how many fit.
        deadline_s: A time of `time.monotonic`; no trial starts later.

    Raises:
        UserError: No trial can go on, such as with a full disk; the next start continues.
    """
    search = plan.search
    cells = {cell.name: cell for cell in plan.cells}
    budget = Budget(
        max_epochs_total=search.max_epochs_total, adaptive_share=search.adaptive_share, deadline_s=deadline_s
    )
    searcher = StudySearcher(list(plan.studies.values()), study_storage, rules_of(search), budget)
    before = [searcher.counts(name) for name in cells]
    record_earlier_trials(plan, {name: searcher.trials(name) for name in cells}, recorder)
    progress.start_trials(cell_progress(plan, searcher))
    run_trials(
        trial_function(resources, plan.storage, backend=search.trial_backend),
        searcher,
        StudyScheduler(searcher),
        slots=resources.slots,
        name=f"search-{plan.key}",
        storage=plan.storage,
        callbacks=[SearchCallback(cells, searcher, recorder, progress)],
    )
    if searcher.stopped_because:
        raise UserError(searcher.stopped_because)
    after = [searcher.counts(name) for name in cells]
    winners, warm_starts = {}, {}
    for name, cell in cells.items():
        best = searcher.best(name)
        if best is not None:
            winners[name] = Winner(cell, best, asdict(searcher.counts(name)))
            warm_starts[name] = warm_start_report(searcher.trials(name), best)
    return TrialsResult(
        winners=winners,
        warm_starts=warm_starts,
        epochs=sum(each.epochs for each in after) - sum(each.epochs for each in before),
        trials=sum(each.done + each.failed for each in after) - sum(each.done + each.failed for each in before),
    )


def rules_of(search: SearchConfig) -> Rules:
    """How a search's studies draw and judge."""
    return Rules(
        seed=search.run.seed,
        sampler=search.sampler,
        pruner=search.pruner,
        transfer=search.transfer,
        deterministic=search.deterministic,
        trial_batch=search.trial_batch,
    )


def describe(result: TrialsResult) -> list[str]:
    """How warm starts did, in a sentence."""
    lines = []
    warm = [each for each in result.warm_starts.values() if each.sources]
    gains = [each.gain for each in warm if each.gain is not None]
    if warm:
        better = f", on average {100 * sum(gains) / len(gains):+.2f} points over the default settings" if gains else ""
        lines.append(
            f"Warm start: {len(warm)} of {len(result.warm_starts)} studies tried the best settings of their source "
            f"cells{better}; one of them won in {sum(each.won for each in warm)}."
        )
    return lines
