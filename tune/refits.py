"""After the search: the winner of every method in every cell, trained on all images, tested once a seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial

from refilled.config import RunConfig
from refilled.methods import VANILLA, has_embedding_stage
from tune.backend.cluster import Resources
from tune.backend.jobs import JobSpec, run_jobs
from tune.plan import Plan
from tune.prepare import ON_ALL, prepare
from tune.progress import Progress
from tune.studies.cell_study import DONE
from tune.studies.cells import Cell
from tune.studies.searcher import overrides_of
from tune.studies.space import edges
from tune.studies.study_store import ranked
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
    missing = [each.run for each in wanted.values() if recorder.folder(each.cell, each.run).test_accuracy() is None]
    prepare([(run, 1) for run in missing], plan.storage, progress, resources, suffix=ON_ALL)
    for each in wanted.values():
        recorder.open_refit(each.cell, each.run, each.role)
    progress.start_jobs("refitting winners", len(wanted))
    tested: dict[str, float | None] = {}
    jobs = [JobSpec("refit", key, each.run) for key, each in wanted.items()]
    for result in run_jobs(jobs, plan.storage, resources):
        each = wanted[result.job.name]
        value = None if result.error else recorder.folder(each.cell, each.run).test_accuracy()
        if result.error is not None:
            progress.note(f"A refit of {each.cell.name} failed: {str(result.error).strip().splitlines()[-1]}")
        tested[recorder.close_refit(each.cell, each.run, value)] = value
        progress.job_ended()
    return _results(plan, winners, groups, tested, recorder)


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
