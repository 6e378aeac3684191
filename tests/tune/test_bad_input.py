"""Bad input is one sentence on stderr and exit code 2, before any training starts and with nothing half-written."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from refilled.config import SearchConfig
from tune import search as search_module
from tune import train as train_module

ROOT = Path(__file__).parents[2]


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "storage"


def write_parquet(path: Path, *, labels: list[int] | None = None, damage: int | None = None) -> None:
    """Two images of each of four classes; row `damage` is no image."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    labels = [0, 0, 1, 1, 2, 2, 3, 3] if labels is None else labels
    rows = []
    for number in range(len(labels)):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), 20 * number, np.uint8)).save(buffer, format="png")
        content = b"no image" if number == damage else buffer.getvalue()
        rows.append({"bytes": content, "path": f"{number}.png"})
    names = '{"info": {"features": {"label": {"names": ["a", "b", "c", "d"], "_type": "ClassLabel"}}}}'
    table = pa.table({"image": rows, "label": pa.array(labels, pa.int64())})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": names}), path)


def refused(arguments: list[str], storage: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence; checks all that holds for every refusal."""
    code = search_module.command([*arguments, "--storage", str(storage)])
    output = capsys.readouterr()
    assert code == 2
    assert output.out == ""
    assert output.err.startswith("search: ")
    assert output.err.count("\n") == 1
    assert "Traceback" not in output.err
    left = {path.name for path in storage.iterdir()} if storage.is_dir() else set()
    assert not left & {"runs", "teachers", "mlflow.db", "studies.db", "summary.json", "artifacts"}
    return output.err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["cifar1000"], ["PRESET must be one of smoke, cifar100, paper, released", "'cifar1000'"]),
        (["--data", "mnist"], ["data must be one of digits, cifar100, parquet:PATH, imagefolder:PATH", "'mnist'"]),
        (["--data", "parquet:/nowhere/at/all"], ["/nowhere/at/all"]),
        (["--students", "resnet-18"], ["students", "'resnet-18'", "wrn-DEPTH-WIDTH"]),
        (["--teachers", "wrn-17-2"], ["teachers", "'wrn-17-2'"]),
        (["--colour", "blue"], ["--colour"]),
        (["--overlaps", "0.3"], ["overlap must be k/5", "0.3"]),
        (["--overlaps", "2"], ["overlaps must be in [0, 1]"]),
        (["--overlaps", "few"], ["--overlaps", '"few"']),
        (["--method", "kd"], ["overlap must be 1 for method kd"]),
        (["--trials", "0"], ["trials must be at least 1, got 0"]),
        (["--trials", "2.5"], ["search: --trials must be a whole number, got 2.5."]),
        (["--epochs", "2.0", "3"], ["search: --epochs must be a whole number, got 2.0."]),
        (["--max-epochs-total", "1.5"], ["search: --max-epochs-total must be a whole number, got 1.5."]),
        (["--embedding.temperature", "0"], ["embedding.temperature must be at least 0.003"]),
        (["--epochs", "0", "3"], ["epochs must be at least 1 for stage embedding"]),
        (["--class-order", "backwards"], ["class_order must be alphabetical, cifar_fs or a readable text file"]),
        (["--class-order", "cifar_fs"], ["class_order 'cifar_fs' must name the data's 10 classes"]),
        (["--study-storage", "postgresql://localhost:1/x"], ["study_storage", "postgresql"]),
        (["--tracking-uri", "http://127.0.0.1:1"], ["tracking_uri", "http://127.0.0.1:1"]),
    ],
)
def test_refused_setting_is_named(
    arguments: list[str], parts: list[str], storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = refused(arguments, storage, capsys)
    for part in parts:
        assert part in sentence


def test_storage_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    sentence = refused([], tmp_path / "file" / "runs", capsys)
    assert "storage must be a folder that can be written" in sentence


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("fault", ["truncated", "mislabelled", "undecodable", "missing"])
def test_faulty_file_is_named_before_training(
    part: str, fault: str, tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    paths = {name: data / f"{name}-00000-of-00001.parquet" for name in ("train", "test")}
    for name, path in paths.items():
        hit = name == part
        labels = [0, 0, 1, 1, 2, 2, 3, 9] if hit and fault == "mislabelled" else None
        write_parquet(path, labels=labels, damage=3 if hit and fault == "undecodable" else None)
    path = paths[part]
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    if fault == "missing":
        path.unlink()
    sentence = refused(["--data", f"parquet:{data}", "--overlaps", "0", "--val-fraction", "0.5"], storage, capsys)
    assert (path.name if fault != "missing" else part) in sentence


def test_whole_files_of_that_kind_are_accepted(tmp_path: Path) -> None:
    """The faults above are what is refused, not the rest of the data."""
    from tune.plan import make_plan

    for name in ("train", "test"):
        write_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    run = SearchConfig().run.with_overrides({"data": f"parquet:{tmp_path / 'data'}", "val_fraction": 0.5})
    plan = make_plan(SearchConfig(run=run, overlaps=(0.0, 0.5), storage=str(tmp_path / "storage")))
    assert [(cell.method, cell.teacher) for cell in plan.cells] == [("student", "none"), ("refilled", "convnet-32")] * 2
    assert [plan.at(place)["refilled"].spaces.student for place in plan.places] == [("c", "d"), ("b", "c")]
    assert [plan.at(place)["student"].spaces.student for place in plan.places] == [("c", "d"), ("b", "c")]


def test_trial_that_can_never_fit_is_refused_with_the_numbers(
    storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tune/search.py"), "--storage", str(storage), "--cpus-per-worker", "999"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "one worker needs 999 CPUs and 0 GPUs, the largest node has" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--workers", "0"], "workers must be a number of at least 1, or LEAST:MOST such as 1:4, got '0'"),
        (["--workers", "4:1"], "workers must be a number of at least 1, or LEAST:MOST such as 1:4, got '4:1'"),
        (["--workers", "1:2:3"], "got '1:2:3'"),
        (["--workers", "many"], "got 'many'"),
        (["--overlap", "0.3"], "overlap must be k/5"),
        (["--student", "lenet"], "'lenet'"),
    ],
)
def test_train_refuses_alike(
    arguments: list[str], part: str, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_module.command([*arguments, "--storage", str(storage)]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.startswith("train: ")
    assert error.count("\n") == 1


def test_help_lists_every_setting_with_default_and_equation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # narrow terminals break long flags
    assert search_module.command(["cifar100", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    flags = {name.removeprefix("run.") for name in SearchConfig().flat()} - {"overlap", "teacher", "student", "method"}
    compact = text.replace(" ", "")
    for flag in flags:
        assert f"--{flag.replace('_', '-')}" in compact
    for phrase in ("Lambda of Eq. 2, 8 and 10", "Eq. 4", "K-hat", "[default: bfloat16]", "default: (40, 40)"):
        assert phrase in text
