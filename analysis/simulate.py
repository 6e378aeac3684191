"""How many epochs searches need to find good settings, simulated on recorded learning curves of real trials.

    python analysis/simulate.py
    python analysis/simulate.py --tables digits-0.4 --groups pruners samplers --slots 2 4 --seeds 20 --out simulation.md
    python analysis/simulate.py --groups pruners --against "ours, halving"
    python analysis/simulate.py --groups grid --tables digits-0 digits-0.4 digits-1

Counts the epochs that all trials of a search trained, pruned ones included, until a trial that ran to its end reached
a share of the best value in the table (`--share`). A search that does not within the cap (`--cap`, in whole trials)
counts as the cap. `ratio` is the mean of the search that the others are compared with (`--against`) over this one's,
above 1 where this one needs fewer epochs. Intervals are 95 %, by bootstrap over seeds, the ratio's paired by seed.
`best` is the best whole trial within `--budget` whole trials' epochs. In the group `grid` the platform searches all
tables in one search, each a source cell of the next, the others one by one.

docs/simulator.md says what the tables are, how to record one, and what such numbers do not show.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from analysis.machine import machine_line
from analysis.simulator.comparison import GRID_NAME, Runner, Setting, compare, load
from analysis.simulator.report import describe, rank_correlations
from analysis.simulator.strategies import GROUPS, RANDOM
from analysis.simulator.table import CURVES
from refilled.command import exit_code


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        "simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    strategies = sorted({name for group in GROUPS.values() for name in group})
    recorded = sorted(path.name.removesuffix(".json.gz") for path in CURVES.glob("*.json.gz"))
    parser.add_argument("--tables", nargs="+", default=recorded, help="names of recorded tables; all")
    parser.add_argument("--groups", nargs="+", default=["main"], choices=[*GROUPS, GRID_NAME], help="searches; main")
    parser.add_argument(
        "--against", default=RANDOM, choices=strategies, help="the search whose epochs are divided; random"
    )
    parser.add_argument("--slots", nargs="+", type=_at_least_one, default=[2], help="trials side by side; 2")
    parser.add_argument("--seeds", type=_at_least_one, default=20, help="searches of every kind; 20")
    parser.add_argument("--first-seed", type=int, default=0, help="seeds that no choice was made on are fresh")
    parser.add_argument("--share", type=_share, default=0.99, help="of the best value, to be reached; 0.99")
    parser.add_argument(
        "--cap", type=_at_least_one, default=100, help="whole trials after which a search is given up; 100"
    )
    parser.add_argument(
        "--budget", type=_at_least_one, default=16, help="whole trials whose epochs `best` looks at; 16"
    )
    parser.add_argument("--seconds", action="store_true", help="time in recorded seconds; else an epoch takes 1")
    parser.add_argument("--unweighted", action="store_true", help="find the nearest settings with equal weights")
    parser.add_argument("--curves", type=Path, default=CURVES, help="folder of the tables")
    parser.add_argument("--processes", type=_at_least_one, default=2, help="simulations side by side; 2")
    parser.add_argument("--out", type=Path, help="file to write the same report to, as Markdown")
    parser.add_argument(
        "--keep",
        type=Path,
        help="file of searches that ended; the same command goes on from it (remove it when code changed)",
    )
    return parser.parse_args(arguments)


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = parse(arguments)
    return exit_code("simulate", lambda: report(given))


def report(given: argparse.Namespace) -> int:
    """Run the searches and print what they came to."""
    parts: list[str] = []

    def show(text: str) -> None:
        print(text, end="\n\n", flush=True)
        parts.append(text)
        if given.out is not None:
            given.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")

    show(f"# Simulated searches\n\n{machine_line(1)}")
    for name in given.tables:
        (table,) = load((name,), given.curves, not given.unweighted)
        show(f"{describe(table, given.share)}; {rank_correlations(table)}.")
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:
        runner = Runner(pool, given.keep)
        for group in given.groups:
            for slots in given.slots:
                setting = Setting(
                    slots=slots,
                    share=given.share,
                    cap=given.cap,
                    budget=given.budget,
                    in_seconds=given.seconds,
                    is_weighted=not given.unweighted,
                    curves=given.curves,
                )
                show(compare(group, given.tables, seeds, setting, runner, given.against))
    return 0


if __name__ == "__main__":
    sys.exit(main())
