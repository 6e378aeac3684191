"""Search the best settings of every method, for every cell of overlap x teacher x student.

    python tune/search.py                                              the digits, minutes, on this machine
    python tune/search.py --methods student refilled rkd aml           methods side by side
    python tune/search.py cifar100 --data parquet:DIR --overlaps 0 1   real images
    ray job submit --working-dir . -- python tune/search.py            the same program on a cluster

The same command again continues where it was: finished trials and refits are found, not repeated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from refilled.config import RunConfig, SearchConfig
from refilled.errors import UserError
from refilled.interruption import during
from refilled.methods import VANILLA, has_embedding_stage
from refilled.presets import preset
from refilled.results import SearchResults
from refilled.secrets import without_passwords
from refilled.storage import Storage
from tune.backend.cluster import Resources, fit, ray_cluster, ray_environment
from tune.cli import run_command, term_configs

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from tune.forecast.report import Forecast, PhaseName
    from tune.plan import Plan
    from tune.progress import Progress
    from tune.summary import MethodResult
    from tune.trials import TrialsResult

HELP = "Search every method's settings in every cell of overlap x teacher x student, refit the winners, test them once."


def search(
    config: SearchConfig | str = "smoke",
    *,
    settings: Mapping[str, Any] | None = None,
    quiet: bool = False,
    **fields: Any,
) -> SearchResults:
    """Do from Python what the command does; what is done already is found, not repeated.

        results = refilled.search("smoke", methods=["student", "refilled"], overlaps=[0.4], trials=8)
        student = results.best().load()

    Args:
        config: A whole configuration, or the name of a preset.
        settings: Changes of the runs by dotted name, `{"epochs": (10, 10), "embedding.temperature": 2.0}`.
        quiet: Print nothing.
        **fields: Fields of `SearchConfig` and their values, such as `methods`, `overlaps`, `trials`, `storage`.

    Returns:
        A result for each cell and method that has one.

    Raises:
        UserError: Something that was given is wrong; or a search with `resume=False` has trials already.
    """
    if isinstance(config, str):
        config = start(config, tuple(fields.pop("methods", ())))
    own = sorted(name for name in fields if name in RunConfig.field_types() and name not in SearchConfig.field_types())
    if own:
        raise UserError(f"{own[0]} is a setting of the runs; give it as settings={{{own[0]!r}: {fields[own[0]]!r}}}.")
    runs = {f"run.{name}": value for name, value in (settings or {}).items()}
    config = config.with_overrides({**fields, **runs})
    with ray_environment():
        outcome = _main(config, _console(quiet=quiet))
    if outcome.rows is None and not config.dry_run:
        raise UserError(f"resume must not be false: the search has trials already in {config.storage}.")
    return SearchResults(outcome.rows or [], Storage.open(config.storage).root)


class _Outcome(NamedTuple):
    """The exit code, and the objects of `summary.json` where the search came to its end."""

    code: int
    rows: list[dict[str, Any]] | None = None


def main(config: SearchConfig) -> int:
    """Plan, search, refit, summarise; 0 when every cell has a result, else 1."""
    with ray_environment():
        return _main(config, _console()).code


def _main(search: SearchConfig, console: Console) -> _Outcome:
    import optuna

    from tune.plan import make_plan
    from tune.resume import may_continue, only_driver, only_driver_of_database
    from tune.studies.study_store import open_storage
    from tune.tracking.tracker import Tracker, resolve_tracking_uri

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the progress view says what there is to say
    began_s = time.monotonic()
    plan = make_plan(search)
    _require_lasting_studies(plan)
    # What the user named is tried before anything of our own is created.
    tracking_uri = resolve_tracking_uri(search.tracking_uri, plan.storage)
    named = open_storage(search.study_storage) if search.study_storage else None
    if search.dry_run:
        return _dry_run(plan, named, began_s, console)
    with only_driver(plan), Tracker(tracking_uri, search.experiment, plan.storage) as tracker:
        study_storage = named or open_storage(_own_storage(plan))
        with only_driver_of_database(plan, study_storage):
            if not may_continue(plan, study_storage):
                return _Outcome(1)
            return _run(plan, study_storage, tracker, began_s, console)


def _run(plan: Plan, study_storage: Any, tracker: Any, began_s: float, console: Console) -> _Outcome:
    from tune.prepare import prepare
    from tune.progress import Progress
    from tune.refits import refit_winners, write_students
    from tune.resume import earlier_trials
    from tune.tracking.recorder import Recorder
    from tune.trials import run_search

    search = plan.search
    deadline_s = None if search.max_hours is None else began_s + 3600 * search.max_hours
    recorder = Recorder(tracker, plan)
    _print_remarks(plan, console)
    with _cluster(search):
        with during("starting and timing: nothing was trained yet by this command"):
            resources = fit(search)
            recorder.start_search()
            earlier = earlier_trials(plan, study_storage)
            done = _num_done(earlier)
            forecast = _forecast(plan, resources, earlier, began_s, console) if search.forecast else None
        if forecast is not None:
            console.print(forecast.table())
        with Progress(console, began_s, forecast) as progress:
            left = [(cell.run, search.trials - done.get(cell.name, 0)) for cell in plan.cells]
            prepare([each for each in left if each[1] > 0], plan.storage, progress, resources)
            searched = run_search(plan, study_storage, recorder, progress, resources, deadline_s=deadline_s)
            found = refit_winners(plan, searched.winners, recorder, progress, resources)
            found = write_students(plan, found, recorder, progress, resources)
    with during("the refits are done and kept; their table was being written"):
        return _conclude(plan, searched, found, tracker, progress, forecast, console)


def _conclude(
    plan: Plan,
    searched: TrialsResult,
    found: Sequence[MethodResult],
    tracker: Any,
    progress: Progress,
    forecast: Forecast | None,
    console: Console,
) -> _Outcome:
    """Write `summary.json`, print the results and what they took, and end the search in MLflow."""
    from tune.forecast.report import Comparison
    from tune.summary import export_table, remarks, rows, table
    from tune.tracking.store import shown_uri
    from tune.trials import describe

    search = plan.search
    results = rows(plan, found)
    path = plan.storage.root / "summary.json"
    plan.storage.write_json(path, results)
    console.print(table(results, search.seeds))
    if search.export:
        console.print(export_table(results))
    for line in [*remarks(results), *describe(searched)]:
        console.print(line, highlight=False)
    epochs: dict[PhaseName, int] = {"trials": searched.epochs}
    hours = _hours(progress)
    record = {"trials": searched.to_json(), "actual": {"epochs": epochs, "hours": hours}}
    if forecast is not None:
        comparison = Comparison(forecast, progress.corrected, epochs, hours)
        console.print(comparison.table())
        record["forecast"] = comparison.to_json()
    missing = [cell.name for cell in plan.cells if cell not in [result.cell for result in found]]
    for name in missing:
        print(f"search: {name} has no result; its trials or refits failed.", file=sys.stderr)
    tracker.finish_search(status="FAILED" if missing else "FINISHED", artifacts=_artifacts(plan, path, record))
    where = f"experiment {search.experiment!r} at {shown_uri(tracker.uri)}"
    said = f"Summary: {plan.storage.location}/{path.name}\nMLflow: {where}"
    console.print(said, highlight=False, markup=False, soft_wrap=True)
    return _Outcome(1 if missing else 0, results)


def _dry_run(plan: Plan, study_storage: Any, began_s: float, console: Console) -> _Outcome:
    """Print the forecast of what is left; nothing but timings is kept."""
    from tune.resume import earlier_trials
    from tune.studies.study_store import open_storage

    _print_remarks(plan, console)
    own = plan.storage.root / "studies.db"
    if study_storage is None and own.exists():
        study_storage = open_storage(_own_storage(plan))
    with during("a dry run, which trains nothing: timings are kept"), _cluster(plan.search):
        earlier = {} if study_storage is None else earlier_trials(plan, study_storage)
        console.print(_forecast(plan, fit(plan.search), earlier, began_s, console).table())
    return _Outcome(0)


def _print_remarks(plan: Plan, console: Console) -> None:
    """Once nothing that the user named can be refused any more: a refusal is one sentence alone."""
    for line in plan.remarks:
        console.print(line, highlight=False)


def _num_done(earlier: Mapping[str, Sequence[FrozenTrial]]) -> dict[str, int]:
    """Complete and pruned trials that studies have already, by the study's name."""
    from tune.studies.cell_study import DONE

    return {name: sum(trial.state in DONE for trial in trials) for name, trials in earlier.items()}


