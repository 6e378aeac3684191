"""MLflow that is away, slow or refusing costs nothing: what it missed is sent once, in order, when it is back."""

import dataclasses
import json
import logging
import random
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from pathlib import Path

import pytest
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException
from mlflow_server import Gate, Server, cut_off_driver
from outcomes import row_of

from refilled.errors import UserError
from refilled.storage import Storage
from tune.sync import command
from tune.tracking.outbox import Ending, Outbox, RunState, SearchState, has_answered, kept_uri
from tune.tracking.store import open_store
from tune.tracking.sync import Connection, Sync
from tune.tracking.tracker import Tracker, resolve_tracking_uri

DONE_S = 60.0
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """A SQLite store for the module: creating its tables takes 2 s."""
    return resolve_tracking_uri(None, Storage.open(tmp_path_factory.mktemp("store")))


@pytest.fixture
def gate(server):
    gate = Gate(server.port)
    yield gate
    gate.close()


@pytest.fixture
def experiment():
    return f"experiment-{uuid.uuid4().hex[:8]}"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    """A test need not wait as long as a person's search may."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")


def row(epoch):
    return row_of(epoch, train_loss=1.0 / epoch, val_accuracy=epoch / 10).to_dict()


def write_rows(folder, *epochs):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row(epoch)) + "\n" for epoch in epochs)


def open_search(tracker):
    return tracker.start_search("search", name="a search", params={"trials": 4}, tags={"kind": "search"})


def open_trial(tracker, storage, key):
    tags = {"kind": "trial", "winner": "false"}
    tracker.open_run(key, name=f"trial {key}", params={"tau": 4.0}, tags=tags, folder=storage / "runs" / key)


def trial(storage, key="trial", ending=None, **tags):
    folder = storage / "runs" / key
    return RunState(key, f"trial {key}", {"tau": "4.0"}, {"kind": "trial", **tags}, folder, ending=ending)


def search(experiment="experiment", uri=None):
    return SearchState("search", "a search", {}, {"kind": "search"}, experiment=experiment, uri=uri)


def outbox_of(storage, *states):
    """What a driver without its thread leaves that is killed without a word."""
    outbox = Outbox(Storage.open(storage), "search")
    assert outbox.hold()
    for state in states:
        outbox.put(state)
    return outbox


def files_of(storage):
    return sorted(path.relative_to(storage / "searches").as_posix() for path in storage.glob("searches/**/*.json"))


def held(uri, experiment, storage):
    """All active runs by their keys; what holds for each of them is checked."""
    client = open_store(uri, create=False)
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    by_key = {run.data.tags["run_key"]: run for run in runs}
    assert len(by_key) == len(runs), "no run is there twice"
    for key, run in by_key.items():
        if key == "search":
            continue
        assert run.data.tags["mlflow.parentRunId"] == by_key["search"].info.run_id
        path = storage / "runs" / key / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for name in ("train_loss", "val_accuracy"):
            points = client.get_metric_history(run.info.run_id, name)
            assert [(point.step, point.value) for point in points] == [(each["epoch"], each[name]) for each in rows]
    return by_key


def statuses(by_key):
    return {key: run.info.status for key, run in by_key.items()}


def warnings_of(caplog):
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


def test_a_server_that_is_killed_and_comes_back_is_caught_up_in_the_same_run(
    server, experiment, tmp_path, caplog, capsys
):
    with Tracker(server.uri, experiment, Storage.open(tmp_path)) as tracker:
        assert open_search(tracker) is not None
        open_trial(tracker, tmp_path, "one")
        write_rows(tmp_path / "runs" / "one", 1, 2)
        assert tracker.flush(DONE_S)
        server.kill()
        try:
            write_rows(tmp_path / "runs" / "one", 3)
            open_trial(tracker, tmp_path, "two")
            write_rows(tmp_path / "runs" / "two", 1)
            tracker.close_run("one", status="FINISHED", metrics={"best/val_accuracy": 0.3})
            tracker.close_run("two", status="KILLED", metrics={})
            tracker.tag_run("one", {"winner": "true"})
            assert tracker.run_id("two", timeout_s=1.0) is None
            assert tracker.run_ids(["one", "two"], timeout_s=0.0)["one"] is not None
        finally:
            server.start()
        tracker.finish_search(status="FINISHED", metrics={"winners": 1.0})
        assert tracker.flush(DONE_S)
        assert tracker.run_id("two") is not None
    runs = held(server.uri, experiment, tmp_path)
    assert statuses(runs) == {"search": "FINISHED", "one": "FINISHED", "two": "KILLED"}
    assert runs["one"].data.metrics["best/val_accuracy"] == 0.3
    assert [runs[key].data.tags["winner"] for key in ("one", "two")] == ["true", "false"]
    assert len(warnings_of(caplog)) == 1
    assert "no server answers there" in warnings_of(caplog)[0]
    assert command([str(tmp_path)]) == 0
    assert "nothing is missing" in capsys.readouterr().out


@pytest.mark.parametrize("trouble", ["refuse", "hang"])
def test_a_server_used_before_may_be_away_at_the_start(gate, experiment, tmp_path, caplog, trouble):
    with Tracker(gate.uri, experiment, Storage.open(tmp_path)) as tracker:
        open_search(tracker)
        open_trial(tracker, tmp_path, "one")
        write_rows(tmp_path / "runs" / "one", 1)
    gate.always(trouble)
    with Tracker(gate.uri, experiment, Storage.open(tmp_path)) as tracker:
        assert open_search(tracker) is None
        open_trial(tracker, tmp_path, "one")
        write_rows(tmp_path / "runs" / "one", 2)
        assert tracker.run_id("one", timeout_s=0.5) is None
        assert not tracker.flush(0.5)
        assert len(warnings_of(caplog)) == 1
        assert "the search goes on, and MLflow is caught up" in warnings_of(caplog)[0]
        gate.always("pass")
        tracker.close_run("one", status="FINISHED", metrics={})
        tracker.finish_search(status="FINISHED")
        assert tracker.flush(DONE_S)
    assert statuses(held(gate.uri, experiment, tmp_path)) == {"search": "FINISHED", "one": "FINISHED"}


def test_a_server_that_never_took_a_search_is_refused_and_nothing_is_left(gate, experiment, tmp_path):
    gate.always("refuse")
    with pytest.raises(UserError, match="tracking_uri: MLflow at"):
        Tracker(gate.uri, experiment, Storage.open(tmp_path))
    gate.answer = lambda method, path: "refuse" if path.endswith("runs/create") else "pass"
    with (
        pytest.raises(UserError, match="tracking_uri: MLflow at"),
        Tracker(gate.uri, experiment, Storage.open(tmp_path)) as tracker,
    ):
        open_search(tracker)
    assert files_of(tmp_path) == []
    assert not has_answered(Storage.open(tmp_path), gate.uri)


def test_lost_answers_to_requests_that_create_make_no_second_run(gate, experiment, tmp_path):
    """MLflow's client asks again by itself, and the first request has already made a run."""
    with Tracker(gate.uri, experiment, Storage.open(tmp_path)) as tracker:
        open_search(tracker)
        gate.answer = lambda method, path: "lose" if path.endswith(("runs/create", "runs/log-batch")) else "pass"
        open_trial(tracker, tmp_path, "one")
        write_rows(tmp_path / "runs" / "one", 1, 2)
        assert not tracker.flush(6.0)
        client = open_store(gate.uri, create=False)
        experiment_id = client.get_experiment_by_name(experiment).experiment_id
        made = client.search_runs([experiment_id], "tags.kind = 'trial'", run_view_type=ViewType.ALL)
        assert len(made) > 1
        gate.always("pass")
        tracker.close_run("one", status="FINISHED", metrics={})
        assert tracker.flush(DONE_S)
        tracker.finish_search(status="FINISHED")
    assert statuses(held(gate.uri, experiment, tmp_path)) == {"search": "FINISHED", "one": "FINISHED"}


