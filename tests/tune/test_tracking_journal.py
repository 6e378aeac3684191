"""MLflow that is away, slow or refusing costs nothing: what it missed is sent once, in order, when it is back."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import pytest
from mlflow_server import Gate, Server

from refilled.errors import UserError
from tune.tracking.journal import Journal, has_answered, journal_names, kept_uri
from tune.tracking.record import Closing, RunRecord
from tune.tracking.replay import command
from tune.tracking.store import open_store
from tune.tracking.tracker import Tracker, resolve_tracking_uri

DONE_S = 60.0
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


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
    return {"epoch": epoch, "train_loss": 1.0 / epoch, "val_accuracy": epoch / 10}


def write_rows(folder, *epochs):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row(epoch)) + "\n" for epoch in epochs)


def open_search(tracker):
    return tracker.start_search("search", name="a search", params={"trials": 4}, tags={"kind": "search"})


def open_trial(tracker, storage, key):
    tags = {"kind": "trial", "winner": "false"}
    tracker.open_run(key, name=f"trial {key}", params={"tau": 4.0}, tags=tags, folder=storage / "runs" / key)


def record(storage, key="trial", **tags):
    return RunRecord(key, f"trial {key}", {"tau": "4.0"}, {"kind": "trial", **tags}, storage / "runs" / key)


def search_record(key="search"):
    return RunRecord(key, "a search", {}, {"kind": "search"}, None)


def mirrored(uri, experiment, storage):
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
    with Tracker(server.uri, experiment, storage=tmp_path) as tracker:
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
    runs = mirrored(server.uri, experiment, tmp_path)
    assert statuses(runs) == {"search": "FINISHED", "one": "FINISHED", "two": "KILLED"}
    assert runs["one"].data.metrics["best/val_accuracy"] == 0.3
    assert [runs[key].data.tags["winner"] for key in ("one", "two")] == ["true", "false"]
    assert len(warnings_of(caplog)) == 1
    assert "no server answers there" in warnings_of(caplog)[0]
    assert command([str(tmp_path)]) == 0
    assert "nothing is missing" in capsys.readouterr().out


@pytest.mark.parametrize("trouble", ["refuse", "hang"])
def test_a_server_used_before_may_be_away_at_the_start(gate, experiment, tmp_path, caplog, trouble):
    with Tracker(gate.uri, experiment, storage=tmp_path) as tracker:
        open_search(tracker)
        open_trial(tracker, tmp_path, "one")
        write_rows(tmp_path / "runs" / "one", 1)
    gate.always(trouble)
    with Tracker(gate.uri, experiment, storage=tmp_path) as tracker:
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
    assert statuses(mirrored(gate.uri, experiment, tmp_path)) == {"search": "FINISHED", "one": "FINISHED"}


def test_a_server_that_never_took_a_search_is_refused_and_nothing_is_left(gate, experiment, tmp_path):
    gate.always("refuse")
    with pytest.raises(UserError, match="tracking_uri: MLflow at"):
        Tracker(gate.uri, experiment, storage=tmp_path)
    gate.answer = lambda method, path: "refuse" if path.endswith("runs/create") else "pass"
    with (
        pytest.raises(UserError, match="tracking_uri: MLflow at"),
        Tracker(gate.uri, experiment, storage=tmp_path) as tracker,
    ):
        open_search(tracker)
    assert journal_names(tmp_path) == []
    assert not has_answered(tmp_path, gate.uri)


def test_lost_answers_to_requests_that_create_make_no_second_run(gate, experiment, tmp_path):
    """MLflow's client asks again by itself, and the first request has already made a run."""
    with Tracker(gate.uri, experiment, storage=tmp_path) as tracker:
        open_search(tracker)
        gate.answer = lambda method, path: "lose" if path.endswith(("runs/create", "runs/log-batch")) else "pass"
        open_trial(tracker, tmp_path, "one")
        write_rows(tmp_path / "runs" / "one", 1, 2)
        assert not tracker.flush(6.0)
        client = open_store(gate.uri, create=False)
        experiment_id = client.get_experiment_by_name(experiment).experiment_id
        assert len(client.search_runs([experiment_id], "tags.kind = 'trial'")) > 1
        gate.always("pass")
        tracker.close_run("one", status="FINISHED", metrics={})
        assert tracker.flush(DONE_S)
        tracker.finish_search(status="FINISHED")
    assert statuses(mirrored(gate.uri, experiment, tmp_path)) == {"search": "FINISHED", "one": "FINISHED"}