def _forecast(
    plan: Plan, resources: Resources, earlier: Mapping[str, Sequence[FrozenTrial]], began_s: float, console: Console
) -> Forecast:
    from tune.forecast.forecast import forecast
    from tune.forecast.measure import measure
    from tune.forecast.workload import Workload
    from tune.refits import refitted

    calls = Workload(plan, resources.num_workers).calls()
    timings = measure(plan, calls, resources, lambda text: console.print(text, highlight=False, markup=False))
    elapsed_s = None if plan.search.dry_run else time.monotonic() - began_s
    return forecast(
        plan,
        resources,
        timings,
        done_trials=_num_done(earlier),
        done=refitted(plan, earlier),
        elapsed_s=elapsed_s,
    )


def _hours(progress: Progress) -> dict[PhaseName, float]:
    """What the phases took; a cache counts to its teacher."""
    from tune.prepare import CACHES, ON_ALL, TEACHERS

    phases: dict[PhaseName, tuple[str, ...]] = {
        "start": ("starting",),
        "teachers": (TEACHERS, CACHES),
        "trials": ("searching",),
        "teachers on all images": (TEACHERS + ON_ALL, CACHES + ON_ALL),
        "refits": ("refitting winners",),
        "students": ("writing students",),
    }
    seconds = progress.phase_seconds()
    return {phase: sum(seconds.get(name, 0.0) for name in names) / 3600 for phase, names in phases.items()}


