"""After the search: the winner of every method in every cell, trained on all images, tested once a seed, written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from refilled.config import RunConfig
from refilled.errors import DataChangedError
from refilled.export import ExportError
from refilled.methods import VANILLA, has_embedding_stage
from refilled.model_card import Origin
from refilled.storage.run_folder import RunFolder
from refilled.student_files import write_student_files
from tune.backend.cluster import Resources
from tune.backend.jobs import JobSpec, raise_if_of_all, run_jobs
from tune.plan import Plan
from tune.prepare import ON_ALL, prepare
from tune.progress import Progress
from tune.studies.cell_study import DONE
from tune.studies.cells import Cell, Place
from tune.studies.searcher import overrides_of
from tune.studies.space import edges
from tune.studies.study_store import ranked
from tune.summary import MethodResult, Refits
from tune.tracking.code_version import code_version
from tune.tracking.mlflow_model import write_mlflow_model
from tune.tracking.recorder import Recorder
from tune.tracking.students import registered_name


@dataclass(frozen=True)
class Winner:
    """The best complete trial of a cell."""

    cell: Cell
    trial: FrozenTrial
    counts: dict[str, int]

    @property
    def run(self) -> RunConfig:
        """The winning trial's run."""
        return self.cell.run.with_overrides(overrides_of(self.trial))


@dataclass(frozen=True)
class _Refit:
    cell: Cell
    run: RunConfig
    role: str


def refit_winners(
    plan: Plan,
    winners: Mapping[str, Winner],
    recorder: Recorder,
    progress: Progress,
    resources: Resources,
) -> list[MethodResult]:
    """Refit every winner with every seed and read the test set; a winner whose refits fail has no result."""
    groups = {name: _refits_of(plan, winner) for name, winner in winners.items()}
    wanted = {recorder.key(each.cell, each.run): each for group in groups.values() for each in group}
    before = {key: recorder.folder(each.cell, each.run).test() for key, each in wanted.items()}
    missing = [wanted[key].run for key, test in before.items() if test is None]
    prepare([(run, 1) for run in missing], plan.storage, progress, resources, suffix=ON_ALL)
    for each in wanted.values():
        recorder.open_refit(each.cell, each.run, each.role)
    progress.start_jobs("refitting winners", len(wanted))
    tested: dict[str, float | None] = {}
    after: dict[str, dict[str, Any]] = {}
    jobs = [JobSpec("refit", key, each.run) for key, each in wanted.items()]
    for result in run_jobs(jobs, plan.storage, resources):
        each = wanted[result.job.name]
        test = None if result.error else recorder.folder(each.cell, each.run).test()
        if result.error is not None:
            raise_if_of_all(result.error)
            progress.note(f"A refit of {each.cell.name} failed: {str(result.error).strip().splitlines()[-1]}")
        if test is not None:
            after[result.job.name] = test
        value = None if test is None else float(test["test_accuracy"])
        tested[recorder.close_refit(each.cell, each.run, value)] = value
        progress.job_ended()
    _require_one_test_set(wanted, before, after, progress)
    return _results(plan, winners, groups, tested, recorder)


def _require_one_test_set(
    wanted: Mapping[str, _Refit],
    before: Mapping[str, dict[str, Any] | None],
    after: Mapping[str, dict[str, Any]],
    progress: Progress,
) -> None:
    """See to it that means are over one test set: all refits with the same classes have read the same images.

    Raises:
        DataChangedError: The images changed between two of them.
    """
    seen: dict[tuple[str, ...], set[str]] = {}
    num_again = 0
    for key, test in after.items():
        seen.setdefault(wanted[key].cell.spaces.student, set()).add(test["test_digest"])
        earlier = before[key]
        num_again += earlier is not None and earlier["test_digest"] != test["test_digest"]
    if num_again:
        progress.note(
            f"The test images have changed since {num_again} of the refits were tested; those were tested again."
        )
    if any(len(digests) > 1 for digests in seen.values()):
        raise DataChangedError(
            "The test images changed while refits were tested on them; start the same command again, which tests "
            "those again that saw other images."
        )


def refitted(plan: Plan, trials: Mapping[str, Sequence[FrozenTrial]]) -> set[str]:
    """Names of the cells in which all is done: no trial is left, and every refit of the best has read the test set."""
    found = set()
    for cell in plan.cells:
        of_cell = trials.get(cell.name, ())
        best = next(iter(ranked(of_cell)), None)
        if best is None or sum(trial.state in DONE for trial in of_cell) < plan.search.trials:
            continue
        refits = _refits_of(plan, Winner(cell, best, {}))
        if all(plan.run_folder(cell, each.run).test_accuracy() is not None for each in refits):
            found.add(cell.name)
    return found


