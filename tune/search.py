"""Search the best way to distil, for every cell of overlap x teacher x student.

    python tune/search.py                                              the digits, minutes, on this machine
    python tune/search.py cifar100 --data parquet:DIR --overlaps 0 1   real images
    ray job submit --working-dir . -- python tune/search.py            the same program on a cluster

The same command again continues where it was: finished trials and refits are found, not repeated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from rich.console import Console

from refilled.config import SearchConfig
from refilled.errors import UserError
from refilled.presets import preset
from refilled.store import write_json
from tune.cli import run_command
from tune.cluster import fit, ray_cluster, ray_environment

if TYPE_CHECKING:
    from tune.plan import Plan

HELP = "Search REFILLED's settings for every cell of overlap x teacher x student, refit the winners, test them once."


def main(search: SearchConfig) -> int:
    """Plan, search, refit, summarise; 0 when every cell has a result, else 1."""
    with ray_environment():
        return _main(search)


def _main(search: SearchConfig) -> int:
    import optuna

    from tune.plan import make_plan  # these import Ray, which reads its environment then
    from tune.studies import open_storage
    from tune.tracking import Tracker, resolve_tracking_uri

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the progress view says what there is to say
    plan = make_plan(search)
    # What the user named is tried before anything of our own is created.
    study_storage = open_storage(search.study_storage) if search.study_storage else None
    tracking_uri = resolve_tracking_uri(search.tracking_uri, plan.storage)
    artifacts = plan.storage / "artifacts"
    with _only_driver(plan), Tracker(tracking_uri, search.experiment, artifact_root=artifacts) as tracker:
        study_storage = study_storage or open_storage(f"sqlite:///{plan.storage / 'studies.db'}")
        return _run(plan, study_storage, tracker, tracking_uri)


@contextlib.contextmanager
def _only_driver(plan: Plan) -> Iterator[None]:
    """A second process with the same search would take the first one's running trials for a dead driver's."""
    lock = FileLock(plan.storage / "searches" / f"{plan.key}.lock")
    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"This search is already running on {plan.storage}; wait for it, or choose another experiment."
        ) from error
    with lock:
        yield


def _run(plan: Plan, study_storage: Any, tracker: Any, tracking_uri: str) -> int:
    from tune.progress import Progress
    from tune.recording import Recorder
    from tune.refits import pretrain, refit_winners
    from tune.summary import table

    console = Console(width=None if sys.stdout.isatty() else 160)
    recorder = Recorder(tracker, plan)
    with ray_cluster(with_dashboard=plan.search.workers_per_trial > 1 or plan.search.trial_backend == "torch_trainer"):
        resources = fit(plan.search)
        recorder.start_search()
        with Progress(console) as progress:
            pretrain(plan, [cell.run for cell in plan.all_cells], "pre-training teachers", progress, resources)
            winners = _search(plan, study_storage, recorder, progress, resources)
            results = [each.to_json() for each in refit_winners(plan, winners, recorder, progress, resources)]
    path = plan.storage / "summary.json"
    write_json(path, results)
    console.print(table(results, plan.search.seeds))
    missing = [cell.name for cell in plan.cells if not any(_is_of(each, cell) for each in results)]
    for name in missing:
        print(f"search: cell {name} has no result; its trials or refits failed.", file=sys.stderr)
    tracker.finish_search(status="FAILED" if missing else "FINISHED", artifacts=_artifacts(plan, path))
    print(f"Summary: {path}\nMLflow: experiment {plan.search.experiment!r} at {tracking_uri}")
    return 1 if missing else 0


def _search(plan: Plan, study_storage: Any, recorder: Any, progress: Any, resources: Any) -> dict[str, Any]:
    """All trials of all cells in one Tune run; the winners by cell name."""
    from tune.recording import SearchCallback, cell_progress, record_earlier_trials
    from tune.refits import Winner
    from tune.studies import StudyScheduler, StudySearcher
    from tune.tuner import run_trials, trial_function

    cells = {cell.name: cell for cell in plan.all_cells}
    studies = [cell.study_plan(plan.search.trials, plan.search.experiment) for cell in plan.all_cells]
    searcher = StudySearcher(studies, study_storage, seed=plan.search.run.seed)
    record_earlier_trials(plan, {name: searcher.trials(name) for name in cells}, recorder)
    _say_what_banks_will_do(plan, progress)
    progress.start_trials(cell_progress(plan, searcher))
    run_trials(
        trial_function(
            resources, plan.storage, num_sharing_runs=_num_sharing_runs(plan), backend=plan.search.trial_backend
        ),
        searcher,
        StudyScheduler(searcher),
        slots=resources.slots,
        name=f"search-{plan.key}",
        storage=plan.storage,
        callbacks=[SearchCallback(cells, searcher, recorder, progress)],
    )
    winners = {}
    for name, cell in cells.items():
        best = searcher.best(name)
        if best is not None:
            winners[name] = Winner(cell, best, dataclasses.asdict(searcher.counts(name)))
    return winners


def _say_what_banks_will_do(plan: Plan, progress: Any) -> None:
    """The two costs by which every trial decides, which otherwise only the workers' logs hold."""
    from refilled.bank import bank_pays, epochs_with_teacher
    from refilled.data.views import Views

    run = plan.cells[0].run
    epochs = epochs_with_teacher(run)
    if not epochs:
        return
    num_views, sharing = len(Views(run.views).view_ids), _num_sharing_runs(plan)
    built = {"bank": True, "live": False, "auto": bank_pays(run, num_views, sharing)}[run.bank.mode]
    progress.note(
        f"Teacher's passes over the data, for each overlap: {num_views} to fill a bank of all views, "
        f"{sharing * epochs} for {sharing} trials of {epochs} epochs without: "
        f"{'banks are used' if built else 'the teacher runs in every step, unless a bank is there already'}."
    )


def _num_sharing_runs(plan: Plan) -> int:
    """Trials that ask the same teacher about the same images: those of all students of an overlap."""
    return len(plan.search.students) * plan.search.trials


def _is_of(result: dict[str, Any], cell: Any) -> bool:
    return (result["overlap"], result["teacher"], result["student"]) == (cell.overlap, cell.teacher, cell.student)


def _artifacts(plan: Plan, summary: Path) -> Path:
    """A folder for the parent run: the summary and the whole configuration."""
    folder = plan.storage / "searches" / plan.key
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_bytes(summary.read_bytes())
    write_json(folder / "config.json", plan.search.to_dict())
    return folder


def command(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    hidden = {"run.overlap", "run.teacher", "run.student"}  # the grid's, as lists
    return run_command("search", HELP, preset, main, hidden=hidden, inlined={"run"}, arguments=arguments)


if __name__ == "__main__":
    sys.exit(command())
