"""MLflow gets everything of a search from its object store, after the driver's machine and all its files are gone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow_server import Gate, Server, cut_off_driver
from object_store import ObjectStore

from refilled.storage import Storage
from refilled.storage.object_storage import WORK_FOLDER
from tune.tracking.store import open_store
from tune.tracking.tracker import Tracker

ROOT = Path(__file__).parents[2]
NUM_EPOCHS = 4
DRIVER = f"""
    import sys
    import torch
    sys.path.insert(0, sys.argv[3])
    from outcomes import row_of
    from refilled.storage import Storage
    from refilled.storage.run_folder import RunFolder
    from tune.tracking.tracker import Tracker
    storage = Storage.open(sys.argv[2])
    tracker = Tracker(sys.argv[1], "lost", storage)
    tracker.start_search("search", name="a search", params={{"trials": 4}}, tags={{"kind": "search"}})
    print("started", flush=True)
    sys.stdin.readline()
    runs = [("trial", 0), ("trial", 1), ("trial", 2), ("refit", 3), ("refit", 4)]
    for kind, number in runs:
        key = f"{{kind}}-{{number}}"
        folder = RunFolder(storage, storage.root / "runs" / key)
        tags = {{"kind": kind, "number": str(number), "winner": "false"}}
        tracker.open_run(key, name=key, params={{"tau": number}}, tags=tags, folder=folder.path)
        folder.create({{"tau": number}}, ["cat", "dog"])
        for epoch in range(1, {NUM_EPOCHS} + 1):
            row = row_of(epoch, train_loss=number + 1 / epoch, epoch_s=0.5)
            folder.append_row(row)
        if kind == "refit":
            folder.finish(row, {{"weights": {{"w": torch.full([5], float(number))}}}})
            tracker.close_run(key, status="FINISHED", metrics={{"test_accuracy": number / 8}}, artifacts=folder.path)
        elif number < 2:
            tracker.close_run(key, status=["FINISHED", "KILLED"][number], metrics={{"best/val_accuracy": 0.5}})
    tracker.tag_run("trial-0", {{"winner": "true"}})
    artifacts = storage.root / "searches" / "search" / "artifacts"
    artifacts.mkdir()
    storage.write_json(artifacts / "summary.json", [1, 2])
    tracker.finish_search(status="FINISHED", metrics={{"winners": 1.0}}, artifacts=artifacts)
    print("told", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def store(tmp_path, monkeypatch):
    (tmp_path / "store").mkdir()
    store = ObjectStore(tmp_path / "store")
    store.start()
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    yield store
    store.stop()


def test_another_machine_gives_mlflow_everything_of_a_search_whose_machine_is_gone(
    server, store, tmp_path, monkeypatch
):
    url = f"s3://{store.bucket}/searches"
    gate = Gate(server.port)
    with cut_off_driver(gate, DRIVER, url, str(ROOT / "tests"), environment=at(tmp_path, "driver")):
        pass
    shutil.rmtree(tmp_path / "driver")
    gate.always("pass")

    assert "1 completed" in sync(url, at(tmp_path, "second"))  # the search, which was begun, and five runs
    ids = check(gate.uri)
    shutil.rmtree(tmp_path / "second")
    assert "nothing is missing" in sync(url, at(tmp_path, "third"))
    own = f"sqlite:///{tmp_path}/own/mlflow.db"
    assert "6 run(s) sent" in sync(url, at(tmp_path, "third"), "--tracking-uri", own)
    check(own)
    assert not list((tmp_path / "third").glob("*/artifacts"))

    monkeypatch.setenv(WORK_FOLDER, str(tmp_path / "fourth"))
    storage = Storage.open(url)
    before = gate.num_passed
    with Tracker(gate.uri, "lost", storage) as tracker:  # the same search goes on there
        tracker.start_search("search", name="a search", params={"trials": 4}, tags={"kind": "search"})
        assert tracker.flush(60)
        assert gate.num_passed - before < 20, "runs that MLflow has are not looked at one by one"
        assert tracker.run_ids(list(ids)) == ids
        folder = storage.root / "searches" / "search" / "artifacts"
        tracker.finish_search(status="FINISHED", metrics={"winners": 1.0}, artifacts=folder)
    assert check(gate.uri) == ids
    gate.close()


def at(tmp_path, machine):
    return os.environ | {WORK_FOLDER: str(tmp_path / machine)}


def sync(url, environment, *flags):
    command = [sys.executable, str(ROOT / "tune/sync.py"), url, *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def check(uri):
    """Every run is there once and whole; MLflow's ids of the search's runs."""
    client = open_store(uri, create=False)
    runs = client.search_runs([client.get_experiment_by_name("lost").experiment_id])
    by_key = {run.data.tags["run_key"]: run for run in runs}
    assert len(by_key) == len(runs) == 6
    search = by_key.pop("search")
    assert (search.info.status, search.data.params) == ("FINISHED", {"trials": "4"})
    assert search.data.metrics == {"winners": 1.0}
    assert json.loads(artifact(client, search, "summary.json")) == [1, 2]
    endings = {"trial-0": "FINISHED", "trial-1": "KILLED", "trial-2": "KILLED"}
    assert {key: run.info.status for key, run in by_key.items()} == {
        **endings,
        "refit-3": "FINISHED",
        "refit-4": "FINISHED",
    }
    for key, run in by_key.items():
        kind, number = key.split("-")
        expected = {"kind": kind, "number": number, "winner": str(key == "trial-0").lower()}
        assert (expected | {"mlflow.parentRunId": search.info.run_id}).items() <= run.data.tags.items()
        assert run.data.params == {"tau": number}
        points = client.get_metric_history(run.info.run_id, "train_loss")
        assert [(point.step, point.value, point.timestamp - run.info.start_time) for point in points] == [
            (epoch, int(number) + 1 / epoch, 500 * epoch) for epoch in range(1, NUM_EPOCHS + 1)
        ]
        files = {item.path for item in client.list_artifacts(run.info.run_id)}
        if kind == "refit":
            assert run.data.metrics["test_accuracy"] == int(number) / 8
            assert files >= {"config.json", "classes.json", "metrics.jsonl", "model.pt", "result.json"}
            assert len(artifact(client, run, "model.pt")) > 20
        else:
            assert files == set()
    return {key: run.info.run_id for key, run in by_key.items()}


def artifact(client, run, name):
    return Path(client.download_artifacts(run.info.run_id, name)).read_bytes()
