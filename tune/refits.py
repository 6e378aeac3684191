"""After the search: the winner of every method in every cell, trained on all images, tested once a seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial

from refilled.config import RunConfig
from refilled.methods import VANILLA, has_embedding_stage
from refilled.stages import needs_teacher
from refilled.storage.store import read_json
from tune.backend.cluster import Resources
from tune.backend.jobs import JobSpec, run_jobs
from tune.plan import Cell, Plan
from tune.progress import Progress
from tune.studies.searcher import overrides_of
from tune.studies.space import edges
from tune.summary import MethodResult, Refits
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
) -> list[MethodResult]:
    """Refit every winner with every seed and read the test set; a winner whose refits fail has no result."""
    groups = {name: _refits_of(plan, winner) for name, winner in winners.items()}
    wanted = {recorder.key(each.cell, each.run): each for group in groups.values() for each in group}
    pretrain(plan, [each.run for each in wanted.values()], "pre-training teachers on all images", progress, resources)
    for each in wanted.values():
        recorder.open_refit(each.cell, each.run, each.role)
    progress.start_jobs("refitting winners", len(wanted))
    tested: dict[str, float | None] = {}
    sharing = plan.num_sharing_runs(plan.search.seeds)
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
