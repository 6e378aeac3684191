"""The winner in a user's hands, after a real search: its files, MLflow, a place without this package, README."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from test_search import run_command

import refilled
from refilled.config import RunConfig
from refilled.data.images import ImageSet
from refilled.storage import Storage
from refilled.tasks.classification import load_test_images
from tune.tracking.students import registered_name

ROOT = Path(__file__).parents[2]
NAME = "refilled-digits-convnet-8-from-convnet-32-overlap-0.4"
FLAGS = ["--methods", "student", "refilled", "--overlaps", "0.4", "--trials", "2", "--seeds", "2", "--epochs", "2", "3"]
FLAGS += ["--teacher-epochs", "4", "--no-forecast"]

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def search(storage: Path, *flags: str, cwd: Path = ROOT) -> str:
    done = run_command("tune/search.py", *flags, "--storage", str(storage), cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def summary_of(storage: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((storage / "summary.json").read_text())
    return rows


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A storage, and what the search printed."""
    storage = tmp_path_factory.mktemp("search")
    return storage, search(storage, *FLAGS, "--register", "--export", "torch", "onnx")


@pytest.fixture
def test_images(found: tuple[Path, str]) -> ImageSet:
    row = summary_of(found[0])[0]
    return load_test_images(RunConfig.from_dict(row["config"]), Storage.open(found[0]), tuple(row["student_classes"]))


def best_row(storage: Path) -> dict[str, Any]:
    return max(summary_of(storage), key=lambda row: row["val_accuracy"])


def test_every_winner_has_its_files_and_the_table_shows_them(found: tuple[Path, str]) -> None:
    storage, printed = found
    for row in summary_of(storage):
        file, folder = row["student_file"], storage / row["student_file"]["folder"]
        assert row["run_keys"][0].endswith(folder.name)
        assert file["seed"] == row["seeds"][0]
        assert file["mlflow_model"] is True
        assert file["file_bytes"] == (folder / file["file"]).stat().st_size
        assert set(row["export"]) == {"torch", "onnx"}
        for each in row["export"].values():
            assert each["max_logit_difference"] < 1e-4
            assert each["test_accuracy"] == row["test_accuracy"][0]
            assert each["file"] in printed
        assert f"{file['multiply_adds']:,}" in printed
        assert f"{100 * row['test_accuracy_mean']:.2f}" in (folder / "README.md").read_text()
    assert len(list(storage.glob("runs/*/student.json"))) == len(
        summary_of(storage)
    )  # of other seeds and trials there are none


def test_the_storage_gives_the_student_that_was_tested(found: tuple[Path, str], test_images: ImageSet) -> None:
    storage, _ = found
    student, row = refilled.load(storage), best_row(storage)
    truth = [test_images.class_names[label] for label in test_images.labels.tolist()]
    named = [each.class_name for each in student.predict(test_images.images)]
    assert sum(a == b for a, b in zip(named, truth, strict=True)) / len(truth) == row["test_accuracy"][0] > 0.4


def test_the_best_by_validation_is_the_champion(found: tuple[Path, str], test_images: ImageSet) -> None:
    storage, _ = found
    uri = f"sqlite:///{storage / 'mlflow.db'}"
    client, row = MlflowClient(uri, uri), best_row(storage)
    assert [each["student_file"]["registered_as"] for each in summary_of(storage)] == [
        NAME if each is row or each["method"] == row["method"] else None for each in summary_of(storage)
    ]
    assert [model.name for model in client.search_registered_models()] == [NAME]
    version = client.get_model_version_by_alias(NAME, "champion")
    assert version.run_id == row["run_ids"][0]
    assert version.tags["method"] == row["method"]
    run = client.get_run(row["run_ids"][0])
    onnx = row["export"]["onnx"]
    assert run.data.metrics["export/onnx/p50_ms_batch_32"] == onnx["latency"]["32"]["p50_ms"]
    assert run.data.metrics["student/multiply_adds"] == row["student_file"]["multiply_adds"]
    artifacts = {each.path for each in client.list_artifacts(run.info.run_id)}
    assert {"README.md", "student.safetensors", "student.onnx", "student.pt2", "model", "model.pt"} <= artifacts
    expected = refilled.load(storage).logits(test_images.images)
    for name in (f"models:/{NAME}@champion", f"models:/{NAME}/{version.version}", f"runs:/{version.run_id}"):
        assert torch.equal(refilled.load(name, tracking_uri=uri).logits(test_images.images), expected)


def outside(folder: Path) -> Path:
    """The Python of an environment with all that this one has but the packages of this repository."""
    venv.create(folder, with_pip=False)
    there = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    own = ("refilled", "tune", "analysis", "__editable__", "_virtualenv")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(own) and path.suffix != ".pth":
            (there / path.name).symlink_to(path)
    return folder / "bin" / "python"


