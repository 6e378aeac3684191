"""`tune/train.py` on a real Ray Train group."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from outcomes import assert_close_outcome

from refilled.execution import execute, refit, run_folder
from refilled.storage import Storage
from refilled.training.compute import Compute
from tune.train import start

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.ray


def train(storage: Path, *arguments: str) -> str:
    done = started(storage, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def started(storage: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    return subprocess.run(
        [sys.executable, str(ROOT / "tune/train.py"), *arguments, "--storage", str(storage)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


@pytest.mark.parametrize("num_workers", [2, 4])
def test_workers_give_the_numbers_of_one(num_workers: int, tmp_path: Path) -> None:
    """Invariant 2: every metric of every epoch of both stages, the teacher's pre-training included."""
    flags = [
        "--overlap",
        "0.4",
        "--epochs",
        "2",
        "3",
        "--teacher-epochs",
        "2",
        "--precision",
        "float64",
        "--cpus-per-worker",
        "0.5",
    ]
    printed = train(tmp_path / "group", *flags, "--workers", str(num_workers))
    run = dataclasses.replace(start("smoke", ()).run, overlap=0.4, epochs=(2, 3), teacher_epochs=2, precision="float64")
    group, alone = (Storage.open(tmp_path / name) for name in ("group", "alone"))
    row = execute(run, alone, Compute(torch.device("cpu"), "float64"))
    assert [each.epoch for each in run_folder(run, group).rows()] == [1, 2, 3, 4, 5]
    assert_close_outcome(run_folder(run, group), run_folder(run, alone))
    assert row.best_val_accuracy is not None
    assert f"Validation accuracy {100 * row.best_val_accuracy:.2f} %" in printed


def test_refit_reads_the_test_set_and_logs_it(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    flags = ["--method", "student", "--epochs", "0", "3", "--refit"]
    printed = train(tmp_path, *flags)
    run = dataclasses.replace(start("smoke", ("student",)).run, epochs=(0, 3), val_fraction=0.0)
    value = refit(run, Storage.open(tmp_path), Compute(torch.device("cpu"), "float32"))  # found, not trained again
    assert f"Test accuracy {100 * value:.2f} %" in printed
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("refilled")
    runs = client.search_runs([experiment.experiment_id])
    child = next(each for each in runs if each.data.tags["kind"] == "refit")
    assert child.data.metrics["test_accuracy"] == value
    assert child.info.status == "FINISHED"
    artifact = Path(client.download_artifacts(child.info.run_id, "config.json"))
    assert json.loads(artifact.read_text())["student_classes"] == ["0", "1", "2", "3", "4"]


def test_a_run_that_diverges_has_one_sentence_and_no_result(tmp_path: Path) -> None:
    flags = ["--method", "student", "--epochs", "0", "2", "--classifier.schedule.learning-rate", "1e30"]
    done = started(tmp_path, *flags)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "train: the run diverged and has no result. The loss is nan in epoch 1 (stage classifier)."
    )
    assert "Traceback" not in done.stderr
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        assert database.execute("SELECT status FROM runs").fetchall() == [("FAILED",)] * 2
