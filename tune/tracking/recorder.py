"""What a search tells of its runs, to MLflow and to the person watching."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState
from ray.tune import Callback

from refilled.config import RunConfig
from refilled.metrics import END, EpochMetrics, TrialEnd
from refilled.storage.run_folder import RunFolder
from refilled.student_files import digest_of_files, metrics_of, read_record
from tune.plan import Plan
from tune.progress import CellProgress, Progress
from tune.studies.cells import Cell
from tune.studies.searcher import StudySearcher, overrides_of
from tune.tracking.code_version import code_version
from tune.tracking.outbox import Ending, Status
from tune.tracking.tracker import Tracker

Outcome = Literal["complete", "pruned", "failed"]
_STATUS: dict[Outcome, Status] = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}


class Recorder:
    """Opens and closes the MLflow runs of one search; a run is found again by search and run key."""

    def __init__(self, tracker: Tracker, plan: Plan) -> None:
        self._tracker = tracker
        self._plan = plan
        self._common = {"search_key": plan.key, "code_version": code_version()}

    def start_search(self, name: str | None = None) -> None:
        """Open the parent run."""
        search = self._plan.search
        first = self._plan.cells[0]
        grid = {name: value for name, value in search.flat().items() if not name.startswith("run.")}
        params = grid | {name.removeprefix("run."): value for name, value in search.flat().items() if name not in grid}
        self._tracker.start_search(
            self._plan.key,
            name=name or f"search {self._plan.key}",
            params=params,
            tags={
                **self._common,
                "kind": "search",
                "methods": ", ".join(search.methods),
                "data_digest": first.data_digest,
            },
        )

    def folder(self, cell: Cell, run: RunConfig) -> RunFolder:
        """The run folder of a cell's run."""
        return self._plan.run_folder(cell, run)

    def open_trial(self, cell: Cell, run: RunConfig, number: int, origin: str, *, ending: Ending | None = None) -> None:
        """Mirror a trial that starts, or one that an earlier driver ran and how it ended.

        Args:
            cell: Its cell.
            run: Its configuration.
            number: Its number in the study.
            origin: Where its settings come from.
            ending: How it ended; none: it starts.
        """
        tags = cell.tags | self._common | {"kind": "trial", "role": "method", "trial": str(number), "origin": origin}
        self._open(cell, run, f"{cell.name} trial {number}", tags | {"winner": "false"}, ending)

    def close_trial(
        self, cell: Cell, run: RunConfig, outcome: Outcome, row: EpochMetrics | None, *, with_artifacts: bool = False
    ) -> str:
        """End a trial's run; what it is compared by comes last. Returns its key."""
        key, ending = self.key(cell, run), trial_ending(outcome, row)
        folder = self.folder(cell, run).path if with_artifacts else None
        self._tracker.close_run(key, status=ending.status, metrics=ending.metrics, artifacts=folder)
        return key

    def run_ids(self, keys: Collection[str]) -> dict[str, str | None]:
        """MLflow's ids of runs by their keys; none for those MLflow has not taken within seconds."""
        return self._tracker.run_ids(keys)

    def mark_winner(self, cell: Cell, run: RunConfig) -> str:
        """Tag the winning trial; returns its key."""
        key = self.key(cell, run)
        self._tracker.tag_run(key, {"winner": "true"})
        return key

    def open_refit(self, cell: Cell, run: RunConfig, role: str) -> None:
        """Mirror a refit that starts."""
        tags = cell.tags | self._common | {"kind": "refit", "role": role}
        self._open(cell, run, f"{cell.name} {role} refit seed {run.seed}", tags, None)

    def close_refit(self, cell: Cell, run: RunConfig, test_accuracy: float | None) -> str:
        """End a refit with its test accuracy and its student, or as failed; returns its key.

        Called again when the student's files are there, it brings MLflow what is new.
        """
        key, folder = self.key(cell, run), self.folder(cell, run)
        if test_accuracy is None:
            self._tracker.close_run(key, status="FAILED", metrics={})
        else:
            self._tracker.close_run(
                key,
                status="FINISHED",
                metrics={"test_accuracy": test_accuracy, **metrics_of(read_record(folder))},
                artifacts=folder.path,
                artifacts_digest=digest_of_files(folder),
            )
        return key

    def register(self, cell: Cell, run: RunConfig, name: str) -> None:
        """Make a refit's model the champion of a registered model."""
        self._tracker.register(self.key(cell, run), name)

    def key(self, cell: Cell, run: RunConfig) -> str:
        """Names a run within the experiment."""
        return f"{self._plan.key}-{self.folder(cell, run).path.name}"

    def _open(self, cell: Cell, run: RunConfig, name: str, tags: dict[str, str], ending: Ending | None) -> None:
        self._tracker.open_run(
            self.key(cell, run),
            name=name,
            params=run.flat(),
            tags=tags | {"seed": str(run.seed)},
            folder=self.folder(cell, run).path,
            ending=ending,
        )


