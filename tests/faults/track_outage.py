"""Kill the MLflow server in the middle of a search, and compare what it is given later with the run folders.

    python tests/faults/track_outage.py

A small search of the digits mirrors to a server, which gets SIGKILL when the trials begin and stays away. The search
must end well, name the command that sends what is missing, and give every run's key where its id is unknown. The server
comes back, the command runs twice, and MLflow must hold every epoch of every run once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SEARCH = "--trials 3 --seeds 1 --overlaps 1 --epochs 3 4 --teacher-epochs 4 --no-forecast --tracking-uri"


def search_through_outage(storage: Path, server: Any) -> str:
    """The output of a search whose server goes away when its trials begin."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tune/search.py"), *SEARCH.split(), server.uri, "--storage", str(storage)],
        env={name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines, server_is_gone = [], False
    for line in process.stdout:
        lines.append(line)
        if "] searching" in line and not server_is_gone:
            server.kill()
            server_is_gone = True
            print("server killed", flush=True)
    if process.wait() != 0:
        raise RuntimeError(f"the search ended with {process.returncode}:\n{''.join(lines)}")
    return "".join(lines)


def sync(storage: Path) -> str:
    """What the command says."""
    command = [sys.executable, str(ROOT / "tune/sync.py"), str(storage)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def differences(storage: Path, server: Any) -> list[str]:
    """What MLflow and the run folders do not agree on."""
    from tune.tracking.store import open_store

    client = open_store(server.uri, create=False)
    runs = client.search_runs([client.get_experiment_by_name("refilled").experiment_id], max_results=1000)
    folders = {run.data.tags["run_key"].split("-", 1)[-1]: run for run in runs if run.data.tags["kind"] != "search"}
    found = [f"{run.info.run_id} is {run.info.status}" for run in runs if run.info.status == "RUNNING"]
    if len(folders) != len(runs) - 1:
        found.append(f"{len(runs)} runs, of {len(folders)} folders and a search")
    for path in sorted(each for each in (storage / "runs").iterdir() if each.is_dir()):
        if path.name not in folders:
            found.append(f"{path.name} is not in MLflow")
            continue
        run = folders[path.name]
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        points = client.get_metric_history(run.info.run_id, "train_loss")
        if [(each.step, each.value) for each in points] != [(row["epoch"], row["train_loss"]) for row in rows]:
            found.append(f"{path.name} differs")
    summary = json.loads((storage / "summary.json").read_text())
    keys = {run.data.tags["run_key"] for run in runs}
    for each in summary:
        missing = {*each["run_keys"], *each["baseline_run_keys"], each["trial_run_key"]} - keys
        found += [f"{key} of the summary is not in MLflow" for key in sorted(missing)]
        if set(each["run_ids"]) != {None}:
            found.append(f"ids of runs that MLflow did not have: {each['run_ids']}")
    return found


def main() -> int:
    """Print what was said and the comparison; 0 where MLflow holds what the folders hold."""
    sys.path.insert(0, str(ROOT / "tests/tune"))
    from mlflow_server import Server

    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder) / "storage"
        server = Server(Path(folder))
        server.start()
        try:
            began_s = time.monotonic()
            output = search_through_outage(storage, server)
            print(f"search: exit code 0 after {time.monotonic() - began_s:.1f} s")
            said = [line for line in output.splitlines() if "MLflow at" in line]
            print("\n".join(said))
            server.start()
            for _ in range(2):
                began_s = time.monotonic()
                print(sync(storage), f"({time.monotonic() - began_s:.1f} s)")
            found = differences(storage, server)
        finally:
            server.kill()
    if not any("tune/sync.py" in line for line in said):
        found.append("the search did not name the command")
    print("\n".join(found) or "MLflow holds every epoch of every run once")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
