"""Searches of several strategies on the same tables and seeds, side by side in processes."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import optuna

from analysis.simulator.report import Result, comparison
from analysis.simulator.simulation import Outcome, simulate
from analysis.simulator.strategies import GROUPS, ours
from analysis.simulator.table import Row, Table

GRID: Mapping[str, dict[str, Any]] = {"ours": {}, "ours, no warm start": {"transfer": False}}
GRID_TRIALS = 24  # of every cell of a grid, before one whose target was not found goes on alone
GRID_NAME = "grid"


@dataclass(frozen=True)
class Setting:
    """What is the same for all searches of one comparison; numbers of trials stand for as many whole trials' epochs."""

    slots: int
    share: float
    cap: int
    budget: int
    in_seconds: bool
    is_weighted: bool
    curves: Path


@lru_cache(maxsize=16)
def load(names: tuple[str, ...], curves: Path, is_weighted: bool) -> list[Table]:
    """The tables of one search, kept for the next search of the same process."""
    return Table.load_grid(names, curves, is_weighted=is_weighted)


@dataclass(frozen=True)
class Search:
    """One comparison's search of some tables.

    Attributes:
        group: Where the strategy is named.
        name: The name of the strategy.
        tables: That it searches together.
        grid: Tables in which the same settings are answered by the same recorded ones.
    """

    group: str
    name: str
    tables: tuple[str, ...]
    grid: tuple[str, ...]


def run_search(search: Search, seed: int, setting: Setting) -> dict[str, Result]:
    """Run one search; its result by table."""
    # Optuna and Ray say on every trial what these searches do thousands of times.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    # OptunaSearch warns of a space that takes a second, which on a busy machine drawing a point of ours may.
    warnings.filterwarnings("ignore", "Define-by-run function", UserWarning)
    grid = load(search.grid, setting.curves, setting.is_weighted)
    loaded = {each.name: each for each in grid if each.name in search.tables}
    if search.group == GRID_NAME:
        return run_grid(GRID[search.name], loaded, seed, setting)

    def is_over(outcome: Outcome) -> bool:
        return all(
            outcome.epochs.get(each.name, 0) >= setting.budget * each.num_epochs
            and outcome.first_at(each.name, each.target(setting.share)) is not None
            for each in loaded.values()
        ) or outcome.num_epochs >= sum(setting.cap * each.num_epochs for each in loaded.values())

    def seconds(table: Table, row: Row) -> float:
        return table.epoch_s[row["stage"]] if setting.in_seconds else 1.0

    contender = GROUPS[search.group][search.name](list(loaded.values()), seed)
    outcome = simulate(contender, loaded, slots=setting.slots, is_over=is_over, epoch_time=seconds)
    return {each.name: _result(outcome, each, setting) for each in loaded.values()}


def run_grid(rules: Mapping[str, Any], tables: Mapping[str, Table], seed: int, setting: Setting) -> dict[str, Result]:
    """All tables in one search, then each of those whose target was not found in a search that goes on with it.

    What other cells would take from it meanwhile changes nothing for it: a source cell is read once, when it is done.
    """
    storage = optuna.storages.InMemoryStorage()
    together = ours(num_trials=GRID_TRIALS, storage=storage, **rules)(list(tables.values()), seed)
    outcome = simulate(together, tables, slots=setting.slots, is_over=lambda outcome: False)
    results = {}
    for name, table in tables.items():
        results[name] = _result(outcome, table, setting)
        if results[name].found:
            continue
        num_epochs, most = outcome.epochs[name], setting.cap * table.num_epochs
        alone = ours(num_trials=setting.cap, storage=storage, transfer=False)([table], seed)
        more = simulate(
            alone,
            {name: table},
            slots=setting.slots,
            answers=outcome.answers,
            is_over=functools.partial(_is_over, table=table, setting=setting, most=most - num_epochs),
        )
        first = more.first_at(name, table.target(setting.share))
        if first is not None:
            time = outcome.time + first.time
            results[name] = Result(num_epochs + first.epochs, time, True, results[name].best)
    return results


def _is_over(outcome: Outcome, *, table: Table, setting: Setting, most: int) -> bool:
    """Whether the target is reached, or so many epochs are trained."""
    return outcome.first_at(table.name, table.target(setting.share)) is not None or outcome.num_epochs >= most


def _result(outcome: Outcome, table: Table, setting: Setting) -> Result:
    first = outcome.first_at(table.name, table.target(setting.share))
    best = outcome.best_within(table.name, setting.budget * table.num_epochs)
    if first is None:
        return Result(setting.cap * table.num_epochs, outcome.time, False, best)
    return Result(first.epochs, first.time, True, best)


def searches(group: str, tables: Sequence[str], against: str) -> dict[str, list[Search]]:
    """What a group compares, by the strategy's name, the reference first.

    Args:
        group: A group of strategies, or the grid.
        tables: Names of the tables.
        against: The reference, a strategy of any group.
    """
    together = tuple(tables)
    home = next(each for each, strategies in GROUPS.items() if against in strategies)
    if group == GRID_NAME:
        return {against: [Search(home, against, (each,), together) for each in tables]} | {
            name: [Search(group, name, together, together)] for name in GRID
        }
    homes = {against: home} | dict.fromkeys(GROUPS[group], group)
    return {name: [Search(of, name, (each,), (each,)) for each in tables] for name, of in homes.items()}


def compare(
    group: str, tables: Sequence[str], seeds: Sequence[int], setting: Setting, runner: Runner, against: str
) -> str:
    """Run a group's searches; the section of the report that compares them with the reference."""
    started = {
        name: [(each, [runner.start(each, seed, setting) for seed in seeds]) for each in of_name]
        for name, of_name in searches(group, tables, against).items()
    }
    found: dict[str, dict[str, list[Result]]] = {}  # by strategy and table
    for name, of_name in started.items():
        for each, jobs in of_name:
            results = [job.result() for job in jobs]
            for table in each.tables:
                found.setdefault(name, {})[table] = [result[table] for result in results]
    return (
        f"## {group}\n\n{setting.slots} slots, {len(seeds)} seeds from {seeds[0]} on, cap {setting.cap} and budget "
        f"{setting.budget} whole trials; ratio: epochs of `{against}` over those of the row\n\n"
        f"{comparison(found, against)}"
    )


class Runner:
    """Runs searches side by side, and writes down what they came to, so that a run that was interrupted goes on.

    Args:
        pool: Where they run.
        path: File with a line for each search; none: nothing is kept.
    """

    def __init__(self, pool: ProcessPoolExecutor, path: Path | None) -> None:
        self._pool, self._path = pool, path
        self._kept: dict[str, dict[str, Result]] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                stored = json.loads(line)
                self._kept[stored["search"]] = {name: Result(**each) for name, each in stored["results"].items()}

    def start(self, search: Search, seed: int, setting: Setting) -> Future[dict[str, Result]]:
        """A search's result by table: kept, or to come."""
        key = f"{search} {seed} {setting}"
        if key in self._kept:
            done: Future[dict[str, Result]] = Future()
            done.set_result(self._kept[key])
            return done
        job = self._pool.submit(run_search, search, seed, setting)
        job.add_done_callback(lambda ended: self._keep(key, ended))
        return job

    def _keep(self, key: str, job: Future[dict[str, Result]]) -> None:
        if self._path is None or job.cancelled() or job.exception() is not None:
            return
        results = {name: dataclasses.asdict(each) for name, each in job.result().items()}
        with self._path.open("a", encoding="utf-8") as file:  # one thread of the pool calls back
            file.write(json.dumps({"search": key, "results": results}) + "\n")