def trial_ending(outcome: Outcome, row: EpochMetrics | None) -> Ending:
    """How a trial ended, with what it is compared by."""
    if row is None or row.best_val_accuracy is None or row.best_epoch is None:
        return Ending(_STATUS[outcome])
    metrics = {"best/val_accuracy": row.best_val_accuracy, "best/epoch": float(row.best_epoch)}
    return Ending(_STATUS[outcome], metrics)


class SearchCallback(Callback):  # type: ignore[misc]  # Ray has no types
    """Tune's events, told to the recorder and to the progress view."""

    def __init__(
        self, cells: Mapping[str, Cell], searcher: StudySearcher, recorder: Recorder, progress: Progress
    ) -> None:
        self._cells = cells
        self._searcher = searcher
        self._recorder = recorder
        self._progress = progress
        self._started: set[str] = set()
        self._rows: dict[str, EpochMetrics] = {}  # the last ones, by trial
        self._ends: dict[str, TrialEnd] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks into a file that nobody reads, and threads cannot be pickled."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial begins, or begins again."""
        self._started.add(trial.trial_id)
        cell, run = self._cell_and_run(trial)
        self._recorder.open_trial(cell, run, trial.config["number"], trial.config["origin"])
        self._progress.trial_started(cell.name, self._searcher.allowed(cell.name))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """An epoch ended, or the trial said how it ended."""
        if END in result:
            self._ends[trial.trial_id] = TrialEnd.from_dict(result)
        else:
            row = self._rows[trial.trial_id] = EpochMetrics.from_dict(result)
            self._progress.epoch_ended(trial.config["cell"], row)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended by itself or was stopped."""
        row, end = self._rows.get(trial.trial_id), self._ends.get(trial.trial_id)
        if end is not None:
            self._progress.note(f"A trial of {trial.config['cell']} failed: {end.reason}")
            self._ended(trial, "failed")
        else:
            self._ended(trial, "complete" if row is not None and row.finished else "pruned")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed, or its process was lost before it began."""
        if self._searcher.will_retry(trial.trial_id):
            return
        if trial.trial_id not in self._started:
            self.on_trial_start(iteration, trials, trial)
        error = str(trial.get_error() or "").strip().splitlines()
        self._progress.note(f"A trial of {trial.config['cell']} failed: {error[-1] if error else 'no reason given'}")
        self._ended(trial, "failed")

    def _ended(self, trial: Any, outcome: Outcome) -> None:
        cell, run = self._cell_and_run(trial)
        self._recorder.close_trial(cell, run, outcome, self._rows.pop(trial.trial_id, None))
        self._ends.pop(trial.trial_id, None)
        best = self._searcher.best(cell.name)
        self._progress.trial_ended(cell.name, outcome, None if best is None else best.value)

    def _cell_and_run(self, trial: Any) -> tuple[Cell, RunConfig]:
        return self._cells[trial.config["cell"]], RunConfig.from_dict(trial.config["config"])


def record_earlier_trials(plan: Plan, trials: Mapping[str, list[FrozenTrial]], recorder: Recorder) -> None:
    """Give MLflow the ended trials of an earlier driver, should it have died before it said how they ended."""
    outcomes: dict[TrialState, Outcome] = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}
    for cell in plan.cells:
        for trial in trials[cell.name]:
            if trial.state not in outcomes:
                continue
            run = cell.run.with_overrides(overrides_of(trial))
            folder = recorder.folder(cell, run)
            plan.storage.refresh(folder.metrics_path)  # that driver may have been on another machine
            rows = folder.rows()
            ending = trial_ending(outcomes[trial.state], rows[-1] if rows else None)
            recorder.open_trial(cell, run, trial.number, trial.user_attrs.get("origin", "sampled"), ending=ending)


def cell_progress(plan: Plan, searcher: StudySearcher) -> list[tuple[str, CellProgress]]:
    """Each cell as its study has it."""
    shown = []
    for cell in plan.cells:
        counts, best = searcher.counts(cell.name), searcher.best(cell.name)
        each = CellProgress(
            num_trials=searcher.allowed(cell.name),
            num_epochs=plan.studies[cell.name].num_epochs,
            complete=counts.complete,
            pruned=counts.pruned,
            failed=counts.failed,
            best=None if best is None else best.value,
        )
        shown.append((cell.name, each))
    return shown
