"""The searches that are compared, each made of the real classes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, InMemoryStorage
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search.optuna import OptunaSearch

from analysis.simulator.simulation import Contender, Suggestion
from analysis.simulator.table import Point, Table, point_of
from tune.studies.pruning import HalvingPruner
from tune.studies.searcher import Rules, StudyPlan, StudyScheduler, StudySearcher
from tune.studies.space import sample

METRIC = "val_accuracy"
Strategy = Callable[[Sequence[Table], int], Contender]
"""Makes a search of these problems from a seed."""


def ours(*, num_trials: int = 1000, chained: bool = True, storage: BaseStorage | None = None, **rules: Any) -> Strategy:
    """The platform's own searcher and scheduler, storage in memory.

    Args:
        num_trials: Trials of every cell.
        chained: Whether every table is a source cell of the next one; no effect where the rules say no transfer.
        storage: The storage of the studies, which go on where they are; none: new ones in memory.
        rules: Fields of `tune.studies.searcher.Rules`.
    """

    def make(tables: Sequence[Table], seed: int) -> Contender:
        names = [table.name for table in tables]
        plans = [
            StudyPlan(
                key=table.name,
                name=table.name,
                run=table.run,
                num_trials=num_trials,
                num_epochs=table.num_epochs,
                source_cells=tuple(names[max(0, index - 1) : index]) if chained else (),
            )
            for index, table in enumerate(tables)
        ]
        where = InMemoryStorage() if storage is None else storage
        searcher = StudySearcher(plans, where, Rules(seed=seed, **rules))

        def read(suggestion: Suggestion) -> tuple[str, Point]:
            return suggestion["cell"], point_of(suggestion["overrides"])

        return Contender(searcher, StudyScheduler(searcher), read)

    return make


def random_search(tables: Sequence[Table], seed: int) -> Contender:
    """Random search, every trial to its end."""
    return _ray_search(tables, FIFOScheduler(), sampler=RandomSampler(seed=seed))


def ray_default(tables: Sequence[Table], seed: int) -> Contender:
    """What Ray's documentation shows: OptunaSearch and ASHAScheduler with their defaults, time counted in epochs."""
    (table,) = tables
    scheduler = ASHAScheduler(time_attr="epoch", metric=METRIC, mode="max", max_t=table.num_epochs)
    return _ray_search(tables, scheduler, seed=seed)


def _ray_search(tables: Sequence[Table], scheduler: Any, **how: Any) -> Contender:
    (table,) = tables

    def space(trial: optuna.Trial) -> None:
        sample(trial, table.run)

    searcher = OptunaSearch(space, metric=METRIC, mode="max", **how)

    def read(suggestion: Suggestion) -> tuple[str, Point]:
        return table.name, dict(suggestion)

    return Contender(searcher, scheduler, read)


def tpe(**settings: Any) -> Callable[[StudyPlan, int], BaseSampler]:
    """A TPE sampler with settings of its own, for `Rules.make_sampler`."""

    def make(plan: StudyPlan, seed: int) -> BaseSampler:
        with warnings.catch_warnings():
            # `group` and `constant_liar` are marked experimental since 2021.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return TPESampler(seed=seed % 2**32, **settings)

    return make


def gp(**settings: Any) -> Callable[[StudyPlan, int], BaseSampler]:
    """A Gaussian process with settings of its own, for `Rules.make_sampler`."""

    def make(plan: StudyPlan, seed: int) -> BaseSampler:
        return GPSampler(seed=seed % 2**32, warn_independent_sampling=False, **settings)

    return make


def halving(*parts: float, reduction: float = 3, min_trials: int = 4) -> Callable[[StudyPlan, Any], BasePruner]:
    """A halving pruner with rungs at these parts of a run, for `Rules.make_pruner`."""

    def make(plan: StudyPlan, visible: Any) -> BasePruner:
        rungs = tuple(sorted({max(1, round(part * plan.num_epochs)) for part in parts}))
        return HalvingPruner(rungs, reduction=reduction, min_trials=min_trials, visible=visible)

    return make


_JOINT = {"multivariate": True, "group": True}
RANDOM = "random, no pruner"
RAY = "Ray's OptunaSearch + ASHA"
EARLY = halving(1 / 8, 3 / 8, reduction=3)
MAIN: Mapping[str, Strategy] = {
    RANDOM: random_search,
    "ours": ours(),
    "ours, halving": ours(pruner="halving"),
    "ours, tpe": ours(sampler="tpe"),
    "ours, judged from 1/8 on": ours(make_pruner=EARLY),
    RAY: ray_default,
}
SAMPLERS: Mapping[str, Strategy] = {
    "gp as it is": ours(),
    "gp, 6 random": ours(make_sampler=gp(n_startup_trials=6)),
    "gp, 10 random": ours(make_sampler=gp(n_startup_trials=10)),
    "tpe as it is": ours(sampler="tpe"),
    "tpe, 4 random": ours(make_sampler=tpe(n_startup_trials=4, **_JOINT)),
    "tpe, univariate": ours(make_sampler=tpe(multivariate=False)),
    "qmc": ours(sampler="qmc"),
    "random after the default": ours(sampler="random"),
}
PRUNERS: Mapping[str, Strategy] = {
    "none": ours(),
    "halving as it is": ours(pruner="halving"),
    "halving at 2/3": ours(make_pruner=halving(2 / 3)),
    "halving at 2/3, keep half": ours(make_pruner=halving(2 / 3, reduction=2)),
    "halving at 3/4 and 5/6, keep half": ours(make_pruner=halving(3 / 4, 5 / 6, reduction=2)),
    "halving at 5/6": ours(make_pruner=halving(5 / 6)),
    "halving at 1/8 and 3/8, keep a third": ours(make_pruner=EARLY),
    "the same, random points": ours(make_pruner=EARLY, sampler="random"),
}
DETERMINISM: Mapping[str, Strategy] = {
    "as trials end": ours(),
    "by batches of 4": ours(deterministic=True),
    "by batches of 8": ours(deterministic=True, trial_batch=8),
}
GROUPS: Mapping[str, Mapping[str, Strategy]] = {
    "main": MAIN,
    "samplers": SAMPLERS,
    "pruners": PRUNERS,
    "determinism": DETERMINISM,
}
"""What the benchmark compares on one problem, by group; every group is compared with `RANDOM`."""
