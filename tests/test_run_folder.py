"""Run folders that come to harm: one sentence or the state before, never a traceback, never other numbers."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damages

from refilled.config import RunConfig
from refilled.errors import UserError, storage_full
from refilled.execution import execute, refit, run_folder
from refilled.metrics import EpochMetrics
from refilled.storage import Storage
from refilled.storage.files import read_json
from refilled.storage.run_folder import RunFolder
from refilled.storage.tensor_file import load_tensors, tensor_bytes
from refilled.teacher import PROTOTYPES, teacher_folder
from refilled.training.compute import Compute


class Stopped(Exception):  # noqa: N818  # not an error
    """What ends a run in the middle."""


@pytest.fixture(scope="module")
def run() -> RunConfig:
    from refilled.presets import smoke

    return smoke().run.with_overrides({"epochs": (2, 4), "teacher_epochs": 2, "overlap": 0.4})


@pytest.fixture(scope="module")
def interrupted(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Storage of a run that was ended after its fourth epoch."""
    storage = Storage.open(tmp_path_factory.mktemp("interrupted"))

    def stop(row: EpochMetrics) -> None:
        if row.epoch == 4:
            raise Stopped

    with pytest.raises(Stopped):
        execute(run, storage, Compute(torch.device("cpu"), "float32"), stop)
    return storage


@pytest.fixture(scope="module")
def undisturbed(run: RunConfig, interrupted: Storage, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run comes to."""
    storage = Storage.open(tmp_path_factory.mktemp("undisturbed"))
    execute(run, storage, Compute(torch.device("cpu"), "float32"))
    return outcome(run_folder(run, storage))


def copy_of(storage: Storage, path: Path) -> Storage:
    shutil.copytree(storage.root, path, dirs_exist_ok=True)
    return Storage.open(path)


def outcome(folder: RunFolder) -> dict[str, Any]:
    rows = [dataclasses.replace(row, epoch_s=0.0, images_per_second=0.0).to_dict() for row in folder.rows()]
    return {"rows": rows, "weights": load_tensors(folder.path / "model.pt")["weights"]}


def metrics(epoch: int) -> EpochMetrics:
    return EpochMetrics(
        epoch=epoch,
        stage="classifier",
        train_loss=1.5,
        learning_rate=0.1,
        gradient_norm=2.0,
        gradient_norm_max=3.0,
        images_per_second=100.0,
        epoch_s=0.5,
        finished=False,
        val_accuracy=0.5,
    )


def are_equal(first: Any, second: Any) -> bool:
    """Whether nested dictionaries and lists of tensors and plain values are."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        same_keys = isinstance(second, dict) and list(first) == list(second)
        return same_keys and all(are_equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(are_equal, first, second))
    return type(first) is type(second) and bool(first == second)


def read_or_refuse(path: Path, read: Any) -> Any:
    """What is read, or none after a refusal of one sentence that names the file; anything else is raised."""
    try:
        return read(path)
    except UserError as error:
        message = str(error)
    assert str(path) in message
    assert "\n" not in message
    return None


def test_damaged_tensor_files_are_refused_or_read_to_the_same_values(
    run: RunConfig, interrupted: Storage, tmp_path: Path
) -> None:
    num_tried = num_refused = 0
    files = [run_folder(run, interrupted).path / "checkpoint.pt", teacher_folder(run, interrupted).path / "model.pt"]
    for seed, whole in enumerate(files):
        expected = load_tensors(whole)
        for name, content in damages(whole.read_bytes(), random.Random(seed), 108):
            path = tmp_path / "damaged.pt"
            path.write_bytes(content)
            found = read_or_refuse(path, load_tensors)
            num_tried += 1
            num_refused += found is None
            assert found is None or are_equal(found, expected), name
    assert num_tried == 216
    assert num_refused > 150  # the others hit names' paddings, or dates, which carry nothing


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02garbage", b"\x80\x02]\x94.", b"\x80\x04cos\nsystem\n.", b"(" * 10_000]
)
def test_an_archive_that_is_whole_and_holds_something_else_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    path.write_bytes(tensor_bytes({"weights": torch.zeros(2)}))
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, content if name.endswith("data.pkl") else part)
    assert read_or_refuse(path, load_tensors) is None


def test_an_archive_that_would_expand_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    assert path.stat().st_size < 100_000
    assert read_or_refuse(path, load_tensors) is None


def test_damaged_json_is_refused_or_is_json_still(run: RunConfig, interrupted: Storage, tmp_path: Path) -> None:
    whole = run_folder(run, interrupted).path / "config.json"
    num_refused = 0
    for name, content in damages(whole.read_bytes(), random.Random(2), 54):
        path = tmp_path / "damaged.json"
        path.write_bytes(content)
        found = read_or_refuse(path, read_json)
        num_refused += found is None
        assert found is None or json.loads(content) == found, name
    assert num_refused > 25


