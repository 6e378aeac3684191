"""The trials of all cells, in one Tune run, and what came of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from optuna.storages import BaseStorage

from refilled.config import SearchConfig
from refilled.data.views import Views
from refilled.embedding_cache.site import bank_pays, epochs_with_teacher
from refilled.errors import UserError
from tune.backend.cluster import Resources
from tune.backend.tuner import run_trials, trial_function
from tune.plan import Plan
from tune.progress import Progress
from tune.refits import Winner
from tune.studies.searcher import Budget, Rules, StudyScheduler, StudySearcher
from tune.studies.warm_start import Brought, brought
from tune.tracking.recorder import Recorder, SearchCallback, cell_progress, record_earlier_trials


@dataclass(frozen=True)
class SweepResult:
    """What the trials of a search came to.

    Attributes:
        winners: by the cell's name; a cell without a whole trial has none.
        brought: what neighbours' winners brought to each cell that has a winner.
        epochs: that this command's trials trained.
        epochs_shared: that this command's trials took from other trials' embedding stages instead.
        trials: that ended in this command, however they did.
    """

    winners: dict[str, Winner]
    brought: dict[str, Brought]
    epochs: int
    epochs_shared: int
    trials: int

    def to_json(self) -> dict[str, Any]:
        """For the search's own record."""
        return {
            "epochs": self.epochs,
            "epochs_shared": self.epochs_shared,
            "trials": self.trials,
            "transfer": {name: each.to_json() for name, each in self.brought.items()},
        }


def run_search(
    plan: Plan,
    study_storage: BaseStorage,
    recorder: Recorder,
    progress: Progress,
    resources: Resources,
    *,
    deadline_s: float | None,
) -> SweepResult:
    """Search every cell until the budget is spent.

    Args:
        plan: the search.
        study_storage: of Optuna.
        recorder: mirrors trials to MLflow.
        progress: shows them.
        resources: of a trial.
        deadline_s: on the clock of `time.monotonic`; no trial starts later.

    Raises:
        UserError: no trial can go on, such as with a full disk; the next start continues.
    """
    search = plan.search
    cells = {cell.name: cell for cell in plan.cells}
    budget = Budget(
        max_epochs_total=search.max_epochs_total, adaptive_share=search.adaptive_share, deadline_s=deadline_s
    )
    searcher = StudySearcher(list(plan.studies.values()), study_storage, rules_of(search), budget)
    before = [searcher.counts(name) for name in cells]
    record_earlier_trials(plan, {name: searcher.trials(name) for name in cells}, recorder)
    _say_what_banks_will_do(plan, progress)
    progress.start_trials(cell_progress(plan, searcher))
    run_trials(
        trial_function(
            resources,
            plan.storage,
            num_sharing_runs=plan.num_sharing_runs(search.trials),
            backend=search.trial_backend,
            share_embeddings=search.share_embeddings,
        ),
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
    winners, brought_by_cell = {}, {}
    for name, cell in cells.items():
        best = searcher.best(name)
        if best is not None:
            winners[name] = Winner(cell, best, asdict(searcher.counts(name)))
            brought_by_cell[name] = brought(searcher.trials(name), best)
    return SweepResult(
        winners=winners,
        brought=brought_by_cell,
        epochs=sum(each.epochs for each in after) - sum(each.epochs for each in before),
        epochs_shared=sum(each.epochs_shared for each in after) - sum(each.epochs_shared for each in before),
        trials=sum(each.done + each.failed for each in after) - sum(each.done + each.failed for each in before),
    )


def rules_of(search: SearchConfig) -> Rules:
    """How a search's studies draw and judge."""
    return Rules(
        seed=search.run.seed,
        sampler=search.sampler,
        pruner=search.pruner,
        transfer=search.transfer,
        share_embeddings=search.share_embeddings,
        deterministic=search.deterministic,
        generation=search.generation,
    )


def describe(result: SweepResult) -> list[str]:
    """What transfer and sharing brought, in a sentence each."""
    lines = []
    received = [each for each in result.brought.values() if each.sources]
    gains = [each.gain for each in received if each.gain is not None]
    if received:
        better = f", on average {100 * sum(gains) / len(gains):+.2f} points over the default settings" if gains else ""
        lines.append(
            f"Transfer: {len(received)} of {len(result.brought)} cells tried neighbours' best settings"
            f"{better}; one of them won in {sum(each.won for each in received)}."
        )
    if result.epochs_shared:
        total = result.epochs + result.epochs_shared
        lines.append(
            f"Shared embedding stages saved {result.epochs_shared} of {total} epochs "
            f"({100 * result.epochs_shared / total:.0f} %)."
        )
    return lines


def _say_what_banks_will_do(plan: Plan, progress: Progress) -> None:
    """The two costs by which every trial decides, which otherwise only the workers' logs hold."""
    most = max((cell.run for cell in plan.cells), key=epochs_with_teacher)
    epochs = epochs_with_teacher(most)
    if not epochs:
        return
    num_views, sharing = len(Views(most.views).view_ids), plan.num_sharing_runs(plan.search.trials)
    built = {"bank": True, "live": False, "auto": bank_pays(most, num_views, sharing)}[most.bank.mode]
    progress.note(
        f"Teacher's passes over the data, for each overlap: {num_views} to fill a bank of all views, up to "
        f"{sharing * epochs} for {sharing} trials of {epochs} epochs without: "
        f"{'banks are used' if built else 'the teacher runs in every step, unless a bank is there already'}."
    )
