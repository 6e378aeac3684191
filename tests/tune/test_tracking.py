import contextlib
import json
import logging
import math
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from pathlib import Path

import pytest
from outcomes import row_of

from refilled.errors import UserError
from refilled.storage import Storage
from tune.tracking import store as tracking_store
from tune.tracking.rows import Rows
from tune.tracking.store import open_store, shown_uri
from tune.tracking.texts import clean_params
from tune.tracking.tracker import Tracker, resolve_tracking_uri

DONE_S = 20.0


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """One real SQLite store for the module: creating its tables takes 2 s."""
    storage = Storage.open(tmp_path_factory.mktemp("storage"))
    uri = resolve_tracking_uri(None, storage)
    Tracker(uri, "first", storage).close()
    return uri


@pytest.fixture
def experiment():
    return f"experiment-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def client(uri):
    return open_store(uri, create=False)


def append(folder, *rows, end="\n"):
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(row) for row in rows) + end)


def row(epoch, accuracy=None):
    return row_of(epoch, stage="embedding", train_loss=1.0 / epoch, val_accuracy=accuracy or epoch / 10).to_dict()


def open_search(tracker, key="search"):
    return tracker.start_search(key, name="a search", params={"trials": 4}, tags={"kind": "search"})


def open_trial(tracker, folder, key="trial", **tags):
    tracker.open_run(key, name="a trial", params={"tau": 4.0}, tags={"kind": "trial", **tags}, folder=folder)


def points(client, run_id, metric):
    return [(point.step, point.value) for point in client.get_metric_history(run_id, metric)]


def only_run(client, experiment, kind="trial"):
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id], f"tags.kind = '{kind}'")
    return run


def wait_for(condition):
    deadline = time.monotonic() + DONE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_rows_arrive_while_the_file_is_being_written(uri, experiment, client, tmp_path):
    with Tracker(uri, experiment, Storage.open(tmp_path)) as tracker:
        parent = open_search(tracker)
        open_trial(tracker, tmp_path / "run")
        run_id = tracker.run_id("trial")
        append(tmp_path / "run", row(1), row(2))
        wait_for(lambda: points(client, run_id, "val_accuracy") == [(1, 0.1), (2, 0.2)])
        append(tmp_path / "run", row(3))
        assert tracker.flush(DONE_S)
        assert points(client, run_id, "val_accuracy") == [(1, 0.1), (2, 0.2), (3, 0.3)]
        assert client.get_run(run_id).info.status == "RUNNING"
        tracker.close_run("trial", status="FINISHED", metrics={"best/val_accuracy": 0.3})
        tracker.tag_run("trial", {"winner": "true"})
        tracker.finish_search(status="FINISHED", metrics={"winners": 1.0})
        assert tracker.flush(DONE_S)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a trial"
    assert points(client, run_id, "best/val_accuracy") == [(3, 0.3)]
    assert set(run.data.metrics) == {*row(1).keys() - {"epoch", "stage", "finished"}, "best/val_accuracy"}
    assert run.data.params == {"tau": "4.0"}
    expected = {"kind": "trial", "run_key": "trial", "mlflow.parentRunId": parent, "winner": "true"}
    assert expected.items() <= run.data.tags.items()
    search = client.get_run(parent)
    assert (search.info.status, search.data.metrics) == ("FINISHED", {"winners": 1.0})
    assert (search.data.params, search.data.tags["search_key"]) == ({"trials": "4"}, "search")


def test_half_a_line_waits_for_its_rest(uri, experiment, client, tmp_path):
    with Tracker(uri, experiment, Storage.open(tmp_path)) as tracker:
        open_search(tracker)
        open_trial(tracker, tmp_path / "run")
        append(tmp_path / "run", row(1))
        line = json.dumps(row(2))
        with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
            file.write(line[:20])
            file.flush()
            assert tracker.flush(DONE_S)
            run_id = tracker.run_id("trial")
            assert points(client, run_id, "val_accuracy") == [(1, 0.1)]
            file.write(line[20:] + "\n")
        assert tracker.flush(DONE_S)
        assert points(client, run_id, "val_accuracy") == [(1, 0.1), (2, 0.2)]


