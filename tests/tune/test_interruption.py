"""Real commands, interrupted in one phase after another: what they say, how they end, and what the same one finds."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SEARCH = [sys.executable, "tune/search.py", "--overlaps", "1", "--trials", "2", "--seeds", "2", "--epochs", "2", "2"]
SEARCH += ["--teacher-epochs", "2", "--no-forecast", "--deterministic"]
LONGEST_S = 300


def command(arguments, storage, log):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    arguments = [*arguments, f"--storage={storage}"]
    with log.open("w") as out:
        return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.PIPE, text=True)


def interrupted(arguments, storage, text, number, pause_s=0.5):
    """Send the signal after the text appeared on stdout; returns the exit code, stderr and stdout."""
    log = storage.parent / f"{storage.name}.log"
    process = command(arguments, storage, log)
    deadline_s = time.monotonic() + LONGEST_S
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.1)
    time.sleep(pause_s)
    process.send_signal(number)
    _, errors = process.communicate(timeout=LONGEST_S)
    return process.returncode, errors, log.read_text()


def runs_of_kind(storage, kind):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("refilled")
    return client.search_runs([experiment.experiment_id], f"tags.kind = '{kind}'")


def accuracies(storage):
    return [row["test_accuracy"] for row in json.loads((storage / "summary.json").read_text())]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    process = command(SEARCH, folder / "runs", folder / "log")
    _, errors = process.communicate(timeout=2 * LONGEST_S)
    assert process.returncode == 0, errors
    return accuracies(folder / "runs")


def test_every_phase_says_what_is_done_and_the_same_command_goes_on(tmp_path, undisturbed):
    storage = tmp_path / "runs"
    for text, number, said in (
        ("pre-training teachers", signal.SIGTERM, "while pre-training teachers, 0 of 1 done"),
        ("searching", signal.SIGUSR1, "no winner was refitted or tested"),
        ("searching", signal.SIGINT, "no winner was refitted or tested"),
        ("refitting winners", signal.SIGTERM, "while refitting winners, "),
    ):
        code, errors, _ = interrupted(SEARCH, storage, text, number)
        assert code == 128 + number, errors
        assert len(errors.splitlines()) == 1, errors
        assert errors.startswith(f"search: interrupted by {number.name} "), errors
        assert said in errors
        assert "The same command goes on from here: python tune/search.py --overlaps 1" in errors
        assert not (storage / "summary.json").exists()
        assert [run.info.status for run in runs_of_kind(storage, "search")] == ["KILLED"]
    process = command(SEARCH, storage, tmp_path / "last.log")
    _, errors = process.communicate(timeout=2 * LONGEST_S)
    assert process.returncode == 0, errors
    assert accuracies(storage) == undisturbed
    assert [run.info.status for run in runs_of_kind(storage, "search")] == ["FINISHED"]


def test_a_second_signal_ends_at_once(tmp_path):
    code = (
        "import os, signal, sys, time\n"
        "from refilled.command import exit_code\n"
        "def action():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
        "    finally:\n"
        "        time.sleep(1); os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
        "sys.exit(exit_code('search', action))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stderr) == (143, "")


def test_the_copies_of_one_ctrl_c_are_one():
    code = (
        "import os, signal, sys\n"
        "from refilled.command import exit_code\n"
        "def action():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    finally:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(exit_code('search', action))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 130
    assert ended.stderr.startswith("search: interrupted by SIGINT while starting, before anything was trained.")


def test_a_closed_terminal_is_an_interruption():
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "from refilled.command import exit_code\n"
        "sys.exit(exit_code('search', lambda: os.kill(os.getpid(), signal.SIGHUP) or 7))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 129
    assert ended.stderr.startswith("search: interrupted by SIGHUP ")


def test_what_nohup_started_outlives_its_terminal():
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from refilled.command import exit_code\n"
        "sys.exit(exit_code('search', lambda: os.kill(os.getpid(), signal.SIGHUP) or 7))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30).returncode == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_of_train_says_so_too(tmp_path, number):
    code, errors, _ = interrupted(
        [sys.executable, "tune/train.py", "--epochs", "40", "40", "--overlap", "1"],
        tmp_path / "train",
        "epoch 1",
        number,
    )
    assert code == 128 + number, errors
    assert errors.startswith(f"train: interrupted by {number.name} "), errors
    assert len(errors.splitlines()) == 1, errors
    assert "finished epochs are kept" in errors


def test_no_password_is_in_the_command_that_goes_on():
    from refilled.interruption import Interrupted, sentence

    said = sentence(Interrupted(signal.SIGINT), ["--tracking-uri", "http://bob:hun#t/e?r@2@host:5000/a"])
    assert "http://bob:***@host:5000/a" in said
    assert "hun" not in said
