"""The package as it is installed: one version, one command, whole data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import refilled
from refilled.__main__ import main

ROOT = Path(__file__).parents[1]


def test_a_wheel_has_all_that_is_needed(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(tmp_path)]
    copy = tmp_path / "source"
    others = (".venv", ".git", ".make", "runs", "build", "dist", "__pycache__", "*.egg-info", "tests")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*others))
    subprocess.run([*build, str(copy)], check=True, timeout=200)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"refilled-{refilled.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (points,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
        (about,) = (archive.read(name).decode() for name in names if name.endswith("METADATA"))
    assert "refilled = refilled.__main__:main" in points
    assert {f"{package}/py.typed" for package in ("refilled", "tune", "analysis")} <= names
    assert "refilled/data/class_orders/cifar_fs.txt" in names
    assert any(name.startswith("analysis/simulator/curves/") for name in names)
    assert not any(name.startswith(("tests", "examples")) for name in names)
    assert "License-Expression: Apache-2.0" in about
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.parametrize("words", ["--help", "", "--version"])
def test_the_first_words_need_no_heavy_library(words: str) -> None:
    program = (
        "import sys; from refilled.__main__ import main; code = main(sys.argv[1:]); "
        "print(code, [each for each in ('torch', 'ray', 'mlflow', 'optuna') if each in sys.modules])"
    )
    command = [sys.executable, "-c", program, *words.split()]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "0 []"
    assert (refilled.__version__ if words == "--version" else "refilled COMMAND") in done.stdout


def test_an_unknown_command_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["find"]) == 2
    assert capsys.readouterr().err == "refilled: the command must be search, train, report, sync, got 'find'.\n"


@pytest.mark.parametrize("name", ["search", "train", "report", "sync"])
def test_every_command_refuses_like_its_script(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--no-such-flag", "1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{name}: ")
    assert said.count("\n") == 1


def test_the_face_forwards_and_knows_nothing_else() -> None:
    assert callable(refilled.search)
    assert callable(refilled.load)
    with pytest.raises(AttributeError, match="has no attribute 'distil'"):
        _ = refilled.distil
