"""One number is of one set of images: what changes while a search is on, or between two commands, is noticed."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image
from rich.console import Console

from refilled.config import RunConfig
from refilled.errors import DataChangedError
from refilled.execution import refit, run_folder
from refilled.metrics import TrialEnd
from refilled.presets import smoke
from refilled.storage import Storage
from refilled.tasks.classification import load_task
from refilled.teacher import pretraining_run
from refilled.training.compute import Compute
from tune.backend.worker import trial_end, work
from tune.plan import make_plan
from tune.progress import Progress
from tune.refits import _Refit, _require_one_test_set

ROOT = Path(__file__).parents[2]
CLASSES = ("a", "b", "c", "d")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of 8-pixel images of four classes, told apart by their brightness."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 4)):
        for number, name in enumerate(CLASSES):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for each in range(count):
                pixels = draw.integers(0, 60, (8, 8, 3)) + 60 * number
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{each}.png")
    return tmp_path / "images"


@pytest.fixture
def run(images: Path) -> RunConfig:
    return dataclasses.replace(
        smoke().run,
        data=f"imagefolder:{images}",
        overlap=1.0,
        method="student",
        epochs=(0, 2),
        teacher_epochs=2,
        val_fraction=0.25,
        global_batch_size=8,
    )


def swap_test_folders(images: Path) -> None:
    (images / "test" / "a").rename(images / "test" / "x")
    (images / "test" / "b").rename(images / "test" / "a")
    (images / "test" / "x").rename(images / "test" / "b")


def add_training_image(images: Path) -> None:
    shutil.copy(images / "train" / "a" / "0.png", images / "train" / "a" / "new.png")


def knowing(run: RunConfig, storage: Storage) -> RunConfig:
    """The run with the digest of the images as they are now, as a plan has it."""
    return dataclasses.replace(run, data_digest=load_task(run, storage).data_digest)


@pytest.mark.parametrize("method", ["student", "refilled"])
def test_a_run_refuses_other_images_than_those_it_knows_of(
    images: Path, run: RunConfig, tmp_path: Path, method: str
) -> None:
    known = knowing(dataclasses.replace(run, method=method, epochs=(1, 1)), Storage(tmp_path / "first"))
    add_training_image(images)
    storage = Storage(tmp_path / "second")  # as a worker on another node would find it
    for job in ("run", "teacher") if method == "refilled" else ("run",):
        with pytest.raises(DataChangedError, match=r"training images of data imagefolder:.* have changed: their dig"):
            work(job, known.to_dict(), storage, num_threads=1, num_gpus=0)
    assert not list(storage.root.glob("runs/*"))
    assert not list(storage.root.glob("teachers/*"))


def test_the_teachers_own_images_are_known_too(images: Path, run: RunConfig, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(images, other)
    add_training_image(other)
    taught = dataclasses.replace(run, teacher_data=f"imagefolder:{other}", method="kd")
    storage = Storage(tmp_path / "first")
    digest = load_task(taught, storage).spaces.teacher_digest
    known = dataclasses.replace(taught, teacher_data_digest=digest)
    assert pretraining_run(known).data_digest == digest
    load_task(known, storage)
    shutil.copy(other / "train" / "b" / "0.png", other / "train" / "b" / "new.png")
    with pytest.raises(DataChangedError, match=r"training images of teacher_data imagefolder:.*other have changed"):
        load_task(known, Storage(tmp_path / "second"))


def test_changed_images_end_a_search_and_not_a_trial() -> None:
    end = trial_end(DataChangedError("they changed"))
    assert end == TrialEnd("data_changed", "they changed")
    assert end.is_of_all
    assert not TrialEnd("failed", "alone").is_of_all


def test_a_refit_is_tested_again_where_the_test_images_changed(
    images: Path, run: RunConfig, tmp_path: Path, compute: Compute
) -> None:
    storage = Storage(tmp_path / "storage")
    whole = dataclasses.replace(run, val_fraction=0.0, epochs=(0, 8))
    before = refit(whole, storage, compute)
    folder = run_folder(whole, storage)
    first = folder.test()
    swap_test_folders(images)
    after = refit(whole, storage, compute)
    second = folder.test()
    assert first is not None
    assert second is not None
    assert first["test_digest"] != second["test_digest"]
    assert after == second["test_accuracy"] != before
    folder.keep_test(second | {"test_accuracy": 0.125})
    assert refit(whole, storage, compute) == 0.125  # once for one set


def command(storage: Path, run: RunConfig, **changes: str) -> list[str]:
    flags = {
        **{"data": run.data, "overlaps": "1", "methods": "student", "epochs": "1 8", "storage": str(storage)},
        **{"teacher-epochs": "2", "val-fraction": "0.25", "global-batch-size": "8", "trials": "1", "seeds": "1"},
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    words = [word for name, value in flags.items() for word in (f"--{name}", *value.split())]
    return [sys.executable, str(ROOT / "tune" / "search.py"), *words, "--no-forecast"]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}


def test_test_images_that_change_between_two_refits_end_the_search(run: RunConfig, tmp_path: Path) -> None:
    plan = make_plan(
        dataclasses.replace(smoke(), run=run, methods=("student",), overlaps=(1.0,), storage=str(tmp_path))
    )
    (cell,) = plan.cells
    wanted = {key: _Refit(cell, cell.run, "method") for key in ("first", "second")}
    shown = Progress(Console(file=io.StringIO()))
    same = {key: {"test_digest": "before", "test_accuracy": 0.5} for key in wanted}
    _require_one_test_set(wanted, dict.fromkeys(wanted), same, shown)
    with pytest.raises(DataChangedError, match="start the same command again, which tests those again that saw other"):
        _require_one_test_set(
            wanted, dict.fromkeys(wanted), same | {"second": {"test_digest": "after", "test_accuracy": 0.5}}, shown
        )


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_one_mean_is_over_one_test_set(images: Path, run: RunConfig, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    first = subprocess.run(command(storage, run), env=environment(), capture_output=True, text=True, check=True)
    assert "tested again" not in first.stdout
    swap_test_folders(images)
    second = subprocess.run(
        command(storage, run, seeds="2"), env=environment(), capture_output=True, text=True, check=True
    )
    said = " ".join(second.stdout.split())  # lines are as wide as a terminal
    assert "The test images have changed since 1 of the refits were tested; those were tested again." in said
    tests = [json.loads(path.read_text()) for path in storage.glob("runs/*/test.json")]
    assert len(tests) == 2
    assert len({each["test_digest"] for each in tests}) == 1
    (row,) = json.loads((storage / "summary.json").read_text())
    assert sorted(row["test_accuracy"]) == sorted(each["test_accuracy"] for each in tests)
    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    logged = [client.get_run(each).data.metrics["test_accuracy"] for each in row["run_ids"]]
    assert logged == row["test_accuracy"]


@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize("moment", ["pre-training", "searching", "refitting"])
def test_training_images_that_change_end_the_search_with_a_sentence(
    images: Path, run: RunConfig, tmp_path: Path, moment: str
) -> None:
    """Changed before a worker has read any; and after the trials, so that workers which know them are gone."""
    storage = tmp_path / "storage"
    if moment == "refitting":
        subprocess.run(command(storage, run), env=environment(), capture_output=True, check=True)
        shutil.rmtree(next((storage / "runs").glob("*/test.json")).parent)
    searching = subprocess.Popen(
        command(
            storage,
            run,
            trials="1" if moment == "refitting" else "3",
            seeds="2",
            methods="refilled" if moment == "pre-training" else "student",
        ),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert searching.stdout is not None
    said = []
    for line in searching.stdout:
        said.append(line)
        if moment in line:
            add_training_image(images)
            break
    rest, errors = searching.communicate(timeout=500)
    assert searching.returncode == 2, (said, rest, errors)
    (sentence,) = [line for line in errors.splitlines() if line.startswith("search:")]
    assert "training images of data" in sentence
    assert "have changed: their digest is" in sentence
    assert "Traceback" not in errors + rest
    assert not (storage / "summary.json").exists() or moment == "refitting"