def _cluster(search: SearchConfig) -> contextlib.AbstractContextManager[None]:
    """Ray; stopped TorchTrainer trials leak their workers where there is no dashboard."""
    return ray_cluster(with_dashboard=search.workers_per_trial > 1 or search.trial_backend == "torch_trainer")


def _console(*, quiet: bool = False) -> Console:
    return Console(width=None if sys.stdout.isatty() else 160, quiet=quiet)


def _require_lasting_studies(plan: Plan) -> None:
    """Refuse to keep the studies of an object store's searches on a machine that may be gone tomorrow."""
    if plan.search.study_storage is None and plan.storage.is_remote:
        raise UserError(
            f"study_storage must be the URL of a database, such as postgresql://HOST/optuna, where storage is an "
            f"object store, got none with {plan.search.storage}."
        )


def _own_storage(plan: Plan) -> str:
    return f"sqlite:///{plan.storage.root / 'studies.db'}"


def _artifacts(plan: Plan, summary: Path, record: dict[str, Any]) -> Path:
    """A folder for the parent run: the summary, the whole configuration, and what the search did and took."""
    folder = plan.storage.root / "searches" / plan.key / "artifacts"
    folder.mkdir(parents=True, exist_ok=True)
    plan.storage.write(folder / "summary.json", summary.read_bytes())
    shown = without_passwords(json.dumps(plan.search.to_dict(), ensure_ascii=False, indent=1))
    plan.storage.write(folder / "config.json", shown.encode())
    plan.storage.write_json(folder / "search.json", record)
    return folder


def start(preset_name: str, methods: tuple[str, ...]) -> SearchConfig:
    """A preset with other methods, unless none are given."""
    search = preset(preset_name)
    methods = methods or search.methods
    # Of what all methods share, the method is the one with the most stages, whose epochs all have to be given.
    widest = next((method for method in methods if has_embedding_stage(method)), methods[0])
    return dataclasses.replace(search, methods=methods, run=dataclasses.replace(search.run, method=widest))


def command(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    hidden = {f"run.{name}" for name in ("overlap", "teacher", "student", "method", "images_per_class", "sources")}
    return run_command(
        "search",
        HELP,
        start,
        main,
        terms=lambda search: term_configs(search.run, search.methods),
        beside_method=VANILLA,
        hidden=hidden,
        inlined={"run", "run.terms"},
        arguments=arguments,
    )


if __name__ == "__main__":
    sys.exit(command())
