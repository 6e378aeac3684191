"""Kill a search again and again, and compare its studies with those of one that nobody disturbed.

    python tests/faults/kill_search.py --kills 10 --seed 0

Two small deterministic searches of the digits: one runs through, of the other the driver, or its whole process group
(Ray and the workers too), gets SIGKILL at moments of its trials drawn from the seed, and the same command is started
again. At the end every study must hold the same trials: number, state, settings, values by epoch, value.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna

ROOT = Path(__file__).parents[2]
SEARCH = (
    "--deterministic --trials 10 --generation 2 --seeds 1 --overlaps 1 --epochs 6 10 --teacher-epochs 4 --no-forecast"
)


def start(storage: Path, flags: str = SEARCH) -> subprocess.Popen[str]:
    """The command, in a process group of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tune/search.py"), *flags.split(), "--storage", str(storage)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run_through(storage: Path, flags: str = SEARCH) -> str:
    """The output of a search that is left alone; raises where it fails."""
    process = start(storage, flags)
    output, _ = process.communicate(timeout=600)
    if process.returncode != 0:
        raise RuntimeError(f"the search ended with {process.returncode}:\n{output}")
    return output


def kill_after(storage: Path, seconds: float, *, whole_group: bool, flags: str = SEARCH) -> bool:
    """Start a search and kill it so long after its trials begin; whether it was still running then."""
    process = start(storage, flags)
    assert process.stdout is not None
    for line in process.stdout:
        if "] searching" in line:
            break
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        if whole_group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        return True
    return False


def trials_of(storage: Path) -> dict[str, list[dict[str, Any]]]:
    """Every study's trials, by the cell's name."""
    url = f"sqlite:///{storage / 'studies.db'}"
    found = {}
    for name in optuna.get_all_study_names(url):
        study = optuna.load_study(study_name=name, storage=url)
        found[study.user_attrs["cell"]] = [
            {
                "number": trial.number,
                "state": trial.state.name,
                "params": trial.params,
                "values": trial.intermediate_values,
                "value": trial.value,
                "origin": trial.user_attrs.get("origin"),
            }
            for trial in study.trials
        ]
    return found


def main() -> int:
    """Print every kill and the comparison; 0 where the end states are equal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--storage", type=Path, default=None, help="folder to keep; default: a temporary one")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    draws = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        base = arguments.storage or Path(folder)
        began_s = time.monotonic()
        run_through(base / "undisturbed")
        whole_s = time.monotonic() - began_s
        print(f"undisturbed: {whole_s:.1f} s; seed {arguments.seed}")
        done = 0
        while done < arguments.kills:
            seconds, whole_group = draws.uniform(1.0, 15.0), draws.random() < 0.5
            was_running = kill_after(base / "killed", seconds, whole_group=whole_group)
            states = [trial["state"] for trials in trials_of(base / "killed").values() for trial in trials]
            counts = {state: states.count(state) for state in sorted(set(states))}
            who = "process group" if whole_group else "driver"
            what = "killed" if was_running else "had ended"
            print(f"{what} {seconds:.1f} s after trials began ({who}): {json.dumps(counts)}", flush=True)
            done += 1
        run_through(base / "killed")
        expected, found = trials_of(base / "undisturbed"), trials_of(base / "killed")
        num_trials = sum(len(trials) for trials in expected.values())
        print(f"{num_trials} trials in {len(expected)} studies: {'equal' if found == expected else 'DIFFERENT'}")
        return 0 if found == expected else 1


if __name__ == "__main__":
    sys.exit(main())
