"""Break searches and trainings again and again, and compare how they end with those that nobody disturbed.

    python tests/faults/inject.py --num 50 --seed 0

Real commands on the digits, real processes, real SIGKILL, at moments drawn from the seed. A fault counts as recovered
when the command that it hit, started again where the fault ended it, comes to the end state of an undisturbed one:
trials, every metric of every epoch, test accuracies and MLflow's runs equal, none doubled, none left running, and
neither a process nor a shared-memory file left over. Prints a table: fault, times injected, recovered, lost.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import optuna
from commands import ClusterPlace, Command, EndedBadlyError, LocalPlace, Place
from end_state import differences, end_state

SEARCH = (
    "tune/search.py --deterministic --trial-batch 2 --pruner halving --seeds 1 --overlaps 1 --teacher-epochs 8 "
    "--no-forecast"
)
SMALL, SMALLER = "--trials 6 --epochs 8 16", "--trials 3 --epochs 4 8"
TRAIN = "tune/train.py --overlap 0.4 --epochs 40 60 --teacher-epochs 20 --cpus-per-worker 0.5 --workers 2"
MAX_DEATHS = 4  # of trials' processes before a driver has given one up for good, less one


@dataclass(frozen=True)
class Scenario:
    """A command, where it runs, and what is done to it.

    `seconds` bounds the pause before each fault; `tolerance` is relative, for groups that change their size.
    """

    name: str
    command: str
    faults: tuple[str, ...]
    seconds: tuple[float, float] = (0.5, 6.0)
    place: Callable[[], Place] = LocalPlace
    tolerance: float = 0.0


SCENARIOS = (
    Scenario("search", f"{SEARCH} {SMALL}", ("driver", "process group", "SIGTERM", "trial")),
    Scenario(
        "search, trials of two workers",
        f"{SEARCH} {SMALLER} --workers-per-trial 2 --cpus-per-worker 0.5",
        ("helper", "trial", "driver"),
    ),
    Scenario("train.py, two workers", TRAIN, ("train worker", "controller", "driver", "SIGTERM")),
    Scenario("search on a cluster", f"{SEARCH} {SMALL}", ("node", "trial", "driver"), place=ClusterPlace),
    Scenario(
        "elastic train.py on a cluster",
        "tune/train.py --overlap 0.4 --epochs 100 150 --teacher-epochs 20 --workers 1:2 --precision float64",
        ("node",),
        place=functools.partial(ClusterPlace, num_nodes=2),
        tolerance=1e-9,
    ),
)


@dataclass
class Tally:
    """What was done and what came of it."""

    injected: Counter[str]
    recovered: Counter[str]

    def table(self) -> str:
        """A Markdown table, a line for each kind of fault."""
        lines = ["| fault | injected | recovered | lost |", "| --- | ---: | ---: | ---: |"]
        for kind in sorted(self.injected):
            lost = self.injected[kind] - self.recovered[kind]
            lines.append(f"| {kind} | {self.injected[kind]} | {self.recovered[kind]} | {lost} |")
        total, recovered = self.injected.total(), self.recovered.total()
        return "\n".join([*lines, f"| all | {total} | {recovered} | {total - recovered} |"])


def inject(scenario: Scenario, num_faults: int, draws: random.Random, base: Path, tally: Tally) -> bool:
    """Do a scenario until it has seen so many faults; whether every end state was that of the undisturbed one."""
    with scenario.place() as place:
        began_s = time.monotonic()
        undisturbed = base / "undisturbed"
        Command(scenario.command, undisturbed, place).finish()
        expected = end_state(undisturbed)
        say(f"{scenario.name}: undisturbed in {time.monotonic() - began_s:.0f} s")
        kinds = order(scenario.faults, draws)
        is_all_well, num_left = True, num_faults
        for round_number in itertools.count():
            if num_left == 0:
                return is_all_well
            storage = base / f"round-{round_number}"
            done = one_round(scenario, Command(scenario.command, storage, place), kinds, num_left, draws)
            num_left -= len(done.kinds)
            wrong = [done.trouble] if done.trouble else differences(expected, end_state(storage), scenario.tolerance)
            wrong += [f"left over: {each}" for each in place.left_over(storage)]
            is_all_well &= not wrong
            for kind in done.kinds:
                tally.injected[kind] += 1
                tally.recovered[kind] += not wrong
            say(f"{scenario.name}: {', '.join(done.kinds) or 'no fault'}: {'equal' if not wrong else 'DIFFERENT'}")
            for line in wrong[:20]:
                say(f"    {line}")
    raise AssertionError


@dataclass
class Round:
    """The faults that hit one storage, and what made its command fail for good."""

    kinds: list[str]
    trouble: str = ""


def one_round(scenario: Scenario, command: Command, kinds: Iterator[str], most: int, draws: random.Random) -> Round:
    """Start a command, break it until it ends all the same or has seen `most` faults, and see it to its end."""
    done, deaths = Round([]), 0
    kind = ""
    try:
        command.start()
        while len(done.kinds) < most and command.wait_until_it_trains():
            time.sleep(draws.uniform(*scenario.seconds))
            kind = kind or next(kinds)
            is_death = kind in ("trial", "helper", "node")
            if is_death and deaths >= MAX_DEATHS:
                kind = "driver"
            if not command.suffer(kind):
                continue  # there was nobody to hit, or it has ended
            deaths = deaths + 1 if is_death else 0 if command.was_restarted else deaths
            done.kinds.append(kind)
            kind = ""
        command.finish()
    except EndedBadlyError as error:
        done.trouble = str(error)
        command.end()
    return done


def order(faults: tuple[str, ...], draws: random.Random) -> Iterator[str]:
    """Every kind equally often, shuffled."""
    while True:
        yield from draws.sample(faults, len(faults))


def say(line: str) -> None:
    """Print at once."""
    print(line, flush=True)


def main() -> int:
    """Inject, print what happened and the table; 0 where all was recovered."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--num", type=int, default=50, help="faults to inject, over all scenarios")
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments")
    parser.add_argument("--scenario", default="", help="only those whose name has this in it")
    parser.add_argument("--storage", type=Path, default=None, help="folder to keep; default: a temporary one")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    scenarios = [each for each in SCENARIOS if arguments.scenario in each.name]
    kinds = sum(len(each.faults) for each in scenarios)
    tally, is_all_well, num_left = Tally(Counter(), Counter()), True, arguments.num
    say(f"seed {arguments.seed}")
    with tempfile.TemporaryDirectory() as folder:
        for number, scenario in enumerate(scenarios):
            share = round(arguments.num * len(scenario.faults) / kinds) if number + 1 < len(scenarios) else num_left
            share = min(share, num_left)
            num_left -= share
            draws = random.Random(json.dumps([arguments.seed, scenario.name]))
            base = (arguments.storage or Path(folder)) / str(number)
            is_all_well &= inject(scenario, share, draws, base, tally)
    print(tally.table())
    return 0 if is_all_well else 1


if __name__ == "__main__":
    sys.exit(main())