def test_the_mlflow_model_predicts_the_same_where_this_package_is_not(
    found: tuple[Path, str], test_images: ImageSet, tmp_path: Path
) -> None:
    storage, _ = found
    paths = []
    for index, pixels in enumerate(test_images.images):
        paths.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(pixels[0].numpy()).save(paths[-1])
    program = """
        import importlib.util, json, sys
        assert all(importlib.util.find_spec(name) is None for name in ("refilled", "tune", "analysis"))
        import mlflow.pyfunc, pandas as pd
        mlflow.set_tracking_uri(sys.argv[1])
        model = mlflow.pyfunc.load_model(sys.argv[2])
        paths = json.load(open(sys.argv[3]))
        by_path = model.predict(pd.DataFrame({"image": paths}))
        by_content = model.predict(pd.DataFrame({"image": [open(path, "rb").read() for path in paths]}))
        assert by_path.equals(by_content)
        json.dump(list(by_path["class_name"]), open(sys.argv[4], "w"))
        assert not [name for name in sys.modules if name.split(".")[0] in ("refilled", "tune", "analysis")]
    """
    (tmp_path / "paths.json").write_text(json.dumps(paths))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MLFLOW_"))}
    uri, model = f"sqlite:///{storage / 'mlflow.db'}", f"models:/{NAME}@champion"
    done = subprocess.run(
        [outside(tmp_path / "venv"), "-c", textwrap.dedent(program), uri, model, "paths.json", "named.json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    named = json.loads((tmp_path / "named.json").read_text())
    assert named == [each.class_name for each in refilled.load(storage).predict(test_images.images)]
    assert len(set(named)) > 1


def test_what_the_readme_and_the_example_say_works(
    found: tuple[Path, str], test_images: ImageSet, tmp_path: Path
) -> None:
    storage, _ = found
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Use the student")[2]
    (block, *_) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "runs").symlink_to(storage)
    for index, name in enumerate(("first.png", "second.jpg")):
        Image.fromarray(test_images.images[index, 0].numpy()).save(tmp_path / name)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        python, given = [sys.executable, *command], environment | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(python, cwd=tmp_path, env=given, capture_output=True, text=True, timeout=240)

    done = run("-c", block)
    assert done.returncode == 0, done.stderr
    (first,) = refilled.load(storage).predict(tmp_path / "first.png")
    name, probability = done.stdout.splitlines()[0].split()
    assert (name, float(probability)) == (first.class_name, pytest.approx(first.probability, abs=1e-5))
    assert re.search(rf"^0 +{first.class_name} +0\.\d+ ", done.stdout, re.MULTILINE)  # MLflow's row
    done = run(str(ROOT / "examples/use_student.py"), "runs", "first.png", "second.jpg")
    assert done.stdout.startswith(f"first.png: {first.class_name} ({100 * first.probability:.1f} %)\nsecond.jpg: ")
    done = run(str(ROOT / "examples/use_student.py"), "runs", "third.png")
    assert done.returncode == 2
    assert done.stderr.startswith("use_student: third.png must be a file with an image")


def test_the_same_command_again_writes_and_registers_nothing(found: tuple[Path, str]) -> None:
    storage, _ = found
    uri = f"sqlite:///{storage / 'mlflow.db'}"
    files = {path: path.stat().st_mtime_ns for path in storage.glob("runs/**/*") if path.is_file()}
    before = summary_of(storage), [dict(each) for each in MlflowClient(uri, uri).search_model_versions()]
    search(storage, *FLAGS, "--register", "--export", "torch", "onnx")
    assert (summary_of(storage), [dict(each) for each in MlflowClient(uri, uri).search_model_versions()]) == before
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_a_network_that_cannot_be_exported_ends_no_search(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        textwrap.dedent("""
            from refilled.models.convnet import ConvNet

            class Branchy(ConvNet):
                def __init__(self, *, image_size, **shape):
                    super().__init__(4, **shape)

                def forward(self, images, dropout_keys=None):
                    return super().forward(images if images.sum() > 0 else -images, dropout_keys)
        """)
    )
    flags = ["--methods", "student", "--overlaps", "1", "--trials", "1", "--seeds", "1", "--epochs", "0", "1"]
    flags += ["--students", "net.py:Branchy", "--no-forecast", "--register", "--export", "onnx"]
    printed = search(tmp_path / "runs", *flags, cwd=tmp_path)
    (row,) = summary_of(tmp_path / "runs")
    assert "cannot be exported to onnx" in row["export"]["onnx"]["error"]
    assert (row["student_file"]["mlflow_model"], row["student_file"]["registered_as"]) == (False, None)
    assert " ".join(printed.split()).count("The network cannot be exported to") == 2
    assert "has no MLflow model: The network cannot be exported to torch" in " ".join(printed.split())
    assert (tmp_path / "runs" / row["student_file"]["folder"] / "student.safetensors").exists()


def test_registered_names_are_legal_and_differ() -> None:
    assert registered_name("a", "wrn-16-1", "overlap-0.4") == "a-wrn-16-1-overlap-0.4"
    odd = [registered_name("a", name) for name in ("x/y.py:Net", "x_y.py:Net", "x/y.py/Net", "ü" * 300)]
    assert len(set(odd)) == 4
    for name in odd:
        assert re.fullmatch(r"[A-Za-z0-9_.-]{1,250}", name)