def write_students(
    plan: Plan, results: Sequence[MethodResult], recorder: Recorder, progress: Progress, resources: Resources
) -> list[MethodResult]:
    """Write every winner's student for others to take, and register the best of every cell if that is asked for.

    The student is the refit with the first seed, whatever the others came to: chosen by test accuracy, the number would
    no longer be a test's. The best method of a cell is the one with the best validation accuracy.
    """
    progress.start_jobs("writing students", len(results))
    written = []
    for result in results:
        run, test_accuracy = result.refits.run, result.refits.test_accuracy[0]
        folder = plan.run_folder(result.cell, run)
        origin = _origin(plan, result)
        classes = result.cell.spaces.student
        record = write_student_files(folder, origin, classes, plan.search.export, resources.num_threads)
        is_model = _write_mlflow_model(folder, result, record["model_sha256"], progress)
        recorder.close_refit(result.cell, run, test_accuracy)
        place = folder.path.relative_to(plan.storage.root).as_posix()
        student = {**record, "folder": place, "seed": run.seed, "mlflow_model": is_model}
        written.append(dataclasses.replace(result, student=student))
        progress.job_ended()
    return _registered(plan, written, recorder) if plan.search.register else written


def _origin(plan: Plan, result: MethodResult) -> Origin:
    cell, refits = result.cell, result.refits
    return Origin(
        run=refits.run,
        run_key=plan.run_folder(cell, refits.run).path.name,
        teacher=cell.teacher,
        teacher_classes=cell.spaces.teacher,
        data_digest=cell.data_digest,
        val_accuracy=result.val_accuracy,
        seeds=refits.seeds,
        test_accuracy=refits.test_accuracy,
        search_key=plan.key,
        experiment=plan.search.experiment,
        code_version=code_version(),
    )


def _write_mlflow_model(folder: RunFolder, result: MethodResult, weights_digest: str, progress: Progress) -> bool:
    """Whether the student is an MLflow model: a network that cannot be exported is none."""
    metadata = {
        "classes": list(result.cell.spaces.student),
        "run_key": folder.path.name,
        "method": result.cell.method,
        "data_digest": result.cell.data_digest,
        "model_sha256": weights_digest,
    }
    try:
        write_mlflow_model(folder, metadata)
    except ExportError as error:
        progress.note(f"{result.cell.name} has no MLflow model: {error}")
        return False
    return True


def _registered(plan: Plan, results: Sequence[MethodResult], recorder: Recorder) -> list[MethodResult]:
    """The results with the names of those that are the best of a cell, and have a model that can be registered."""
    by_name = {result.cell.name: result for result in results}
    names: dict[str, dict[Place, str]] = {}
    for place in plan.places:
        there = [by_name[cell.name] for cell in plan.at(place).values() if cell.name in by_name]
        best = max(there, key=lambda result: result.val_accuracy, default=None)
        if best is not None and best.student is not None and best.student["mlflow_model"]:
            kind, colon, path = plan.search.run.data.partition(":")
            data = Path(path).stem if colon else kind
            where = [f"overlap-{place.overlap:g}"]
            if place.images_per_class is not None:
                where.append(f"{place.images_per_class}-a-class")
            name = registered_name(plan.search.experiment, data, place.student, "from", place.teacher, *where)
            recorder.register(best.cell, best.refits.run, name)
            names.setdefault(best.cell.name, {})[place] = name
    return [dataclasses.replace(result, registered=names.get(result.cell.name, {})) for result in results]


def _refits_of(plan: Plan, winner: Winner) -> list[_Refit]:
    """A winner's refits; of a vanilla student beside two-stage methods also with their last stage's epochs alone."""
    cell, run = winner.cell, winner.run
    variants = [(run, "method")]
    if cell.method == VANILLA and any(has_embedding_stage(method) for method in plan.search.methods):
        variants.append((dataclasses.replace(run, epochs=(0, plan.search.run.epochs[1])), "baseline_short"))
    return [
        _Refit(cell, dataclasses.replace(each, val_fraction=0.0, seed=plan.search.run.seed + number), role)
        for each, role in variants
        for number in range(plan.search.seeds)
    ]


def _results(
    plan: Plan,
    winners: Mapping[str, Winner],
    groups: Mapping[str, list[_Refit]],
    tested: Mapping[str, float | None],
    recorder: Recorder,
) -> list[MethodResult]:
    """One result for every method in every cell of the grid whose refits were all tested, cell by cell."""
    whole = {name: group for name, group in groups.items() if _is_whole(group, tested, recorder)}
    winning = {name: recorder.mark_winner(winners[name].cell, winners[name].run) for name in whole}
    run_ids = recorder.run_ids({*tested, *winning.values()})
    found = {}
    for name, group in whole.items():
        winner, by_role = winners[name], dict[str, Refits]()
        for each in group:
            key = recorder.key(each.cell, each.run)
            value = tested[key]
            assert value is not None
            by_role.setdefault(each.role, Refits(run=each.run)).add(each.run.seed, value, key, run_ids[key])
        found[name] = MethodResult(
            cell=winner.cell,
            val_accuracy=float(winner.trial.value or 0.0),
            trial=winner.trial.number,
            trial_run_key=winning[name],
            trial_run_id=run_ids[winning[name]],
            counts=winner.counts,
            refits=by_role["method"],
            short=by_role.get("baseline_short"),
            edges=edges(winner.trial.params, winner.cell.run),
        )
    return [found[cell.name] for cell in plan.cells if cell.name in found]


def _is_whole(group: Sequence[_Refit], tested: Mapping[str, float | None], recorder: Recorder) -> bool:
    """Whether all refits of a cell were tested."""
    return bool(group) and all(tested[recorder.key(each.cell, each.run)] is not None for each in group)