def test_refused_artifacts_hold_back_nothing_else_and_come_later(gate, experiment, tmp_path, capsys):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "student.pt").write_bytes(b"weights")
    gate.answer = lambda method, path: "refuse" if "mlflow-artifacts" in path else "pass"
    tracker = Tracker(gate.uri, experiment, storage=tmp_path)
    open_search(tracker)
    for key in ("one", "two"):
        open_trial(tracker, tmp_path, key)
        write_rows(tmp_path / "runs" / key, 1)
        tracker.close_run(key, status="FINISHED", metrics={}, artifacts=tmp_path / "files" if key == "one" else None)
    tracker.finish_search(status="FINISHED")
    tracker.close(timeout_s=5.0)
    runs = mirrored(gate.uri, experiment, tmp_path)
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
    from pathlib import Path
    from tune.tracking.tracker import Tracker
    uri, experiment, storage = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    tracker = Tracker(uri, experiment, storage=storage)
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
                file.write(json.dumps({"epoch": epoch, "train_loss": 1 / epoch, "val_accuracy": epoch / 10}) + "\\n")
        if number < 8:
            tracker.close_run(key, status="FINISHED", metrics={"best/val_accuracy": 0.5}, artifacts=folder)
        elif number < 10:
            tracker.close_run(key, status="KILLED", metrics={})
    tracker.tag_run("run-3", {"winner": "true"})
    print("told", flush=True)
    sys.stdin.readline()
