"""How many epochs searches need to find good settings, on recorded learning curves of real trials.

    python tests/benchmarks/bench_search.py
    python tests/benchmarks/bench_search.py --tables cifar-0.4 --groups main pruners samplers --slots 2 4 --seeds 20
    python tests/benchmarks/bench_search.py --groups grid --tables digits-0 digits-0.4 digits-1

Counts the epochs that all trials of a search trained, pruned ones included, until a trial that ran to its end reached
a share of the best value in the table (`--share`). A search that does not within the cap (`--cap`, in whole trials)
counts as the cap. `ratio` is random search's mean over this one's, above 1 where this one needs fewer epochs. Intervals
are 95 %, by bootstrap over seeds, the ratio's paired by seed. `best` is the best whole trial within `--budget` whole
trials' epochs. In the group `grid` ours searches all tables in one search, each a neighbour of the one before, the
others one by one; its last part compares the epochs of all tables together.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import optuna
from machine import machine_line
from replay.report import Result, comparison, describe, rank_correlations
from replay.simulation import Outcome, simulate
from replay.strategies import GROUPS, RANDOM, ours
from replay.table import CURVES, Row, Table

GRID: Mapping[str, dict[str, Any]] = {"ours": {}, "ours, no transfer": {"transfer": False}}
GRID_SHARE = 24  # trials that every cell of a grid gets before its neighbours, and any cell again, get more
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
        group: where the strategy is named.
        name: of the strategy.
        tables: that it searches together.
        grid: tables in which the same settings are answered by the same recorded ones.
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

    contestant = GROUPS[search.group][search.name](list(loaded.values()), seed)
    outcome = simulate(contestant, loaded, slots=setting.slots, is_over=is_over, epoch_time=seconds)
    return {each.name: _result(outcome, each, setting) for each in loaded.values()}


def run_grid(rules: Mapping[str, Any], tables: Mapping[str, Table], seed: int, setting: Setting) -> dict[str, Result]:
    """All tables in one search, then each of those whose target was not found in a search that goes on with it.

    What other cells would be given meanwhile changes nothing for it: neighbours give once, after their share.
    """
    storage = optuna.storages.InMemoryStorage()
    together = ours(num_trials=GRID_SHARE, storage=storage, **rules)(list(tables.values()), seed)
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
            is_over=lambda outcome, table=table, left=most - num_epochs: (  # type: ignore[misc]
                outcome.first_at(table.name, table.target(setting.share)) is not None or outcome.num_epochs >= left
            ),
        )
        first = more.first_at(name, table.target(setting.share))
        if first is not None:
            time = outcome.time + first.time
            results[name] = Result(num_epochs + first.epochs, time, True, results[name].best)
    return results


def _result(outcome: Outcome, table: Table, setting: Setting) -> Result:
    first = outcome.first_at(table.name, table.target(setting.share))
    best = outcome.best_within(table.name, setting.budget * table.num_epochs)
    if first is None:
        return Result(setting.cap * table.num_epochs, outcome.time, False, best)
    return Result(first.epochs, first.time, True, best)


def searches(group: str, tables: Sequence[str]) -> list[Search]:
    """What a group compares, random search first."""
    if group == GRID_NAME:
        grid = tuple(tables)
        alone = [Search("main", RANDOM, (each,), grid) for each in tables]
        return alone + [Search(group, name, grid, grid) for name in GRID]
    reference = [Search("main", RANDOM, (each,), (each,)) for each in tables] if group != "main" else []
    return reference + [Search(group, name, (each,), (each,)) for name in GROUPS[group] for each in tables]


def compare(group: str, tables: Sequence[str], seeds: Sequence[int], setting: Setting, runner: Runner) -> None:
    """Run a group's searches and print its table."""
    started = {each: [runner.start(each, seed, setting) for seed in seeds] for each in searches(group, tables)}
    found: dict[str, dict[str, list[Result]]] = {}  # by strategy and table
    for each, jobs in started.items():
        results = [job.result() for job in jobs]
        for table in each.tables:
            found.setdefault(each.name, {})[table] = [result[table] for result in results]
    print(
        f"\n{group}, {setting.slots} slots, {len(seeds)} seeds from {seeds[0]} on, cap {setting.cap} and budget "
        f"{setting.budget} whole trials"
    )
    print(comparison(found, RANDOM), flush=True)


class Runner:
    """Runs searches side by side, and writes down what they came to, so that a run that was interrupted goes on.

    Args:
        pool: where they run.
        path: of the file with a line a search; none: nothing is kept.
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


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recorded = sorted(path.name.removesuffix(".json.gz") for path in CURVES.glob("*.json.gz"))
    parser.add_argument("--tables", nargs="+", default=recorded)
    parser.add_argument("--groups", nargs="+", default=["main"], choices=[*GROUPS, GRID_NAME])
    parser.add_argument("--slots", nargs="+", type=int, default=[2])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0, help="seeds that no choice was made on are fresh")
    parser.add_argument("--share", type=float, default=0.99)
    parser.add_argument("--cap", type=int, default=100)
    parser.add_argument("--budget", type=int, default=16)
    parser.add_argument("--seconds", action="store_true", help="time in recorded seconds; else an epoch takes 1")
    parser.add_argument("--unweighted", action="store_true", help="find the nearest settings with equal weights")
    parser.add_argument("--curves", type=Path, default=CURVES)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--keep",
        type=Path,
        help="file of searches that ended; the same command goes on from it (remove it when code changed)",
    )
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    print(machine_line(1))
    for name in arguments.tables:
        (table,) = load((name,), arguments.curves, not arguments.unweighted)
        print(describe(table, arguments.share))
        print(rank_correlations(table), flush=True)
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        runner = Runner(pool, arguments.keep)
        for group in arguments.groups:
            for slots in arguments.slots:
                setting = Setting(
                    slots=slots,
                    share=arguments.share,
                    cap=arguments.cap,
                    budget=arguments.budget,
                    in_seconds=arguments.seconds,
                    is_weighted=not arguments.unweighted,
                    curves=arguments.curves,
                )
                compare(group, arguments.tables, seeds, setting, runner)


if __name__ == "__main__":
    main()
