"""Real commands, interrupted in one phase after another: what they say, how they end, and what the same one finds."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from processes import left_over

from refilled.interruption import Interrupted, sentence

ROOT = Path(__file__).parents[2]
SEARCH = [sys.executable, "tune/search.py", "--overlaps", "1", "--seeds", "2", "--epochs", "2", "2"]
SEARCH += ["--teacher-epochs", "2", "--deterministic"]
SHORT = [*SEARCH, "--no-forecast", "--trials", "2"]
LONGEST_S = 300


@contextlib.contextmanager
def command(arguments, storage, log):
    """A command that runs, in a Ray folder of its own; nothing of it is left at the end."""
    with tempfile.TemporaryDirectory(prefix="rf-", ignore_cleanup_errors=True) as folder, log.open("w") as out:
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "RAY_TMPDIR": folder,
        }
        process = subprocess.Popen(
            [*arguments, f"--storage={storage}"],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()
        assert not left_over(Path(folder))


def interrupted(arguments, storage, text, number, pause_s=0.5):
    """Send the signal after the text appeared on stdout; returns the exit code and stderr."""
    log = storage.parent / f"{storage.name}.log"
    with command(arguments, storage, log) as process:
        deadline_s = time.monotonic() + LONGEST_S
        while text not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.1)
        time.sleep(pause_s)
        process.send_signal(number)
        _, errors = process.communicate(timeout=LONGEST_S)
    return process.returncode, errors


def undisturbed(storage):
    """Let the search come to its end; returns the test accuracies of its summary."""
    with command(SHORT, storage, storage.parent / "whole.log") as process:
        _, errors = process.communicate(timeout=2 * LONGEST_S)
        assert process.returncode == 0, errors
    return [row["test_accuracy"] for row in json.loads((storage / "summary.json").read_text())]


def runs_of_kind(storage, kind):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("refilled")
    return client.search_runs([experiment.experiment_id], f"tags.kind = '{kind}'")


def test_every_phase_says_what_is_done_and_the_same_command_goes_on(tmp_path):
    storage = tmp_path / "runs"
    for text, number, said in (
        ("pre-training teachers", signal.SIGTERM, "pre-training teachers: 0 of 1 done"),
        ("searching", signal.SIGUSR1, "no winner was refitted or tested"),
        ("searching", signal.SIGINT, "no winner was refitted or tested"),
        ("refitting winners", signal.SIGTERM, "refitting winners: "),
        ("writing students", signal.SIGINT, "writing students: "),
    ):
        code, errors = interrupted(SHORT, storage, text, number)
        assert code == 128 + number, errors
        assert len(errors.splitlines()) == 1, errors
        assert errors.startswith(f"search: interrupted by {number.name}; "), errors
        assert said in errors
        assert "The same command goes on from here: python tune/search.py --overlaps 1" in errors
        assert not (storage / "summary.json").exists()
        assert [run.info.status for run in runs_of_kind(storage, "search")] == ["KILLED"]
    assert undisturbed(storage) == undisturbed(tmp_path / "other")
    assert [run.info.status for run in runs_of_kind(storage, "search")] == ["FINISHED"]


def test_what_is_added_to_a_search_is_not_reported_when_it_is_cut_short(tmp_path):
    """Case 1: trials ended by Ctrl-C were refitted and tabled, and the search FINISHED."""
    storage = tmp_path / "runs"
    before = undisturbed(storage)
    summary = (storage / "summary.json").read_bytes()
    longer = [*SEARCH, "--no-forecast", "--trials", "6"]
    code, errors = interrupted(longer, storage, "searching", signal.SIGINT, pause_s=3)
    assert code == 130, errors
    assert (storage / "summary.json").read_bytes() == summary
    assert [run.info.status for run in runs_of_kind(storage, "search")] == ["KILLED", "FINISHED"]
    assert len(runs_of_kind(storage, "refit")) == sum(map(len, before)) + len(before[0])  # and the short baseline's


def test_timing_and_a_dry_run_say_so_too(tmp_path):
    dry = [*SEARCH, "--dry-run"]
    code, errors = interrupted(dry, tmp_path / "runs", "Timing", signal.SIGTERM)
    assert code == 143, errors
    assert errors.startswith("search: interrupted by SIGTERM; a dry run, which trains nothing: timings are kept"), (
        errors
    )
    assert len(errors.splitlines()) == 1, errors


def after(*actions):
    """How a command ends that does these things in turn, each also after an interruption of the one before."""
    script = ["import os, signal, sys, time", "from refilled.command import exit_code"]
    script += ["def send(name):", "    os.kill(os.getpid(), getattr(signal, name)); time.sleep(0.1)", "def action():"]
    for depth, action in enumerate(actions[:-1]):
        indent = "    " * (depth + 1)
        script += [f"{indent}try:", f"{indent}    {action}", f"{indent}finally:"]
    script += ["    " * len(actions) + actions[-1], "    return 7", "sys.exit(exit_code('search', action))"]
    command = [sys.executable, "-c", "\n".join(script)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    return ended.returncode, ended.stderr


def test_a_second_signal_ends_at_once():
    assert after("send('SIGINT')", "time.sleep(1); send('SIGTERM')") == (143, "")


def test_the_copies_of_one_ctrl_c_are_one():
    code, errors = after("send('SIGINT')", "send('SIGINT')")
    assert code == 130
    assert errors.startswith("search: interrupted by SIGINT; what was done before is kept. The same command goes on ")


@pytest.mark.parametrize(("handler", "code"), [("SIG_DFL", 129), ("SIG_IGN", 7)])
def test_a_closed_terminal_is_an_interruption_but_not_of_what_nohup_started(handler, code):
    number = getattr(signal, handler)
    before = signal.signal(signal.SIGHUP, number)  # which the command inherits, where it is to ignore it
    try:
        ended, errors = after("send('SIGHUP')")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert ended == code, errors
    assert errors.startswith("search: interrupted by SIGHUP; " if code == 129 else "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_of_train_says_so_too(tmp_path, number):
    code, errors = interrupted(
        [sys.executable, "tune/train.py", "--epochs", "40", "40", "--overlap", "1"],
        tmp_path / "train",
        "epoch 1",
        number,
    )
    assert code == 128 + number, errors
    assert errors.startswith(f"train: interrupted by {number.name}; training: "), errors
    assert len(errors.splitlines()) == 1, errors


@pytest.mark.parametrize("password", ["hunter2", "hun#t/e?r@2", "100%@secret", "a:b"])
def test_no_password_is_in_the_command_that_goes_on(password):
    said = sentence(Interrupted(signal.SIGINT), ["--tracking-uri", f"http://bob:{password}@host:5000/a"])
    assert "http://bob:***@host:5000/a" in said
    assert password not in said