def test_refused_artifacts_hold_back_nothing_else_and_come_later(gate, experiment, tmp_path, capsys):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "student.pt").write_bytes(b"weights")
    gate.answer = lambda method, path: "refuse" if "mlflow-artifacts" in path else "pass"
    tracker = Tracker(gate.uri, experiment, Storage.open(tmp_path))
    open_search(tracker)
    for key in ("one", "two"):
        open_trial(tracker, tmp_path, key)
        write_rows(tmp_path / "runs" / key, 1)
        tracker.close_run(key, status="FINISHED", metrics={}, artifacts=tmp_path / "files" if key == "one" else None)
    tracker.finish_search(status="FINISHED")
    tracker.close(timeout_s=5.0)
    runs = held(gate.uri, experiment, tmp_path)
    assert statuses(runs) == dict.fromkeys(("search", "one", "two"), "FINISHED")
    assert command([str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert "2 found whole" in output.out
    assert "1 run(s) could not be sent whole: one: MLflow at" in output.err
    gate.always("pass")
    assert command([str(tmp_path)]) == 0
    client = open_store(gate.uri, create=False)
    assert [item.path for item in client.list_artifacts(runs["one"].info.run_id)] == ["student.pt"]


DRIVER = """
    import json, sys
    sys.path.insert(0, sys.argv[4])
    from pathlib import Path
    from outcomes import row_of
    from tune.tracking.tracker import Tracker
    from refilled.storage import Storage
    uri, experiment, storage = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    tracker = Tracker(uri, experiment, Storage.open(storage))
    tracker.start_search("search", name="a search", params={"trials": 4}, tags={"kind": "search"})
    print("started", flush=True)
    sys.stdin.readline()
    for number in range(12):
        key = f"run-{number}"
        folder = storage / "runs" / key
        tags = {"kind": "trial", "winner": "false"}
        tracker.open_run(key, name=f"trial {number}", params={"tau": 4.0}, tags=tags, folder=folder)
        folder.mkdir(parents=True)
        for epoch in range(1, 6):
            with (folder / "metrics.jsonl").open("a") as file:
                row = row_of(epoch, train_loss=1 / epoch, val_accuracy=epoch / 10)
                file.write(json.dumps(row.to_dict()) + "\\n")
        if number < 8:
            tracker.close_run(key, status="FINISHED", metrics={"best/val_accuracy": 0.5}, artifacts=folder)
        elif number < 10:
            tracker.close_run(key, status="KILLED", metrics={})
    tracker.tag_run("run-3", {"winner": "true"})
    print("told", flush=True)
    sys.stdin.readline()
"""


def check_synced(uri, experiment, storage):
    runs = held(uri, experiment, storage)
    assert set(runs) == {"search", *(f"run-{number}" for number in range(12))}
    for number in range(12):
        run = runs[f"run-{number}"]
        assert run.info.status == ("FINISHED" if number < 8 else "KILLED")
        assert run.data.metrics.get("best/val_accuracy") == (0.5 if number < 8 else None)
        assert run.data.tags["winner"] == ("true" if number == 3 else "false")
        assert run.data.params == {"tau": "4.0"}
    assert runs["search"].info.status == "KILLED"
    states = Outbox(Storage.open(storage), "search").runs
    assert {key: run.info.start_time for key, run in runs.items() if key != "search"} == {
        key: each.started_ms for key, each in states.items()
    }
    assert runs["run-3"].info.end_time == states["run-3"].ending.ended_ms
    return runs


def test_a_killed_driver_is_synced_once_however_often_and_however_interrupted(gate, experiment, tmp_path, capsys):
    storage = tmp_path / "storage"
    with cut_off_driver(gate, DRIVER, experiment, str(storage), str(ROOT / "tests")):
        assert command([str(storage)]) == 0
        assert "the running search has it" in capsys.readouterr().out
    assert set(keys_in(gate, experiment)) == {"search"}

    for more in (4, 30):  # requests until the server is gone again
        limit = gate.num_passed + more
        gate.answer = lambda method, path, limit=limit: "pass" if gate.num_passed < limit else "refuse"
        assert command([str(storage)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("sync: ")
        assert error.count("\n") == 1
    assert 1 < len(keys_in(gate, experiment)) < 13

    gate.always("pass")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tune/sync.py"), str(storage)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"search 'a search' (search) of experiment '{experiment}': ")
    first = {
        key: (run.info.run_id, run.info.end_time) for key, run in check_synced(gate.uri, experiment, storage).items()
    }
    assert command([str(storage)]) == 0
    assert "nothing is missing" in capsys.readouterr().out
    assert command([str(storage), "--again"]) == 0
    assert "0 run(s) sent, 0 completed, 13 found whole; 0 metric value(s) sent" in capsys.readouterr().out
    again = check_synced(gate.uri, experiment, storage)
    assert {key: (run.info.run_id, run.info.end_time) for key, run in again.items()} == first

    other = f"sqlite:///{tmp_path}/other.db"
    assert command([str(storage), "--tracking-uri", other]) == 0
    assert "13 run(s) sent, 0 completed, 0 found whole; 548 metric value(s) sent" in capsys.readouterr().out
    check_synced(other, experiment, storage)


def keys_in(gate, experiment):
    before, gate.answer = gate.answer, lambda method, path: "pass"
    client = open_store(gate.uri, create=False)
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    gate.answer = before
    return [run.data.tags["run_key"] for run in runs]


def test_the_next_driver_sends_what_a_killed_one_could_not(gate, experiment, tmp_path):
    with Tracker(gate.uri, experiment, Storage.open(tmp_path)) as tracker:
        open_search(tracker)
    for key in ("ended", "open"):
        write_rows(tmp_path / "runs" / key, 1, 2)
    ending = Ending("FINISHED", {"best/val_accuracy": 0.2})
    outbox_of(
        tmp_path,
        search(experiment, kept_uri(gate.uri, Storage.open(tmp_path))),
        trial(tmp_path, "ended", ending, winner="true"),
        trial(tmp_path, "open"),
    ).close()
    with Tracker(gate.uri, experiment, Storage.open(tmp_path)) as tracker:
        open_search(tracker)
        assert tracker.run_id("ended", DONE_S) is not None
        tracker.finish_search(status="FINISHED")
    runs = held(gate.uri, experiment, tmp_path)
    assert statuses(runs) == {"search": "FINISHED", "ended": "FINISHED", "open": "KILLED"}
    assert runs["ended"].data.tags["winner"] == "true"


def test_a_search_that_goes_on_asks_for_no_run_that_mlflow_has_and_for_all_where_it_lost_them(
    gate, experiment, tmp_path
):
    asked = []

    def note(method, path):
        asked.append(path)
        return "pass"

    gate.answer = note
    other = f"sqlite:///{tmp_path}/other.db"
    counts = []
    for uri in (gate.uri, gate.uri, other):
        with Tracker(uri, experiment, Storage.open(tmp_path)) as tracker:
            open_search(tracker)
            for key in ("one", "two", "three"):
                if not counts:
                    open_trial(tracker, tmp_path, key)
                    write_rows(tmp_path / "runs" / key, 1, 2)
                    tracker.close_run(key, status="KILLED", metrics={})
            tracker.finish_search(status="FINISHED")
            assert tracker.flush(DONE_S)
            assert None not in tracker.run_ids(["one", "two", "three"]).values()
        counts.append(sum("search" in path or "get-history" in path for path in asked))
        asked.clear()
        assert set(held(uri, experiment, tmp_path)) == {"search", "one", "two", "three"}
        asked.clear()
    assert counts[1] < 5 < counts[0]
    client = open_store(other, create=False)
    found = client.get_experiment_by_name(experiment).experiment_id
    for run in client.search_runs([found]):
        client.delete_run(run.info.run_id)
    assert command([str(tmp_path)]) == 0
    assert set(held(other, experiment, tmp_path)) == {"search", "one", "two", "three"}


def test_two_that_sync_at_once_make_every_run_and_every_number_once(gate, experiment, tmp_path):
    """As `tune/sync.py` on another machine does, which cannot know that the driver lives."""
    address = kept_uri(gate.uri, Storage.open(tmp_path))
    states = [search(experiment, address), *(trial(tmp_path, f"run-{i}") for i in range(4))]
    for state in states[1:]:
        write_rows(state.folder, *range(1, 6))
    outbox_of(tmp_path, *states).close()
    barrier = threading.Barrier(2)
    errors = []

    def bring_all():
        outbox = Outbox(Storage.open(tmp_path), "search")
        sync = Sync(Connection(gate.uri, experiment, Storage.open(tmp_path)), outbox)
        for state in (outbox.search, *outbox.runs.values()):
            sync.put(state)
        for key in list(sync.pending):
            barrier.wait(30)
            for _ in range(20):
                try:
                    sync.bring(key)
                    break
                except MlflowException as error:  # the other one has deleted what both had made
                    errors.append(error)
                    time.sleep(random.random() / 10)
            else:
                raise AssertionError(errors)

    threads = [threading.Thread(target=bring_all) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runs = held(gate.uri, experiment, tmp_path)
    assert set(runs) == {state.key for state in states}


def test_a_storage_folder_that_is_moved_stays_whole(experiment, tmp_path):
    """States, rows, MLflow's runs, and the artifacts from before and after, none of which say where they lie."""
    before, storage = tmp_path / "before", tmp_path / "after"
    outbox_of(
        before,
        search(experiment, kept_uri(resolve_tracking_uri(None, Storage.open(before)), Storage.open(before))),
        trial(before, "one", Ending("FINISHED", {}, before / "runs" / "one")),
        trial(before, "two"),
    ).close()
    write_rows(before / "runs" / "one", 1, 2, 3)
    program = """
        import sys
        from tune.sync import command
        assert command([sys.argv[1]]) == 0
        assert not {"ray", "torchvision"} & set(sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(before)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    before.rename(storage)
    with Tracker(resolve_tracking_uri(None, Storage.open(storage)), experiment, Storage.open(storage)) as tracker:
        open_search(tracker)
        open_trial(tracker, storage, "two")
        write_rows(storage / "runs" / "two", 1)
        tracker.close_run("two", status="FINISHED", metrics={}, artifacts=storage / "runs" / "two")
        tracker.finish_search(status="FINISHED")
    assert not before.exists()
    assert_artifacts(storage, experiment)
    again = tmp_path / "again"
    shutil.copytree(storage, again)
    assert_artifacts(again, experiment)  # a reader, such as the report, finds it out too
    assert command([str(again)]) == 0
    assert_artifacts(storage, experiment)


def test_a_copy_in_another_file_keeps_its_artifacts_beside_it(experiment, tmp_path):
    """So that neither a move of the storage nor one of the copy leaves it without them."""
    storage, copy = tmp_path / "storage", tmp_path / "copy"
    ending = Ending("FINISHED", {}, storage / "runs" / "one")
    write_rows(storage / "runs" / "one", 1, 2)
    outbox_of(storage, search(experiment), trial(storage, "one", ending)).close()
    assert command([str(storage), "--tracking-uri", f"sqlite:///{copy}/mlflow.db"]) == 0
    storage.rename(tmp_path / "moved")
    copy.rename(tmp_path / "copy moved")
    uri = f"sqlite:///{tmp_path}/copy moved/mlflow.db"
    client = open_store(uri, create=False)
    run = held(uri, experiment, tmp_path / "moved")["one"]
    assert [each.path for each in client.list_artifacts(run.info.run_id)] == ["metrics.jsonl"]
    assert not (tmp_path / "moved" / "artifacts").exists()


def assert_artifacts(storage, experiment):
    """Every run's rows can be downloaded, from its own folder."""
    uri = resolve_tracking_uri(None, Storage.open(storage))
    runs = held(uri, experiment, storage)
    assert statuses(runs) == dict.fromkeys(("search", "one", "two"), "FINISHED")
    client = open_store(uri, create=False)
    root = (storage / "artifacts").as_uri()
    assert client.get_experiment_by_name(experiment).artifact_location == root
    for key in ("one", "two"):
        run = client.get_run(runs[key].info.run_id)
        assert run.info.artifact_uri == f"{root}/{run.info.run_id}/artifacts"
        downloaded = Path(client.download_artifacts(run.info.run_id, "metrics.jsonl"))
        assert downloaded.read_bytes() == (storage / "runs" / key / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["{tmp}/none"], "storage: must be the storage of searches"),
        (["{tmp}"], "storage: must be the storage of searches"),
        (["{tmp}/told", "--tracking-uri", "nonsense"], "neither"),
        (["{tmp}/told", "--tracking-uri", "http://127.0.0.1:9"], "no server answers there"),
        (["{tmp}/told"], "must be given with its password, which is not kept; it was postgresql://me:***@h/x"),
        ([], "storage"),
    ],
)
def test_sync_refuses_in_one_sentence(tmp_path, capsys, arguments, part):
    outbox_of(tmp_path / "told", search(uri=kept_uri("postgresql://me:secret@h/x", Storage.open(tmp_path)))).close()
    assert command([each.format(tmp=tmp_path) for each in arguments]) == 2
    output = capsys.readouterr()
    assert part in output.err
    assert output.err.count("\n") == 1
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"secret" in path.read_bytes()]
    assert "secret" not in output.err


def state_of(storage, key="trial"):
    return json.loads((storage / "searches" / "search" / "runs" / f"{key}.json").read_text())


def test_a_state_is_on_the_disk_when_the_call_returns_and_what_says_nothing_new_is_not_written(tmp_path):
    outbox = outbox_of(tmp_path, search())
    assert files_of(tmp_path) == ["search/state.json"]
    first = outbox.put(trial(tmp_path))
    assert state_of(tmp_path)["folder"] == "runs/trial"
    assert state_of(tmp_path)["ending"] is None
    ending = Ending("FINISHED", {"a": 1.0}, tmp_path / "runs" / "trial")
    outbox.put(trial(tmp_path, ending=ending))
    assert state_of(tmp_path)["ending"] == {
        "status": "FINISHED",
        "metrics": {"a": 1.0},
        "artifacts": "runs/trial",
        "ended_ms": ending.ended_ms,
    }
    outbox.close()
    written_ns = (tmp_path / "searches/search/runs/trial.json").stat().st_mtime_ns
    outbox = Outbox(Storage.open(tmp_path), "search")
    assert (outbox.search, outbox.runs) == (search(), {"trial": trial(tmp_path, ending=ending)})
    later = dataclasses.replace(ending, ended_ms=ending.ended_ms + 5)
    again = outbox.put(dataclasses.replace(trial(tmp_path, ending=later), started_ms=first.started_ms + 5))
    assert (again.started_ms, again.ending.ended_ms) == (first.started_ms, ending.ended_ms)
    assert (tmp_path / "searches/search/runs/trial.json").stat().st_mtime_ns == written_ns
    outbox.put(trial(tmp_path, ending=later, winner="true"))
    assert state_of(tmp_path)["tags"]["winner"] == "true"
    assert state_of(tmp_path)["ending"]["ended_ms"] == ending.ended_ms
    assert state_of(tmp_path)["started_ms"] == first.started_ms


@pytest.mark.parametrize(
    "damage",
    [
        *(b"", b"\xff{", b"[1]\n", b"{}", b'{"key": "two"'),
        *({"params": [1]}, {"started_ms": "soon"}, {"started_ms": None}, {"folder": 3}, {"tags": {"a": None}}),
        *({"ending": "FINISHED"}, {"ending": {"status": "LOST"}}, {"key": "' or 1"}),
    ],
)
def test_a_damaged_state_is_named_and_the_others_are_given(tmp_path, caplog, damage):
    outbox_of(tmp_path, search(), *(trial(tmp_path, key) for key in ("one", "two", "three"))).close()
    path = tmp_path / "searches" / "search" / "runs" / "two.json"
    if isinstance(damage, dict):
        damage = json.dumps(json.loads(path.read_bytes()) | damage).encode()
    path.write_bytes(damage)
    assert set(Outbox(Storage.open(tmp_path), "search").runs) == {"one", "three"}
    (warning,) = warnings_of(caplog)
    assert str(path) in warning


def test_a_search_whose_state_is_damaged_is_named_and_others_are_sent(uri, experiment, tmp_path, capsys):
    outbox_of(tmp_path, search(experiment, uri), trial(tmp_path)).close()
    (tmp_path / "searches" / "other").mkdir()
    (tmp_path / "searches" / "other" / "state.json").write_text("{")
    assert command([str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "2 run(s) sent" in said.out
    assert said.err.splitlines()[-1] == (
        "sync: 1 search(es) could not be sent: state.json of other is damaged; the search itself, run again, writes it "
        "anew"
    )


@pytest.mark.parametrize(
    "damage", [b"", b"[]", b'{"search_id": 1, "runs": 2}', b'{"runs": {"trial": 3}, "search_id": ""}']
)
def test_what_mlflow_has_taken_is_a_hint_that_may_be_lost_or_damaged(uri, experiment, tmp_path, damage, capsys):
    write_rows(tmp_path / "runs" / "trial", 1, 2)
    outbox_of(tmp_path, search(experiment, uri), trial(tmp_path)).close()
    assert command([str(tmp_path)]) == 0
    (path,) = (tmp_path / "searches" / "search").glob("taken-*.json")
    path.write_bytes(damage)
    assert command([str(tmp_path)]) == 0
    assert "0 run(s) sent, 0 completed, 2 found whole; 0 metric value(s) sent" in capsys.readouterr().out
    assert command([str(tmp_path)]) == 0
    assert "nothing is missing" in capsys.readouterr().out
    held(uri, experiment, tmp_path)


def test_a_run_that_is_open_again_is_not_taken_for_the_one_that_mlflow_has(uri, experiment, tmp_path):
    """Two drivers are killed before the run has another row, so that the state is the one that was taken."""
    write_rows(tmp_path / "runs" / "trial", 1, 2)
    outbox_of(tmp_path, search(experiment, uri), trial(tmp_path)).close()
    assert command([str(tmp_path)]) == 0
    outbox = Outbox(Storage.open(tmp_path), "search")
    sync = Sync(Connection(uri, experiment, Storage.open(tmp_path)), outbox)
    for state in (outbox.search, *outbox.runs.values()):
        sync.put(state)
        sync.bring(state.key)
    assert statuses(held(uri, experiment, tmp_path)) == {"search": "RUNNING", "trial": "RUNNING"}
    assert command([str(tmp_path)]) == 0
    assert statuses(held(uri, experiment, tmp_path)) == {"search": "KILLED", "trial": "KILLED"}


def test_a_state_that_cannot_be_written_is_said_once_and_stops_nothing(tmp_path, caplog):
    outbox = outbox_of(tmp_path, search())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))  # as full as a disk
    try:
        outbox.put(trial(tmp_path, "one"))
        outbox.put(trial(tmp_path, "two"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files_of(tmp_path) == ["search/state.json"]
    assert len(warnings_of(caplog)) == 1
    assert "cannot be written" in warnings_of(caplog)[0]
    outbox.put(trial(tmp_path, "three"))
    assert list(outbox.runs) == ["one", "two", "three"]
    assert set(Outbox(Storage.open(tmp_path), "search").runs) == {"one", "two", "three"}
    outbox.close()


def test_one_process_of_a_machine_has_a_search(tmp_path):
    first, second = Outbox(Storage.open(tmp_path), "search"), Outbox(Storage.open(tmp_path), "search")
    assert first.hold()
    assert not second.hold()
    first.close()
    assert second.hold()
    second.close()


def test_stores_are_known_by_the_folder_that_used_them(uri, experiment, tmp_path):
    own = resolve_tracking_uri(None, Storage.open(tmp_path))
    assert kept_uri(own, Storage.open(tmp_path)) is None
    assert kept_uri("http://me:secret@host:5000", Storage.open(tmp_path)) == "http://me:***@host:5000"
    assert not has_answered(Storage.open(tmp_path), own)
    outbox_of(tmp_path, search(experiment)).close()
    assert not has_answered(Storage.open(tmp_path), own)
    assert command([str(tmp_path)]) == 0
    assert has_answered(Storage.open(tmp_path), own)
    assert not has_answered(Storage.open(tmp_path), uri)
    assert command([str(tmp_path), "--tracking-uri", uri]) == 0
    assert has_answered(Storage.open(tmp_path), uri)
    assert not has_answered(Storage.open(tmp_path / "elsewhere"), own)
