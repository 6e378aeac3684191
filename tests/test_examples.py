"""What lies in examples/ works as a user would use it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from refilled.config import RunConfig
from refilled.presets import smoke
from refilled.rehearsal import rehearse
from refilled.stages import with_own_code
from refilled.storage import Storage
from refilled.tasks.classification import load_task

ROOT = Path(__file__).parents[1]
OWN_TERM = ROOT / "examples" / "own_term"
NUM_CHECKS = 17


def run_pytest(*arguments: str, cwd: Path) -> tuple[int, str]:
    """Exit code and output of a process of its own."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("search_from_python.py", "--trials 1 --seeds 1 --epochs 1 1", "it knows "),
        ("own_training_loop.py", "--epochs 2", "test accuracy of the student: "),
        ("train_teacher.py", "--epochs 1", "accuracy on held-out images: "),
    ],
)
def test_a_script_runs_from_a_folder_of_its_own(script: str, arguments: str, said: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / script), *arguments.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_the_contract_of_the_example_is_run_by_its_folders_name() -> None:
    code, output = run_pytest("examples/own_term", cwd=ROOT)
    assert code == 0, output
    assert f"{NUM_CHECKS} passed" in output


def test_a_users_own_folder_is_enough_and_a_broken_term_is_told(tmp_path: Path) -> None:
    shutil.copy(OWN_TERM / "test_my_terms.py", tmp_path)
    text = (OWN_TERM / "my_terms.py").read_text()
    broken = text.replace(
        'rows["regression"].mean()', 'rows["regression"].mean() + self.projection.bias.square().sum()'
    )
    assert broken != text
    (tmp_path / "my_terms.py").write_text(broken)
    code, output = run_pytest(".", cwd=tmp_path)
    assert code == 1
    assert "parameters belong in rows(); loss() depends on some" in output
    assert re.search(
        r"gradients on worker 0 of 2 must be as on one worker, but these differ: term\.projection\.bias", output
    )


def test_the_example_can_be_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run = RunConfig.from_dict(smoke().run.to_dict() | {"method": "examples/own_term/my_terms.py:Regression"})
    run = with_own_code(run)
    rehearse(run, load_task(run, Storage.open(tmp_path)))
