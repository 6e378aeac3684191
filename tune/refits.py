"""After the search: the winners and the vanilla students beside them, trained on all images, tested once a seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial

from refilled.config import RunConfig
from refilled.methods import needs_teacher
from refilled.storage.store import read_json
from tune.backend.cluster import Resources
from tune.backend.jobs import JobSpec, run_jobs
from tune.plan import Cell, Plan
from tune.progress import Progress
from tune.studies.searcher import overrides_of
from tune.summary import CellResult, Refits
from tune.tracking.recorder import Recorder


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
) -> list[CellResult]:
    """Refit every winner with every seed and read the test set; a cell whose refits fail has no result."""
    groups = {cell.name: _refits_of(plan, winners, cell) for cell in plan.cells if _is_ready(plan, winners, cell)}
    wanted = {recorder.key(each.cell, each.run): each for group in groups.values() for each in group}
    pretrain(plan, [each.run for each in wanted.values()], "pre-training teachers on all images", progress, resources)
    for each in wanted.values():
        recorder.open_refit(each.cell, each.run, each.role)
    progress.start_jobs("refitting winners", len(wanted))
    tested: dict[str, float | None] = {}
    sharing = len(plan.search.students) * plan.search.seeds
    jobs = [JobSpec("refit", key, each.run, sharing) for key, each in wanted.items()]
    for result in run_jobs(jobs, plan.storage, resources):
        each = wanted[result.job.name]
        path = recorder.folder(each.cell, each.run).path / "test.json"
        value = None if result.error else float(read_json(path)["test_accuracy"])
        if result.error is not None:
            progress.note(f"A refit of {each.cell.name} failed: {str(result.error).strip().splitlines()[-1]}")
        tested[recorder.close_refit(each.cell, each.run, value)] = value
        progress.job_ended()
    return _results(plan, winners, groups, tested, recorder)


def pretrain(plan: Plan, runs: list[RunConfig], phase: str, progress: Progress, resources: Resources) -> None:
    """Pre-train the different teachers that these runs need; a run whose teacher fails here tries again by itself."""
    from refilled.teacher import teacher_folder

    teachers: dict[str, RunConfig] = {}
    for run in runs:
        if needs_teacher(run):
            folder = teacher_folder(run, plan.storage)
            if folder.result() is None:
                teachers.setdefault(folder.path.name, run)
    if not teachers:
        return
    progress.start_jobs(phase, len(teachers))
    for result in run_jobs([JobSpec("teacher", name, run) for name, run in teachers.items()], plan.storage, resources):
        if result.error is not None:
            progress.note(f"Pre-training {result.job.run.teacher} failed: {str(result.error).strip().splitlines()[-1]}")
        progress.job_ended()


def _is_ready(plan: Plan, winners: Mapping[str, Winner], cell: Cell) -> bool:
    return cell.name in winners and plan.baseline_of(cell).name in winners


def _refits_of(plan: Plan, winners: Mapping[str, Winner], cell: Cell) -> list[_Refit]:
    """A cell's refits: of its winner, of the vanilla student, and of that with the classifier stage's epochs alone."""
    baseline = plan.baseline_of(cell)
    variants = [(cell, winners[cell.name].run, "method")]
    if baseline is not cell:
        vanilla = winners[baseline.name].run
        short = dataclasses.replace(vanilla, epochs=(0, cell.run.epochs[1]))
        variants += [(baseline, vanilla, "baseline"), (baseline, short, "baseline_short")]
    refits = []
    for each, run, role in variants:
        for seed in range(plan.search.run.seed, plan.search.run.seed + plan.search.seeds):
            refits.append(_Refit(each, dataclasses.replace(run, val_fraction=0.0, seed=seed), role))
    return refits


def _results(
    plan: Plan,
    winners: Mapping[str, Winner],
    groups: Mapping[str, list[_Refit]],
    tested: Mapping[str, float | None],
    recorder: Recorder,
) -> list[CellResult]:
    results = []
    whole = {cell: group for cell, group in groups.items() if _is_whole(group, tested, recorder)}
    winning = {
        cell.name: recorder.mark_winner(cell, winners[cell.name].run)
        for grid_cell in plan.cells
        if grid_cell.name in whole
        for cell in (plan.baseline_of(grid_cell), grid_cell)
    }
    run_ids = recorder.run_ids({*tested, *winning.values()})
    for cell in plan.cells:
        if cell.name not in whole:
            continue
        by_role: dict[str, Refits] = {}
        for each in whole[cell.name]:
            refits = by_role.setdefault(each.role, Refits(run=each.run))
            key = recorder.key(each.cell, each.run)
            value = tested[key]
            assert value is not None
            refits.seeds.append(each.run.seed)
            refits.test_accuracy.append(value)
            refits.run_keys.append(key)
            refits.run_ids.append(run_ids[key])
        winner, baseline = winners[cell.name], winners[plan.baseline_of(cell).name]
        results.append(
            CellResult(
                cell=cell,
                val_accuracy=float(winner.trial.value or 0.0),
                trial=winner.trial.number,
                trial_run_key=winning[cell.name],
                trial_run_id=run_ids[winning[cell.name]],
                counts=winner.counts,
                refits=by_role["method"],
                baseline=by_role.get("baseline", by_role["method"]),
                baseline_val_accuracy=float(baseline.trial.value or 0.0),
                baseline_short=by_role.get("baseline_short", by_role["method"]),
            )
        )
    return results


def _is_whole(group: Sequence[_Refit], tested: Mapping[str, float | None], recorder: Recorder) -> bool:
    """Whether all refits of a cell were tested."""
    return bool(group) and all(tested[recorder.key(each.cell, each.run)] is not None for each in group)