"""


def check_replayed(uri, experiment, storage):
    runs = mirrored(uri, experiment, storage)
    assert set(runs) == {"search", *(f"run-{number}" for number in range(12))}
    for number in range(12):
        run = runs[f"run-{number}"]
        assert run.info.status == ("FINISHED" if number < 8 else "KILLED")
        assert run.data.metrics.get("best/val_accuracy") == (0.5 if number < 8 else None)
        assert run.data.tags["winner"] == ("true" if number == 3 else "false")
        assert run.data.params == {"tau": "4.0"}
    assert runs["search"].info.status == "KILLED"
    (name,) = journal_names(storage)
    journal = Journal.held(storage, name)
    journal.close()
    told = journal.told.runs
    assert {key: run.info.start_time for key, run in runs.items() if key != "search"} == {
        key: each.started_ms for key, each in told.items()
    }
    assert runs["run-3"].info.end_time == told["run-3"].closing.ended_ms
    return runs


def test_a_killed_driver_is_replayed_once_however_often_and_however_interrupted(gate, experiment, tmp_path, capsys):
    storage = tmp_path / "storage"
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(DRIVER), gate.uri, experiment, str(storage)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert driver.stdout.readline() == "started\n"
        gate.always("refuse")
        driver.stdin.write("\n")
        driver.stdin.flush()
        assert driver.stdout.readline() == "told\n"
        assert command([str(storage)]) == 0
        assert "a running search has it" in capsys.readouterr().out
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.communicate()
    assert set(mirrored_keys(gate, experiment)) == {"search"}

    for more in (4, 30):  # requests until the server is gone again
        limit = gate.num_passed + more
        gate.answer = lambda method, path, limit=limit: "pass" if gate.num_passed < limit else "refuse"
        assert command([str(storage)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("sync: ")
        assert error.count("\n") == 1
    assert 1 < len(mirrored_keys(gate, experiment)) < 13

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
        key: (run.info.run_id, run.info.end_time) for key, run in check_replayed(gate.uri, experiment, storage).items()
    }
    assert command([str(storage)]) == 0
    assert "nothing is missing" in capsys.readouterr().out
    assert command([str(storage), "--again"]) == 0
    assert "0 run(s) sent, 0 completed, 13 found whole; 0 metric value(s) sent" in capsys.readouterr().out
    again = check_replayed(gate.uri, experiment, storage)
    assert {key: (run.info.run_id, run.info.end_time) for key, run in again.items()} == first

    other = f"sqlite:///{tmp_path}/other.db"
    assert command([str(storage), "--tracking-uri", other]) == 0
    assert "13 run(s) sent, 0 completed, 0 found whole; 128 metric value(s) sent" in capsys.readouterr().out
    check_replayed(other, experiment, storage)


def mirrored_keys(gate, experiment):
    before, gate.answer = gate.answer, lambda method, path: "pass"
    client = open_store(gate.uri, create=False)
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    gate.answer = before
    return [run.data.tags["run_key"] for run in runs]


def test_the_next_driver_sends_what_a_killed_one_could_not(gate, experiment, tmp_path):
    with Tracker(gate.uri, experiment, storage=tmp_path) as tracker:
        open_search(tracker)
    journal = Journal.of_search(tmp_path, experiment, "search")  # a driver without its thread, killed without a word
    journal.start_search(search_record(), experiment, kept_uri(gate.uri, tmp_path))
    for key in ("ended", "open"):
        journal.open_run(record(tmp_path, key))
        write_rows(tmp_path / "runs" / key, 1, 2)
    journal.close_run("ended", Closing("FINISHED", {"best/val_accuracy": 0.2}), {"winner": "true"})
    journal.close()
    with Tracker(gate.uri, experiment, storage=tmp_path) as tracker:
        open_search(tracker)
        assert tracker.run_id("ended", DONE_S) is not None
        tracker.finish_search(status="FINISHED")
    runs = mirrored(gate.uri, experiment, tmp_path)
    assert statuses(runs) == {"search": "FINISHED", "ended": "FINISHED", "open": "KILLED"}
    assert runs["ended"].data.tags["winner"] == "true"


def test_a_moved_storage_folder_is_replayed_into_its_own_file_without_ray(experiment, tmp_path):
    before, storage = tmp_path / "before", tmp_path / "after"
    journal = Journal.of_search(before, experiment, "search")
    journal.start_search(search_record(), experiment, kept_uri(resolve_tracking_uri(None, before), before))
    journal.open_run(record(before))
    write_rows(before / "runs" / "trial", 1, 2, 3)
    journal.close_run("trial", Closing("FINISHED", {}, before / "runs" / "trial"), {})
    journal.close()
    before.rename(storage)
    program = """
        import sys
        from tune.tracking.replay import command
        assert command([sys.argv[1]]) == 0
        assert not {"ray", "torchvision"} & set(sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(storage)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not before.exists()
    uri = resolve_tracking_uri(None, storage)
    runs = mirrored(uri, experiment, storage)
    assert statuses(runs) == {"search": "KILLED", "trial": "FINISHED"}
    artifacts = open_store(uri, create=False).list_artifacts(runs["trial"].info.run_id)
    assert [item.path for item in artifacts] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["{tmp}/none"], "storage: must be the storage folder of a search"),
        (["{tmp}"], "storage: must be the storage folder of a search"),
        (["{tmp}/told", "--tracking-uri", "nonsense"], "neither"),
        (["{tmp}/told", "--tracking-uri", "http://127.0.0.1:9"], "no server answers there"),
        (["{tmp}/told"], "must be given with its password, which is not kept; it was postgresql://me:***@h/x"),
        ([], "storage"),
    ],
)
def test_replay_refuses_in_one_sentence(tmp_path, capsys, arguments, part):
    journal = Journal.of_search(tmp_path / "told", "experiment", "search")
    journal.start_search(search_record(), "experiment", kept_uri("postgresql://me:secret@h/x", tmp_path))
    journal.close()
    assert command([each.format(tmp=tmp_path) for each in arguments]) == 2
    output = capsys.readouterr()
    assert part in output.err
    assert output.err.count("\n") == 1
    assert "secret" not in output.err + next((tmp_path / "told" / "tracking").glob("*.jsonl")).read_text()


def journal_of(storage, key="search"):
    return Journal.of_search(storage, "experiment", key)


def lines_of(storage):
    (name,) = journal_names(storage)
    return (storage / "tracking" / name).read_bytes().splitlines()


def test_every_line_is_in_the_file_when_the_call_returns_and_nothing_is_said_twice(tmp_path):
    journal = journal_of(tmp_path)
    journal.start_search(search_record(), "experiment", None)
    assert len(lines_of(tmp_path)) == 1
    journal.open_run(record(tmp_path))
    assert json.loads(lines_of(tmp_path)[1])["folder"] == "runs/trial"
    journal.close_run("trial", Closing("FINISHED", {"a": 1.0}), {})
    journal.tag_run("trial", {"winner": "true"})
    assert [json.loads(line)["told"] for line in lines_of(tmp_path)] == ["search", "run", "close", "tag"]
    journal.note_delivery(None)
    first_end = journal.told.runs["trial"].closing.ended_ms
    for _ in range(3):
        journal.close()
        journal = journal_of(tmp_path)
        assert journal.told.delivered == {None}
        journal.start_search(search_record(), "experiment", None)
        assert not journal.told.delivered, "a search that goes on has something to send"
        assert journal.open_run(record(tmp_path)).closing is None
        again = journal.close_run("trial", Closing("FINISHED", {"a": 1.0}, ended_ms=first_end + 5), {})
        assert again.ended_ms == first_end
        assert len(lines_of(tmp_path)) == 6  # search, run, close, answered, delivered; search
        journal.note_delivery(None)
    assert journal.told.runs["trial"].tags["winner"] == "true"
    journal.open_run(record(tmp_path, attempt="2"))
    assert journal.told.runs["trial"].closing is None
    journal.close()


