"""How many epochs searches need to find good settings, on recorded learning curves of real trials.

    python tests/benchmarks/bench_search.py
    python tests/benchmarks/bench_search.py --tables cifar-0.4 --groups main pruners samplers --slots 2 4 --seeds 20
    python tests/benchmarks/bench_search.py --groups transfer --tables digits-0 digits-0.4 digits-1

Counts the epochs that all trials of a search trained, pruned ones included, until a trial that ran to its end reached
a share of the best value in the table (`--share`). A search that does not within the cap (`--cap`, in whole trials)
counts as the cap. `ratio` is random search's mean over this one's, above 1 where this one needs fewer epochs. Intervals
are 95 %, by bootstrap over seeds, the ratio's paired by seed. `best` is the best whole trial within `--budget` whole
trials' epochs. The group `transfer` searches all tables in one search, each a neighbour of the one before.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import optuna
from machine import machine_line
from replay.simulation import Outcome, simulate
from replay.strategies import GROUPS, RANDOM, Strategy, ours
from replay.table import CURVES, Row, Table

NUM_RESAMPLES = 10_000
TRANSFER: Mapping[str, Callable[[int], Strategy]] = {
    "ours, transfer": lambda trials: ours(num_trials=trials),
    "ours, no transfer": lambda trials: ours(num_trials=trials, transfer=False),
    "no pruner, transfer": lambda trials: ours(num_trials=trials, pruner="none"),
    "no pruner, no transfer": lambda trials: ours(num_trials=trials, pruner="none", transfer=False),
}


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


@dataclass(frozen=True)
class Result:
    """What one search came to on one table."""

    epochs: int
    time: float
    found: bool
    best: float


@lru_cache(maxsize=16)
def load(name: str, curves: Path, is_weighted: bool) -> Table:
    """A table, kept for the next search of the same process."""
    return Table.load(name, curves, is_weighted=is_weighted)


def search(group: str, name: str, tables: Sequence[str], seed: int, setting: Setting) -> dict[str, Result]:
    """Run one search; its result by table."""
    # Optuna and Ray say on every trial what these searches do thousands of times.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    # OptunaSearch warns of a space that takes a second, which on a busy machine drawing a point of ours may.
    warnings.filterwarnings("ignore", "Define-by-run function", UserWarning)
    loaded = {each: load(each, setting.curves, setting.is_weighted) for each in tables}
    strategy = TRANSFER[name](setting.cap) if group == "transfer" else GROUPS[group][name]

    def is_over(outcome: Outcome) -> bool:
        return all(
            outcome.epochs.get(each.name, 0) >= setting.budget * each.num_epochs
            and outcome.first_at(each.name, each.target(setting.share)) is not None
            for each in loaded.values()
        ) or outcome.num_epochs >= sum(setting.cap * each.num_epochs for each in loaded.values())

    def seconds(table: Table, row: Row) -> float:
        return table.epoch_s[row["stage"]] if setting.in_seconds else 1.0

    contestant = strategy(list(loaded.values()), seed)
    outcome = simulate(contestant, loaded, slots=setting.slots, is_over=is_over, epoch_time=seconds)
    return {each.name: _result(outcome, each, setting) for each in loaded.values()}


def _result(outcome: Outcome, table: Table, setting: Setting) -> Result:
    first = outcome.first_at(table.name, table.target(setting.share))
    best = outcome.best_within(table.name, setting.budget * table.num_epochs)
    if first is None:
        return Result(setting.cap * table.num_epochs, outcome.time, False, best)
    return Result(first.epochs, first.time, True, best)


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean, by bootstrap."""
    array = np.asarray(values, dtype=float)
    chosen = np.random.default_rng(seed).integers(len(array), size=(NUM_RESAMPLES, len(array)))
    low, high = np.quantile(array[chosen].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def ratio_interval(upper: Sequence[float], lower: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the ratio of two means whose values belong together in pairs, by bootstrap over the pairs."""
    above, below = np.asarray(upper, dtype=float), np.asarray(lower, dtype=float)
    chosen = np.random.default_rng(seed).integers(len(above), size=(NUM_RESAMPLES, len(above)))
    low, high = np.quantile(above[chosen].mean(axis=1) / below[chosen].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def line(name: str, results: Sequence[Result], reference: Sequence[Result] | None) -> str:
    """One strategy's row of the printed table."""
    epochs = [each.epochs for each in results]
    low, high = interval(epochs)
    missed = sum(not each.found for each in results)
    best_low, best_high = interval([each.best for each in results])
    parts = [
        f"{name:<36} {statistics.median(epochs):>7.0f} {statistics.mean(epochs):>7.0f} [{low:>5.0f}, {high:>5.0f}]",
        f"{missed:>6}",
        f"{statistics.mean(each.time for each in results):>9.1f}",
        f"{statistics.mean(each.best for each in results):>7.4f} [{best_low:.4f}, {best_high:.4f}]",
    ]
    if reference is not None:
        others = [each.epochs for each in reference]
        ratio_low, ratio_high = ratio_interval(others, epochs)
        parts.append(f"{statistics.mean(others) / statistics.mean(epochs):>6.2f} [{ratio_low:.2f}, {ratio_high:.2f}]")
    return " ".join(parts)


HEADER = (
    f"{'':<36} {'median':>7} {'mean':>7} {'95 %':>14} {'missed':>6} {'time':>9} {'best':>7} {'95 %':>16} "
    f"{'ratio':>6} {'95 %':>12}"
)


def describe(table: Table, share: float) -> str:
    """How hard a table is, and how much it can say."""
    values = [curve.value for curve in table.curves]
    near = sum(value >= table.target(share) for value in values)
    return (
        f"{table.name}: {len(values)} trials of {table.num_epochs} epochs, best {table.best:.4f}, median "
        f"{statistics.median(values):.4f}, default settings {values[0]:.4f}, {near} reach {share:g} of the best; "
        f"neighbours agree to {table.agreement():.2f} (rank correlation)"
    )


def rank_correlations(table: Table) -> str:
    """How well the order of trials after a part of a run says their order at the end: what a pruner has to go by."""
    from scipy.stats import spearmanr

    whole = [curve for curve in table.curves if len(curve.val_accuracy) == table.num_epochs]
    values = [curve.value for curve in whole]
    parts = {part: max(1, round(part * table.num_epochs)) for part in (1 / 8, 1 / 4, 3 / 8, 1 / 2, 2 / 3, 3 / 4, 5 / 6)}
    found = (
        f"{epoch}: {spearmanr([curve.val_accuracy[epoch - 1] for curve in whole], values).statistic:.2f}"
        for epoch in parts.values()
    )
    return f"  rank correlation of an epoch's values with the final ones: {', '.join(found)}"


def compare(group: str, table_names: Sequence[str], seeds: int, setting: Setting, pool: ProcessPoolExecutor) -> None:
    """Run a group's searches and print its table as they come."""
    names = list(TRANSFER) if group == "transfer" else list(GROUPS[group])
    kinds = [("main", RANDOM, [each]) for each in table_names] if group != "main" else []
    kinds += (
        [(group, name, list(table_names)) for name in names]
        if group == "transfer"
        else [(group, name, [each]) for each in table_names for name in names]
    )
    jobs = {
        (kind, tuple(tables), name): [pool.submit(search, kind, name, tables, seed, setting) for seed in range(seeds)]
        for kind, name, tables in kinds
    }
    collected: dict[tuple[str, str], list[Result]] = {}
    print(
        f"\n{group}, {setting.slots} slots, {seeds} seeds, cap {setting.cap} and budget {setting.budget} whole trials"
    )
    for table in table_names:
        print(f"{table}\n{HEADER}", flush=True)
        for (_, tables, name), started in jobs.items():
            if table in tables:
                collected[table, name] = [job.result()[table] for job in started]
                reference = None if name == RANDOM else collected[table, RANDOM]
                print(line(name, collected[table, name], reference), flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recorded = sorted(path.name.removesuffix(".json.gz") for path in CURVES.glob("*.json.gz"))
    parser.add_argument("--tables", nargs="+", default=recorded)
    parser.add_argument("--groups", nargs="+", default=["main"], choices=[*GROUPS, "transfer"])
    parser.add_argument("--slots", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--share", type=float, default=0.99)
    parser.add_argument("--cap", type=int, default=60)
    parser.add_argument("--budget", type=int, default=16)
    parser.add_argument("--seconds", action="store_true", help="time in recorded seconds; else an epoch takes 1")
    parser.add_argument("--unweighted", action="store_true", help="find the nearest settings with equal weights")
    parser.add_argument("--curves", type=Path, default=CURVES)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    print(machine_line(1))
    for name in arguments.tables:
        table = load(name, arguments.curves, not arguments.unweighted)
        print(describe(table, arguments.share))
        print(rank_correlations(table), flush=True)
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
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
                compare(group, arguments.tables, arguments.seeds, setting, pool)


if __name__ == "__main__":
    main()