def test_damaged_rows_are_the_whole_ones_before(run: RunConfig, interrupted: Storage, tmp_path: Path) -> None:
    """A digit that became another is the one thing that a text does not show."""
    whole = run_folder(run, interrupted)
    expected = whole.rows()
    assert len(expected) == 4
    folder = RunFolder(Storage.open(tmp_path), tmp_path)
    for name, content in damages(whole.metrics_path.read_bytes(), random.Random(3), 90):
        folder.metrics_path.write_bytes(content)
        rows = folder.rows()
        assert [row.epoch for row in rows] == list(range(1, len(rows) + 1)), name
        folder.append_row(metrics(len(rows) + 1))
        assert folder.rows() == [*rows, metrics(len(rows) + 1)], name


def test_rows_after_a_lost_one_are_not_trusted(tmp_path: Path) -> None:
    folder = RunFolder(Storage.open(tmp_path), tmp_path)
    folder.metrics_path.write_text("".join(json.dumps(metrics(epoch).to_dict()) + "\n" for epoch in (1, 3, 4)))
    assert folder.rows() == [metrics(1)]
    folder.append_row(metrics(2))
    assert folder.metrics_path.read_text().count("\n") == 2
    assert folder.rows() == [metrics(1), metrics(2)]


def test_a_row_half_written_is_written_again_and_one_that_is_there_is_not(tmp_path: Path) -> None:
    folder = RunFolder(Storage.open(tmp_path), tmp_path)
    for epoch in (1, 2, 3):
        folder.append_row(metrics(epoch))
    whole = folder.metrics_path.read_bytes()
    folder.append_row(metrics(2))
    assert folder.metrics_path.read_bytes() == whole
    folder.metrics_path.write_bytes(whole[:-10])
    assert folder.rows() == [metrics(1), metrics(2)]
    folder.append_row(metrics(3))
    assert folder.metrics_path.read_bytes() == whole


def test_what_another_version_wrote_in_rows_is_passed_over(tmp_path: Path) -> None:
    folder = RunFolder(Storage.open(tmp_path), tmp_path)
    folder.metrics_path.write_text(json.dumps(metrics(1).to_dict() | {"shared": True}) + "\n")
    assert folder.rows() == [metrics(1)]


@pytest.mark.parametrize(
    ("damaged", "warning"),
    [
        (("checkpoint.pt",), "the one before is used"),
        (("checkpoint.pt", "checkpoint.previous.pt"), "the run begins anew"),
        (("metrics.jsonl",), "is damaged after 0 rows"),
    ],
    ids=["newest", "both", "rows"],
)
def test_a_run_with_a_damaged_file_ends_as_if_it_were_whole(
    damaged: tuple[str, ...],
    warning: str,
    run: RunConfig,
    interrupted: Storage,
    undisturbed: dict[str, Any],
    tmp_path: Path,
    compute: Compute,
    caplog: pytest.LogCaptureFixture,
) -> None:
    storage = copy_of(interrupted, tmp_path)
    folder = run_folder(run, storage)
    for name in damaged:
        content = (folder.path / name).read_bytes()
        (folder.path / name).write_bytes(content[20:])
    seen: list[int] = []
    with caplog.at_level(logging.WARNING):
        execute(run, storage, compute, lambda row: seen.append(row.epoch))
    assert warning in caplog.text
    assert list(dict.fromkeys(seen)) == [1, 2, 3, 4, 5, 6]
    assert are_equal(outcome(folder), undisturbed)
    assert not list(folder.path.glob("checkpoint*"))


def test_checkpoints_hold_what_continuing_needs_and_no_teacher(run: RunConfig, interrupted: Storage) -> None:
    folder = run_folder(run, interrupted)
    newest, previous = (load_tensors(folder.path / name) for name in ("checkpoint.pt", "checkpoint.previous.pt"))
    assert [len(state["rows"]) for state in (newest, previous)] == [4, 3]
    assert newest["rows"][:3] == [row.to_dict() for row in folder.rows()[:3]]
    assert newest["rows"][3]["best_val_accuracy"] >= newest["rows"][3]["val_accuracy"]
    assert set(newest) == {"rows", "student", "terms", "optimizer"}
    teacher = load_tensors(teacher_folder(run, interrupted).path / "model.pt")["weights"]
    size = sum(each.numel() for each in teacher.values())
    assert (folder.path / "checkpoint.pt").stat().st_size < 4 * size  # a float32 each


def test_a_checkpoint_every_few_epochs_costs_epochs_but_no_numbers(
    run: RunConfig, undisturbed: dict[str, Any], interrupted: Storage, tmp_path: Path, compute: Compute
) -> None:
    rare = run.with_overrides({"checkpoint_every": 3})
    storage = Storage.open(tmp_path)
    assert run_folder(rare, storage).path.name == run_folder(run, storage).path.name
    shutil.copytree(interrupted.root / "teachers", tmp_path / "teachers")

    def stop(row: EpochMetrics) -> None:
        if row.epoch == 4:
            raise Stopped

    with pytest.raises(Stopped):
        execute(rare, storage, compute, stop)
    folder = run_folder(rare, storage)
    assert len(load_tensors(folder.path / "checkpoint.pt")["rows"]) == 2  # the end of stage embedding
    assert len(folder.rows()) == 4
    seen: list[int] = []
    execute(rare, storage, compute, lambda row: seen.append(row.epoch))
    assert seen == [1, 2, 3, 4, 5, 6]
    assert are_equal(outcome(folder), undisturbed)


