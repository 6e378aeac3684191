"""`tune/train.py` on a real Ray Train group."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from refilled.execution import execute, refit, run_folder
from refilled.training.compute import Compute
from tune.train import start

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.ray


def train(storage: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tune/train.py"), *arguments, "--storage", str(storage)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    execute(run, tmp_path / "alone", Compute(torch.device("cpu"), "float64"))
    rows = [run_folder(run, tmp_path / name).rows() for name in ("group", "alone")]
    assert [row["epoch"] for row in rows[0]] == [1, 2, 3, 4, 5]
    for group, alone in zip(*rows, strict=True):
        assert group.keys() == alone.keys()
        for name in group.keys() - {"stage", "images_per_second", "epoch_s"}:
            assert group[name] == pytest.approx(alone[name], rel=1e-9), name
    weights = [torch.load(run_folder(run, tmp_path / name).path / "model.pt")["weights"] for name in ("group", "alone")]
    for name, tensor in weights[1].items():
        assert torch.allclose(weights[0][name], tensor, rtol=1e-9, atol=1e-9), name
    assert f"Validation accuracy {100 * rows[0][-1]['best_val_accuracy']:.2f} %" in printed


def test_refit_reads_the_test_set_and_logs_it(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    flags = ["--method", "student", "--epochs", "0", "3", "--refit"]
    printed = train(tmp_path, *flags)
    run = dataclasses.replace(start("smoke", ("student",)).run, epochs=(0, 3), val_fraction=0.0)
    value = refit(run, tmp_path, Compute(torch.device("cpu"), "float32"))  # found, not trained again
    assert f"Test accuracy {100 * value:.2f} %" in printed
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("refilled")
    runs = client.search_runs([experiment.experiment_id])
    child = next(each for each in runs if each.data.tags["kind"] == "refit")
    assert child.data.metrics["test_accuracy"] == value
    assert child.info.status == "FINISHED"
    artifact = Path(client.download_artifacts(child.info.run_id, "config.json"))
    assert json.loads(artifact.read_text())["student_classes"] == ["0", "1", "2", "3", "4"]