def test_rows_of_a_rewritten_file_are_not_logged_twice(uri, experiment, client, tmp_path):
    with Tracker(uri, experiment, Storage.open(tmp_path)) as tracker:
        open_search(tracker)
        open_trial(tracker, tmp_path / "run")
        append(tmp_path / "run", row(1), row(2))
        assert tracker.flush(DONE_S)
        append(tmp_path / "run", row(3))
        assert tracker.flush(DONE_S)
        # A resumed run may cut its file back to the checkpoint by temporary file and rename.
        (tmp_path / "new").mkdir()
        append(tmp_path / "new", row(1), row(2), row(3), row(4))
        (tmp_path / "new" / "metrics.jsonl").replace(tmp_path / "run" / "metrics.jsonl")
        assert tracker.flush(DONE_S)
        assert points(client, tracker.run_id("trial"), "train_loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]


def test_the_same_search_again_continues_its_runs(uri, experiment, client, tmp_path):
    ids, ends = [], []
    for attempt in (1, 2):
        with Tracker(uri, experiment, Storage.open(tmp_path)) as tracker:
            parent = open_search(tracker)
            if attempt == 2:
                assert client.get_run(parent).info.status == "RUNNING"
            open_trial(tracker, tmp_path / "done", key="done")
            open_trial(tracker, tmp_path / "stopped", key="stopped", attempt=str(attempt))
            if attempt == 1:
                append(tmp_path / "done", row(1))
                append(tmp_path / "stopped", row(1), row(2))
            else:
                append(tmp_path / "stopped", row(3))
            tracker.close_run("done", status="FINISHED", metrics={"best/val_accuracy": 0.1})
            if attempt == 2:
                tracker.close_run("stopped", status="FINISHED", metrics={"best/val_accuracy": 0.3})
                tracker.finish_search(status="FINISHED")
            assert tracker.flush(DONE_S)
            ids.append([parent, tracker.run_id("done"), tracker.run_id("stopped")])
        ends.append(client.get_run(ids[0][1]).info.end_time)
        if attempt == 1:
            # Nothing claims to run once nobody watches it.
            assert [client.get_run(run_id).info.status for run_id in ids[0]] == ["KILLED", "FINISHED", "KILLED"]
    assert ids[0] == ids[1]
    assert ends[0] == ends[1], "a finished run that is only seen again keeps its end"
    assert [client.get_run(run_id).info.status for run_id in ids[0]] == ["FINISHED"] * 3
    assert points(client, ids[0][2], "val_accuracy") == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert points(client, ids[0][2], "best/val_accuracy") == [(3, 0.3)]
    assert points(client, ids[0][1], "best/val_accuracy") == [(1, 0.1)]
    assert client.get_run(ids[0][2]).data.tags["attempt"] == "2"
    experiment_id = client.get_experiment_by_name(experiment).experiment_id
    assert len(client.search_runs([experiment_id])) == 3


def test_changed_params_of_a_found_run_are_left_and_missing_ones_added(uri, experiment, client, tmp_path):
    for params in ({"tau": 4.0}, {"tau": 5.0, "weight": None}):
        with Tracker(uri, experiment, Storage.open(tmp_path)) as tracker:
            open_search(tracker)
            tracker.open_run("trial", name="t", params=params, tags={"kind": "trial"}, folder=tmp_path)
            assert tracker.flush(DONE_S)
    assert only_run(client, experiment).data.params == {"tau": "4.0", "weight": "none"}


def test_every_way_a_run_can_end_and_its_artifacts(uri, experiment, client, tmp_path):
    (tmp_path / "files" / "inner").mkdir(parents=True)
    (tmp_path / "files" / "config.json").write_text("{}")
    (tmp_path / "files" / "inner" / "student.pt").write_bytes(b"weights")
    with Tracker(uri, experiment, Storage.open(tmp_path / "a storage")) as tracker:
        parent = open_search(tracker)
        for status in ("FINISHED", "KILLED", "FAILED"):
            open_trial(tracker, tmp_path / status, key=status)
            append(tmp_path / status, row(1))
            tracker.close_run(status, status=status, metrics={}, artifacts=tmp_path / "files")
        tracker.finish_search(status="FINISHED", artifacts=tmp_path / "files")
        assert tracker.flush(DONE_S)
        for status in ("FINISHED", "KILLED", "FAILED"):
            assert client.get_run(tracker.run_id(status)).info.status == status
        run_id = tracker.run_id("KILLED")
    for found in (run_id, parent):
        assert {item.path for item in client.list_artifacts(found)} == {"config.json", "inner"}
    assert [item.path for item in client.list_artifacts(run_id, "inner")] == ["inner/student.pt"]
    assert Path(client.download_artifacts(run_id, "inner/student.pt")).read_bytes() == b"weights"
    beside = Path(uri.removeprefix("sqlite:///")).with_name("artifacts")
    assert list((beside / run_id).rglob("student.pt"))


def test_an_exception_in_the_block_ends_the_search_as_failed(uri, experiment, client, tmp_path):
    def fail():
        with Tracker(uri, experiment, Storage.open(tmp_path)) as tracker:
            open_search(tracker)
            open_trial(tracker, tmp_path / "run")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert only_run(client, experiment, "search").info.status == "FAILED"
    assert only_run(client, experiment).info.status == "KILLED"


def test_two_searches_with_the_same_run_key_have_their_own_runs(uri, experiment, client, tmp_path):
    append(tmp_path / "run", row(1))
    ids = set()
    for key in ("one", "two"):
        with Tracker(uri, experiment, Storage.open(tmp_path)) as tracker:
            open_search(tracker, key)
            open_trial(tracker, tmp_path / "run")
            assert tracker.flush(DONE_S)
            ids.add(tracker.run_id("trial"))
    assert len(ids) == 2
    assert all(points(client, run_id, "val_accuracy") == [(1, 0.1)] for run_id in ids)


def test_a_store_that_refuses_is_survived_and_caught_up(tmp_path, uri, client, experiment, caplog, capsys):
    database = uri.removeprefix("sqlite:///")
    with Tracker(uri, experiment, Storage.open(tmp_path)) as tracker, caplog.at_level(logging.INFO, "tune"):
        open_search(tracker)
        open_trial(tracker, tmp_path / "run")
        append(tmp_path / "run", row(1))
        assert tracker.flush(DONE_S)
        run_id = tracker.run_id("trial")
        with broken(database):
            append(tmp_path / "run", row(2), row(3))
            begin = time.monotonic()
            tracker.close_run("trial", status="FINISHED", metrics={"best/val_accuracy": 0.3})
            open_trial(tracker, tmp_path / "run", key="another")
            assert time.monotonic() - begin < 0.1, "a call waits for nothing"
            assert not tracker.flush(3.0)
        assert tracker.flush(DONE_S)
        assert points(client, run_id, "val_accuracy") == [(1, 0.1), (2, 0.2), (3, 0.3)]
        assert points(client, tracker.run_id("another"), "val_accuracy") == [(1, 0.1), (2, 0.2), (3, 0.3)]
        assert client.get_run(run_id).info.status == "FINISHED"
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "run trial goes on" in warnings[0].getMessage()
    assert database in warnings[0].getMessage()
    assert "holds everything again" in caplog.text
    assert capsys.readouterr().err == "", "MLflow's own tracebacks stay away from the terminal"


def test_a_batch_whose_answer_was_lost_is_not_logged_twice(tmp_path, uri, client, experiment):
    database = uri.removeprefix("sqlite:///")
    append(tmp_path / "run", row(1), row(2))
    with Tracker(uri, experiment, Storage.open(tmp_path)) as tracker:
        open_search(tracker)
        # MLflow writes a batch's metrics before its tags, each in a transaction of its own: this fails in between.
        with contextlib.closing(sqlite3.connect(database, timeout=20)) as connection:
            connection.execute(
                "CREATE TRIGGER lost BEFORE INSERT ON tags WHEN new.key = 'late' BEGIN SELECT RAISE(ABORT, 'x'); END"
            )
            connection.commit()
            open_trial(tracker, tmp_path / "run")
            run_id = tracker.run_id("trial")
            append(tmp_path / "run", row(3))
            tracker.tag_run("trial", {"late": "tag"})
            assert not tracker.flush(2.0)
            assert points(client, run_id, "val_accuracy")[-1] == (3, 0.3)
            connection.execute("DROP TRIGGER lost")
            connection.commit()
        assert tracker.flush(DONE_S)
        assert points(client, run_id, "val_accuracy") == [(1, 0.1), (2, 0.2), (3, 0.3)]
        assert client.get_run(run_id).data.tags["late"] == "tag"


def test_closing_while_the_store_refuses_is_bounded_and_nothing_is_lost(tmp_path, uri, client, experiment, caplog):
    tracker = Tracker(uri, experiment, Storage.open(tmp_path))
    open_search(tracker)
    append(tmp_path / "run", row(1))
    with broken(uri.removeprefix("sqlite:///")):
        open_trial(tracker, tmp_path / "run")
        begin = time.monotonic()
        tracker.close(timeout_s=1.5)
        assert time.monotonic() - begin < 5.0
    assert "has not taken everything of" in caplog.text
    assert "trial" in caplog.text
    with Tracker(uri, experiment, Storage.open(tmp_path)) as tracker:
        open_search(tracker)
        open_trial(tracker, tmp_path / "run")
        assert tracker.flush(DONE_S)
        assert points(client, tracker.run_id("trial"), "val_accuracy") == [(1, 0.1)]


@contextlib.contextmanager
def broken(database):
    """MLflow's table of metrics is really gone for a while."""
    with contextlib.closing(sqlite3.connect(database, timeout=20)) as connection:
        connection.execute("ALTER TABLE metrics RENAME TO metrics_away")
        connection.commit()
        try:
            yield
        finally:
            connection.execute("ALTER TABLE metrics_away RENAME TO metrics")
            connection.commit()


def test_a_run_deleted_in_mlflow_comes_back(tmp_path, uri, client, experiment):
    with Tracker(uri, experiment, Storage.open(tmp_path)) as tracker:
        open_search(tracker)
        open_trial(tracker, tmp_path / "run")
        first = tracker.run_id("trial")
        client.delete_run(first)
        append(tmp_path / "run", row(1))
        assert tracker.flush(DONE_S)
        second = tracker.run_id("trial")
        assert second != first
        assert points(client, second, "val_accuracy") == [(1, 0.1)]


def test_an_ended_run_deleted_in_mlflow_comes_back_whole_when_it_is_tagged(tmp_path, uri, client, experiment):
    append(tmp_path / "run", row(1), row(2))
    with Tracker(uri, experiment, Storage.open(tmp_path)) as tracker:
        open_search(tracker)
        open_trial(tracker, tmp_path / "run")
        tracker.close_run("trial", status="FINISHED", metrics={"best/val_accuracy": 0.2})
        assert tracker.flush(DONE_S)
        client.delete_run(tracker.run_id("trial"))
        tracker.tag_run("trial", {"winner": "true"})
        assert tracker.flush(DONE_S)
    run = only_run(client, experiment)
    assert points(client, run.info.run_id, "val_accuracy") == [(1, 0.1), (2, 0.2)]
    assert (run.info.status, run.data.tags["winner"]) == ("FINISHED", "true")
    assert run.data.metrics["best/val_accuracy"] == 0.2


def test_many_rows_many_params_and_long_values_arrive_within_mlflows_limits(tmp_path, uri, client, experiment):
    append(tmp_path / "run", *(row(epoch) for epoch in range(1, 901)))
    params = {f"p{index}": index for index in range(150)} | {"long": "x" * 10_000, "odd;name|": 1, "k" * 300: 1}
    with Tracker(uri, experiment, Storage.open(tmp_path)) as tracker:
        open_search(tracker)
        tags = {"kind": "trial", "long": "y" * 9_000, "quote": 'it\'s "so" `odd` -- ; DROP'}
        tracker.open_run("trial", name="n" * 400, params=params, tags=tags, folder=tmp_path / "run")
        assert tracker.flush(DONE_S)
        run = client.get_run(tracker.run_id("trial"))
    assert len(points(client, run.info.run_id, "val_accuracy")) == 900
    assert len(run.data.params) == 153
    assert "k" * 250 in run.data.params
    assert (len(run.data.params["long"]), run.data.params["odd_name_"]) == (6000, "1")
    assert (len(run.data.tags["long"]), run.data.tags["quote"]) == (8000, tags["quote"])


def test_keys_cannot_break_out_of_a_query(tmp_path, uri, experiment):
    with Tracker(uri, experiment, Storage.open(tmp_path)) as tracker:
        with pytest.raises(ValueError, match="letters, digits"):
            open_search(tracker, "x' OR tags.kind = 'search")
        open_search(tracker)
        with pytest.raises(ValueError, match="letters, digits"):
            open_trial(tracker, tmp_path, key="it's")
        with pytest.raises(KeyError, match="no run 'other'"):
            tracker.close_run("other", status="FINISHED", metrics={})


def test_params_are_texts():
    params = {"embedding.temperature": 4.0, "embedding.kind": None, "overlaps": (0.0, 0.4), "bf16": True}
    assert clean_params(params) == {
        "embedding.temperature": "4.0",
        "embedding.kind": "none",
        "overlaps": "[0.0, 0.4]",
        "bf16": "true",
    }


def test_rows_are_the_numbers_up_to_what_is_damaged_and_are_read_again_when_the_file_changes(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    rows = Rows(Storage.open(tmp_path), tmp_path)
    assert list(rows.read()) == []
    append(tmp_path, row_of(1, train_loss=math.nan, gradient_norm_max=math.inf, epoch_s=1.5).to_dict())
    (first,) = rows.read()
    assert (first.epoch, first.elapsed_s) == (1, 1.5)
    assert set(first.numbers) == row(1).keys() - {"epoch", "stage", "finished"}
    assert math.isnan(first.numbers["train_loss"])
    assert first.numbers["gradient_norm_max"] == sys.float_info.max
    assert list(rows.read()) == []
    append(tmp_path, row_of(2, epoch_s=2.0).to_dict())
    with path.open("ab") as file:
        file.write(b"\xff\xfe{\n")
    append(tmp_path, row(4))
    _, second = rows.read()
    assert (second.epoch, second.elapsed_s, second.numbers["epoch_s"]) == (2, 3.5, 2.0)
    assert len(caplog.records) == 1
    assert list(rows.read(look=True)) == []


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("http://127.0.0.1:9", "127.0.0.1:9 cannot be used (no server answers there)"),
        ("http://user:secret@127.0.0.1:9", "user:***@"),
        ("nonsense", "neither"),
        ("ftp://host/x", "neither"),
        ("sqlite://", "names no file"),
        ("sqlite:////proc/none/mlflow.db", "/proc/none"),
        ("sqlite:///{tmp}/folder", "unable to open"),
        ("sqlite:///{tmp}/text.db", "not a database"),
        ("sqlite:///{tmp}/new.db?timeout=soon", "could not convert"),
        ("http://[half", "half"),
        ("postgresql://user:secret@127.0.0.1:9/x", "user:***@"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_sentence_soon(tmp_path, bad, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.db").write_text("not a database " * 100)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as caught:
        Tracker(bad.format(tmp=tmp_path), "experiment", Storage.open(tmp_path))
    message = str(caught.value)
    assert message.startswith("tracking_uri: MLflow at ")
    assert reason in message
    assert "secret" not in message
    assert "\n" not in message
    assert [path for path in sorted(tmp_path.iterdir()) if path.suffix != ".lock"] == before


@pytest.mark.usefixtures("uri")  # imports what MLflow needs for databases
def test_a_database_that_hangs_keeps_no_other_store_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking_store, "_DATABASE_ANSWER_S", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(UserError, match="timeout expired"):
            Tracker(f"postgresql://user:secret@127.0.0.1:{port}/x", "experiment", Storage.open(tmp_path))
        opened = threading.Event()

        def open_another():
            Tracker(resolve_tracking_uri(None, Storage.open(tmp_path)), "experiment", Storage.open(tmp_path)).close()
            opened.set()

        threading.Thread(target=open_another, daemon=True).start()
        assert opened.wait(60)


@pytest.mark.parametrize("name", ["", "  ", "x" * 501])
def test_a_bad_experiment_name_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(UserError, match="experiment: must be a name"):
        Tracker(resolve_tracking_uri(None, Storage.at(tmp_path / "new")), name, Storage.at(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_deleted_experiment_is_named(uri, client, experiment, tmp_path):
    Tracker(uri, experiment, Storage.open(tmp_path)).close()
    client.delete_experiment(client.get_experiment_by_name(experiment).experiment_id)
    with pytest.raises(UserError, match=f"experiment: '{experiment}' was deleted"):
        Tracker(uri, experiment, Storage.open(tmp_path))


def test_resolve_tracking_uri(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_tracking_uri(None, Storage.open(Path("runs"))) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert resolve_tracking_uri("http://host:5000", Storage.open(Path("runs"))) == "http://host:5000"
    for name in ("what?", "a%41"):
        with pytest.raises(UserError, match="storage must have no question mark"):
            resolve_tracking_uri(None, Storage.open(tmp_path / name))
    for name in ("a#b", "100 % ü", "50%"):
        open_store(resolve_tracking_uri(None, Storage.open(tmp_path / name)), create=True)
        assert (tmp_path / name / "mlflow.db").exists()
    assert shown_uri("postgresql://me:pw@host/db") == "postgresql://me:***@host/db"


def test_a_new_store_says_nothing_and_lies_in_the_storage_folder(tmp_path):
    """In a process of its own: the first use of MLflow creates the tables and used to print."""
    program = """
        import sys
        from pathlib import Path
        from refilled.storage import Storage
        from tune.tracking.tracker import Tracker, resolve_tracking_uri
        storage = Storage.open("runs")
        assert "mlflow" not in sys.modules
        with Tracker(resolve_tracking_uri(None, storage), "experiment", storage) as tracker:
            tracker.start_search("s", name="s", params={}, tags={})
            tracker.open_run("r", name="r", params={}, tags={}, folder=Path("runs"))
            tracker.close_run("r", status="FINISHED", metrics={}, artifacts=Path("runs/files"))
            tracker.finish_search(status="FINISHED")
    """
    (tmp_path / "runs" / "files").mkdir(parents=True)
    (tmp_path / "runs" / "files" / "a.txt").write_text("a")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert list((tmp_path / "runs" / "artifacts").rglob("a.txt"))