@pytest.mark.parametrize("name", ["result.json", "model.pt", "metrics.jsonl"])
def test_a_finished_run_with_a_damaged_file_is_done_again(
    name: str,
    run: RunConfig,
    undisturbed: dict[str, Any],
    interrupted: Storage,
    tmp_path: Path,
    compute: Compute,
    caplog: pytest.LogCaptureFixture,
) -> None:
    storage = copy_of(interrupted, tmp_path)
    execute(run, storage, compute)
    folder = run_folder(run, storage)
    path = folder.path / name
    path.write_bytes(path.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING):
        assert folder.result() is None
        execute(run, storage, compute)
    assert "is done again" in caplog.text
    assert folder.result() is not None
    assert are_equal(outcome(folder), undisturbed)


def test_a_damaged_teacher_prototypes_and_test_are_made_again(
    run: RunConfig, interrupted: Storage, tmp_path: Path, compute: Compute, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run.with_overrides({"val_fraction": 0.0, "epochs": (1, 1), "teacher_epochs": 1})
    storage = Storage.open(tmp_path)
    value = refit(whole, storage, compute)
    folder = run_folder(whole, storage)
    expected = outcome(folder)
    (prototypes,) = (tmp_path / "cache" / PROTOTYPES.name).glob("*/prototypes.pt")
    for path in (teacher_folder(whole, storage).path / "model.pt", prototypes, folder.path / "test.json"):
        path.write_bytes(path.read_bytes()[:-20])
    (folder.path / "result.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert refit(whole, storage, compute) == value
    assert are_equal(outcome(folder), expected)
    for part in ("prototypes", "a test accuracy", "The run is done again"):
        assert part in caplog.text


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from refilled.command import exit_code
from refilled.training.compute import Compute
from refilled.config import RunConfig
from refilled.execution import execute
from refilled.storage import Storage
import json

def main():
    storage = Storage.open(sys.argv[2])
    execute(RunConfig.from_dict(json.loads(sys.argv[1])), storage, Compute(torch.device("cpu"), "float32"))
    return 0

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
sys.exit(exit_code("train", main))
"""


def test_no_room_is_one_sentence_and_the_run_goes_on_when_there_is(
    run: RunConfig, interrupted: Storage, undisturbed: dict[str, Any], tmp_path: Path, compute: Compute
) -> None:
    """The kernel refuses to write more than some bytes to a file, as it does where a disk is full."""
    storage = copy_of(interrupted, tmp_path)
    folder = run_folder(run, storage)
    before = {path.name: path.read_bytes() for path in folder.path.glob("checkpoint*")}
    limit = len(before["checkpoint.pt"]) // 2
    done = subprocess.run(
        [sys.executable, "-c", FULL, json.dumps(run.to_dict()), str(tmp_path), str(limit)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "is full: free some space and start the same command again" in done.stderr
    assert before["checkpoint.pt"] in [path.read_bytes() for path in folder.path.glob("checkpoint*")]
    assert not list(folder.path.glob(".*.tmp"))
    execute(run, storage, compute)
    assert are_equal(outcome(folder), undisturbed)


SMALL_FILES = """
import resource, signal, sys
from pathlib import Path
import pytest, torch
from refilled.errors import StorageFullError
from refilled.storage import Storage
from refilled.storage.tensor_file import tensor_bytes

folder = Path(sys.argv[1])
storage = Storage.open(folder)
path = folder / "file"
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
storage.write(path, b"a" * 4000)
with pytest.raises(StorageFullError, match="is full"):
    storage.write(path, b"b" * 5000)
with pytest.raises(StorageFullError, match="is full"):
    storage.append(path, b"b" * 100)
assert path.read_bytes() == b"a" * 4000
assert [each.name for each in folder.iterdir()] == ["file"]
with pytest.raises(StorageFullError):
    storage.write(path, tensor_bytes({"weights": torch.zeros(10_000)}))
"""


def test_writing_without_room_changes_nothing(tmp_path: Path) -> None:
    """In a process of its own: the limit also holds for a file that this one's output may go to."""
    done = subprocess.run(
        [sys.executable, "-c", SMALL_FILES, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_full_disk_is_known_wherever_it_was_met() -> None:
    import errno
    import sqlite3

    def raised(cause: Exception) -> Exception:
        error = RuntimeError("a library's own")
        error.__cause__ = cause
        return error

    assert storage_full(raised(OSError(errno.ENOSPC, "No space left on device", "/data/x"))) is not None
    assert "/data/x" in str(storage_full(raised(OSError(errno.ENOSPC, "No space left on device", "/data/x"))))
    assert storage_full(raised(OSError(errno.EACCES, "Permission denied"))) is None
    database = sqlite3.connect(":memory:")
    database.execute("PRAGMA max_page_count = 1")
    with pytest.raises(sqlite3.OperationalError) as full:
        database.execute("CREATE TABLE numbers (number)")
    database.close()
    assert storage_full(raised(full.value)) is not None