def test_half_a_last_line_is_dropped_and_a_damaged_one_is_named_and_kept(tmp_path, caplog):
    journal = journal_of(tmp_path)
    journal.start_search(search_record(), "experiment", None)
    for key in ("one", "two", "three"):
        journal.open_run(record(tmp_path, key))
    journal.close()
    (name,) = journal_names(tmp_path)
    path = tmp_path / "tracking" / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    journal = journal_of(tmp_path)
    assert list(journal.told.runs) == ["one", "two"]
    assert warnings_of(caplog) == []
    journal.open_run(record(tmp_path, "three"))
    journal.close()

    lines = whole.splitlines(keepends=True)
    damaged = b"".join(
        [lines[0], lines[1], b"\xff{" + lines[2][9:], b"[1]\n", b'{"told": "close", "key": "two"}\n', lines[3]]
    )
    path.write_bytes(damaged)
    journal = journal_of(tmp_path)
    journal.close()
    assert list(journal.told.runs) == ["one", "three"]
    (warning,) = warnings_of(caplog)
    assert "left out 3 damaged line(s)" in warning
    assert path.with_suffix(".damaged").read_bytes() == damaged


def test_two_drivers_of_one_search_have_a_file_each(tmp_path):
    first, second = journal_of(tmp_path), journal_of(tmp_path)
    for journal, key in ((first, "one"), (second, "two")):
        journal.start_search(search_record(), "experiment", None)
        journal.open_run(record(tmp_path, key))
    first.close()
    second.close()
    assert len(journal_names(tmp_path)) == 2
    journal = journal_of(tmp_path)
    assert list(journal.told.runs) == ["one"]
    journal.close()


def test_a_journal_that_cannot_be_written_is_said_once_and_stops_nothing(tmp_path, caplog):
    journal = journal_of(tmp_path)
    journal.start_search(search_record(), "experiment", None)
    size = len(lines_of(tmp_path)[0]) + 1
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))  # as full as a disk: half a line fits
    try:
        journal.open_run(record(tmp_path, "one"))
        journal.open_run(record(tmp_path, "two"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    journal.open_run(record(tmp_path, "three"))
    journal.close()
    assert len(warnings_of(caplog)) == 1
    assert "cannot be written" in warnings_of(caplog)[0]
    assert list(journal.told.runs) == ["one", "two", "three"]
    journal = journal_of(tmp_path)
    assert list(journal.told.runs) == ["three"]
    journal.close()


def test_a_search_that_a_second_store_refuses_stays_as_the_first_one_has_it(tmp_path):
    journal = journal_of(tmp_path)
    journal.start_search(search_record(), "experiment", "http://first")
    journal.note_answer("http://first")
    journal.close_run("search", Closing("FINISHED"), {})
    journal.close()
    journal = journal_of(tmp_path)
    journal.start_search(search_record(), "experiment", "http://second")
    journal.discard()
    journal = journal_of(tmp_path)
    assert journal.told.uri == "http://first"
    assert journal.told.search.closing == Closing("FINISHED")
    journal.close()


def test_stores_are_known_by_the_folder_that_used_them(tmp_path):
    own = resolve_tracking_uri(None, tmp_path)
    assert kept_uri(own, tmp_path) is None
    assert kept_uri("http://me:secret@host:5000", tmp_path) == "http://me:***@host:5000"
    journal = journal_of(tmp_path)
    journal.start_search(search_record(), "experiment", None)
    assert not has_answered(tmp_path, own)
    journal.note_answer(None)
    journal.note_answer("http://host")
    journal.close()
    assert has_answered(tmp_path, own)
    assert has_answered(tmp_path, "http://host")
    assert not has_answered(tmp_path, "http://other")
    assert not has_answered(tmp_path / "elsewhere", own)
