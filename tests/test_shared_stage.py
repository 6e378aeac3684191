from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gloo_workers import run_workers
from PIL import Image

from refilled.config import RunConfig
from refilled.execution import cache_of, execute, refit, run_folder
from refilled.identity import determines_first_stage, stage_key
from refilled.models import build_model
from refilled.presets import smoke
from refilled.shared_stage import SharedStage, embeddings_of
from refilled.storage.run_folder import RunFolder
from refilled.storage.store import only_here, write_json
from refilled.storage.tensor_file import load_tensors
from refilled.tasks.classification import load_task
from refilled.training.compute import Compute

NOT_TRAINED_ALIKE = ("images_per_second", "epoch_s", "shared")
OTHER = {
    "method": "refilled_minus",
    "epochs": (2, 3),
    "classifier.temperature": 3.0,
    "classifier.schedule.kind": "step",
}
"""What makes another run of the same embedding stage."""

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def first() -> RunConfig:
    return dataclasses.replace(smoke().run, overlap=0.4, epochs=(2, 2), teacher_epochs=2)


@pytest.fixture(scope="module")
def other(first: RunConfig) -> RunConfig:
    return first.with_overrides(OTHER)


def cpu(run: RunConfig) -> Compute:
    return Compute(torch.device("cpu"), run.precision)


def key_of(run: RunConfig, storage: Path) -> str:
    task = load_task(run, cache_of(storage))
    return stage_key(run, task.spaces, task.data_digest)


def share(run: RunConfig, storage: Path, on_report: Callable[[dict[str, Any]], None] | None = None) -> Rows:
    """Do a run that shares; returns what it reports."""
    seen: Rows = []

    def report(row: dict[str, Any]) -> None:
        seen.append(row)
        if on_report is not None:
            on_report(row)

    execute(run, storage, cpu(run), report, share_embeddings=True)
    return seen


def stage_files(storage: Path) -> list[Path]:
    return sorted(each for each in embeddings_of(storage).glob("*/*"))


def were_shared(rows: Rows) -> list[int]:
    return [row["epoch"] for row in rows if row.get("shared") is True]


def assert_same_run(run: RunConfig, storage: Path, reference: Path) -> None:
    """Same rows but for times and the mark, and the same model to the last bit."""
    if not run_folder(run, reference).path.exists():
        execute(run, reference, cpu(run))
    found, expected = (
        [{name: value for name, value in row.items() if name not in NOT_TRAINED_ALIKE} for row in folder.rows()]
        for folder in (run_folder(run, storage), run_folder(run, reference))
    )
    assert found == expected
    models = [(run_folder(run, where).path / "model.pt").read_bytes() for where in (storage, reference)]
    assert models[0] == models[1]


class Interruption(BaseException):
    pass


def interrupt_after(epoch: int) -> Callable[[dict[str, Any]], None]:
    def interrupt(row: dict[str, Any]) -> None:
        if row["epoch"] == epoch:
            raise Interruption

    return interrupt


# ---- runs that go on from a shared stage ----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_run_goes_on_from_anothers_stage_as_if_it_had_trained_it(
    precision: Any, first: RunConfig, other: RunConfig, storage: Path, tmp_path: Path
) -> None:
    first, other = (dataclasses.replace(run, precision=precision) for run in (first, other))
    trained = share(first, tmp_path)
    assert were_shared(trained) == []
    (folder,) = {path.parent.name for path in stage_files(tmp_path)}
    assert folder == key_of(first, tmp_path) == key_of(other, tmp_path)
    seen = share(other, tmp_path)
    assert [row["epoch"] for row in seen] == [1, 2, 3, 4, 5]
    assert were_shared(seen) == [1, 2]
    assert seen == run_folder(other, tmp_path).rows()
    assert [row | {"shared": True} for row in trained[:2]] == seen[:2]  # with its times: nothing was trained again
    assert_same_run(first, tmp_path, storage)
    assert_same_run(other, tmp_path, storage)


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4])
def test_run_that_shares_and_is_killed_ends_as_if_it_had_not_been(
    stop_after: int, first: RunConfig, other: RunConfig, storage: Path, tmp_path: Path
) -> None:
    share(first, tmp_path)
    kept = [path.read_bytes() for path in stage_files(tmp_path)]
    with pytest.raises(Interruption):
        share(other, tmp_path, interrupt_after(stop_after))
    seen = share(other, tmp_path)
    assert seen == run_folder(other, tmp_path).rows()
    assert were_shared(seen) == [1, 2]
    assert [path.read_bytes() for path in stage_files(tmp_path)] == kept
    assert_same_run(other, tmp_path, storage)


@pytest.mark.parametrize("stop_after", [1, 2])
def test_run_that_is_killed_before_its_stage_is_kept_keeps_it_when_it_goes_on(
    stop_after: int, first: RunConfig, other: RunConfig, storage: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interruption):
        share(first, tmp_path, interrupt_after(stop_after))
    assert stage_files(tmp_path) == []
    assert were_shared(share(first, tmp_path)) == []
    assert were_shared(share(other, tmp_path)) == [1, 2]
    assert_same_run(other, tmp_path, storage)


def test_run_beyond_its_stage_does_not_keep_its_student_as_the_stages(first: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(Interruption):
        execute(first, tmp_path, cpu(first), interrupt_after(3))
    assert were_shared(share(first, tmp_path)) == []
    assert stage_files(tmp_path) == []


def test_nothing_is_shared_unasked(first: RunConfig, other: RunConfig, tmp_path: Path) -> None:
    execute(first, tmp_path, cpu(first))
    assert not embeddings_of(tmp_path).exists()
    share(first.with_overrides({"classifier.weight": 2.0}), tmp_path)
    assert len(stage_files(tmp_path)) == 2
    execute(other, tmp_path, cpu(other))
    assert were_shared(run_folder(other, tmp_path).rows()) == []


def test_refits_and_methods_without_the_stage_share_nothing(first: RunConfig, tmp_path: Path) -> None:
    final = dataclasses.replace(first, val_fraction=0.0)
    refit(final, tmp_path, cpu(final))
    assert "share_embeddings" not in inspect.signature(refit).parameters
    assert key_of(final, tmp_path) != key_of(first, tmp_path)
    for method in ("student", "refilled_lkd"):
        without = first.with_overrides({"method": method, "epochs": (2, 1)})
        share(without, tmp_path)
        with pytest.raises(ValueError, match=f"method {method} has 1 stages"):
            key_of(without, tmp_path)
    assert not embeddings_of(tmp_path).exists()


# ---- files ----------------------------------------------------------------------------------------------------------


def _flip(path: Path, position: int, mask: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= mask
    path.write_bytes(bytes(content))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "half of the weights": lambda path: _cut(path / "stage.pt"),
    "a bit of a weight": lambda path: _flip(path / "stage.pt", 5000),
    "half of the rows": lambda path: _cut(path / "stage.json"),
    "a digit of a row": lambda path: _replace(path / "stage.json", '"train_loss": 0.', '"train_loss": 1.'),
    "no dictionary": lambda path: write_json(path / "stage.json", [1, 2]),
    "no text": lambda path: _flip(path / "stage.json", 0, mask=0x80),
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_stage_is_trained_and_replaced(
    damage: str, first: RunConfig, other: RunConfig, storage: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    share(first, tmp_path)
    whole = {path.name: path.read_bytes() for path in stage_files(tmp_path)}
    DAMAGES[damage](stage_files(tmp_path)[0].parent)
    assert were_shared(share(other, tmp_path)) == []
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith(
        "must hold a whole embedding stage of this student, but does not. Stage embedding is trained."
    )
    assert_same_run(other, tmp_path, storage)
    replaced = {path.name: path.read_bytes() for path in stage_files(tmp_path)}
    assert replaced["stage.pt"] == whole["stage.pt"]  # who trains it does not matter
    assert json.loads(replaced["stage.json"])["run"] == run_folder(other, tmp_path).path.name
    third = first.with_overrides({"classifier.weight": 2.0, "epochs": (2, 1)})
    assert were_shared(share(third, tmp_path)) == [1, 2]


def test_stage_without_one_of_its_files_is_not_there(
    first: RunConfig, other: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    share(first, tmp_path)
    about, weights = stage_files(tmp_path)
    for missing in (about, weights):
        missing.unlink()
        run = other.with_overrides({"classifier.weight": 2.0 if missing == about else 3.0, "epochs": (2, 1)})
        assert were_shared(share(run, tmp_path)) == []
        assert stage_files(tmp_path) == [about, weights]
    assert caplog.records == []


def test_stage_of_other_teacher_student_or_length_is_not_taken(
    first: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    share(first, tmp_path)
    stage = _stage(first, tmp_path)
    student = _student()
    found = stage.load(student)
    assert found is not None
    assert found.student.keys() == student.state_dict().keys()
    assert [row["epoch"] for row in found.rows] == [1, 2]
    assert caplog.records == []
    assert dataclasses.replace(stage, teacher="another").load(student) is None
    assert "must come from the teacher in the same storage" in caplog.records[-1].getMessage()
    for none in (
        dataclasses.replace(stage, num_epochs=3).load(student),
        stage.load(_student("convnet-16")),
        stage.load(student.double()),
    ):
        assert none is None
        assert "must hold a whole embedding stage of this student" in caplog.records.pop().getMessage()


def _stage(run: RunConfig, storage: Path) -> SharedStage:
    path = embeddings_of(storage) / key_of(run, storage)
    teacher = json.loads((path / "stage.json").read_text())["teacher"]
    return SharedStage(path, run.epochs[0], teacher, RunFolder(run_folder(run, storage).path), torch.device("cpu"))


def _student(name: str = "convnet-8") -> torch.nn.Module:
    return build_model(name, num_classes=5, in_channels=1, image_size=8, seed=0)


def test_rows_that_were_taken_over_are_kept_as_trained_and_missing_ones_prevent_it(
    first: RunConfig, other: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    share(first, tmp_path)
    expected = json.loads(stage_files(tmp_path)[0].read_text())
    share(other, tmp_path)
    stage = _stage(other, tmp_path)
    stage.keep(_student())
    assert json.loads((stage.path / "stage.json").read_text()) == expected  # whole, so it stays as it is
    shutil.rmtree(stage.path)
    stage.keep(_student())
    kept = json.loads((stage.path / "stage.json").read_text())
    assert kept["rows"] == expected["rows"]
    shutil.rmtree(stage.path)
    stage.run.metrics_path.write_text(stage.run.metrics_path.read_text().partition("\n")[2])
    stage.keep(_student())
    assert not stage.path.exists()
    assert "must hold every row of stage embedding" in caplog.text


def test_run_waits_for_nobody_and_ends_where_the_stage_cannot_be_kept(
    first: RunConfig, storage: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = key_of(first, tmp_path)
    with only_here(embeddings_of(tmp_path) / key):
        assert share(first, tmp_path)[-1]["finished"]
    assert stage_files(tmp_path) == []
    assert caplog.records == []
    again = first.with_overrides({"classifier.weight": 2.0})
    (embeddings_of(tmp_path) / key).touch()  # no folder can be made there
    assert share(again, tmp_path)[-1]["finished"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2  # read, written
    assert f"Stage embedding {key} cannot be kept (File exists)." in caplog.text
    assert_same_run(again, tmp_path, storage)


# ---- what determines the stage --------------------------------------------------------------------------------------

# Another value of every setting. The second tuple element says whether it may make another stage.
SETTINGS: dict[str, tuple[Any, bool]] = {
    "data": ("imagefolder:", True),
    "image_size": (12, True),
    "class_order": ("", True),
    "num_teacher_classes": (4, True),
    "num_student_classes": (10, True),
    "overlap": (1.0, True),
    "val_fraction": (0.3, True),
    "split_seed": (1, True),
    "teacher": ("convnet-16", True),
    "student": ("convnet-4", True),
    "method": ("rkd", True),
    "epochs": ((3, 1), True),
    "teacher_epochs": (3, True),
    "global_batch_size": (32, True),
    "seed": (1, True),
    "precision": ("bfloat16", True),
    "compile": (True, True),
    "checkpoint_every": (3, False),
    "ncm_images_per_class": (7, True),
    "embedding.temperature": (1.0, True),
    "embedding.student_temperature": (1.0, True),
    "embedding.max_negatives": (5, True),
    "embedding.margin": (0.2, True),
    "embedding.tuples": ("batch_minimum", True),
    "embedding.weight": (5.0, True),
    **{
        f"embedding.schedule.{name}": (value, True)
        for name, value in {
            "kind": "one_cycle",
            "learning_rate": 0.05,
            "decay": 0.5,
            "milestones": (0.3,),
            "final_fraction": 0.5,
            "peak_at": 0.5,
        }.items()
    },
    "classifier.distill_weight": (3.0, False),
    "classifier.temperature": (3.0, False),
    "classifier.student_temperature": (3.0, False),
    "classifier.posterior": ("cosine_share", False),
    "classifier.instance_weight": ("own_head", False),
    "classifier.weight": (3.0, False),
    "classifier.schedule.kind": ("one_cycle", False),
    "classifier.schedule.learning_rate": (0.3, False),
    "classifier.schedule.decay": (0.5, False),
    "classifier.schedule.milestones": ((0.3,), False),
    "classifier.schedule.final_fraction": (0.5, False),
    "classifier.schedule.peak_at": (0.5, False),
    "optimizer.momentum": (0.8, True),
    "optimizer.nesterov": (False, True),
    "optimizer.weight_decay": (1e-3, True),
    "optimizer.dropout": (0.3, True),
    "views.kind": ("resized_crops", True),
    "views.padding": (2, True),
    "views.min_area": (0.5, True),
    "views.flip": (True, True),
    "views.num_views": (4, True),
    "pretraining.global_batch_size": (32, True),
    "pretraining.seed": (1, True),
    **{
        f"pretraining.{name}": (value, True)
        for name, value in {
            "optimizer.momentum": 0.8,
            "optimizer.nesterov": False,
            "optimizer.weight_decay": 1e-3,
            "optimizer.dropout": 0.3,
            "schedule.kind": "one_cycle",
            "schedule.learning_rate": 0.05,
            "schedule.decay": 0.5,
            "schedule.milestones": (0.3,),
            "schedule.final_fraction": 0.5,
            "schedule.peak_at": 0.5,
        }.items()
    },
    "bank.mode": ("live", False),
    "bank.dtype": ("float32", True),
    "bank.max_gib": (1.0, False),
}


@pytest.fixture
def base(first: RunConfig) -> RunConfig:
    return first.with_overrides({"bank.mode": "bank", "epochs": (2, 1)})


def test_every_setting_is_classified(base: RunConfig) -> None:
    assert list(SETTINGS) == list(base.flat())
    assert {name: determines_first_stage(name, base) for name in SETTINGS} == {
        name: SETTINGS[name][1] for name in SETTINGS
    }


@pytest.mark.parametrize("name", [name for name, (_, determines) in SETTINGS.items() if determines])
def test_setting_that_may_make_another_stage_is_in_its_key(
    name: str, base: RunConfig, storage: Path, tmp_path: Path
) -> None:
    value = SETTINGS[name][0]
    if name == "data":
        for label in base_classes():
            (tmp_path / "train" / label).mkdir(parents=True)
            for shade in range(3):
                Image.new("L", (8, 8), int(label) * 20 + shade).save(tmp_path / "train" / label / f"{shade}.png")
        value = f"imagefolder:{tmp_path}"
    if name == "class_order":
        value = str(tmp_path / "reversed.txt")
        Path(value).write_text("\n".join(reversed(base_classes())))
    if name == "num_student_classes":
        base = base.with_overrides({"overlap": 0.5, name: 4})
        value = 2
    assert key_of(base.with_overrides({name: value}), storage) != key_of(base, storage)


def base_classes() -> list[str]:
    return [str(digit) for digit in range(10)]


NOT_DETERMINING = [
    *({name: value} for name, (value, determines) in SETTINGS.items() if not determines),
    *({"method": method} for method in ("refilled_emb", "refilled_minus", "comparison>cross_entropy+lkd")),
    {"epochs": (2, 9)},
]


def _trained_stage(run: RunConfig, storage: Path) -> tuple[Rows, dict[str, torch.Tensor]]:
    """Train stage embedding alone, in a folder that is then thrown away: some settings are in no run's key."""
    folder = run_folder(run, storage)
    with pytest.raises(Interruption):
        execute(run, storage, cpu(run), interrupt_after(2))
    rows = [{k: v for k, v in row.items() if k not in NOT_TRAINED_ALIKE} for row in folder.rows()]
    student = load_tensors(folder.path / "checkpoint.pt")["student"]
    shutil.rmtree(folder.path)
    return rows, student


def test_setting_that_is_not_in_the_key_makes_no_other_stage(base: RunConfig, storage: Path) -> None:
    """Rows and weights of real runs, to the last bit, for every other value."""
    rows, student = _trained_stage(base, storage)
    for changes in NOT_DETERMINING:
        changed = base.with_overrides(changes)
        assert key_of(changed, storage) == key_of(base, storage), changes
        other_rows, other_student = _trained_stage(changed, storage)
        assert other_rows == rows, changes
        assert all(torch.equal(student[name], other_student[name]) for name in student), changes
    assert _trained_stage(base.with_overrides({"embedding.temperature": 1.0}), storage)[0] != rows


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embedding.schedule.first_milestone", True),
        ("classifier.schedule.first_milestone", False),
        ("classifier", False),
        ("classifiers", True),
        ("bank", True),
        ("unheard_of", True),
    ],
)
def test_names_that_are_no_leaves(name: str, expected: bool, base: RunConfig) -> None:
    assert determines_first_stage(name, base) is expected


def test_settings_of_terms_determine_the_stage_that_reads_them(base: RunConfig) -> None:
    run = base.with_overrides({"method": "rkd>cross_entropy+vid"})
    assert determines_first_stage("terms.rkd.angle_ratio", run)
    assert not determines_first_stage("terms.vid.weight", run)
    assert not determines_first_stage("classifier.schedule.kind", run)


# ---- several processes ----------------------------------------------------------------------------------------------


def _worker_alone(me: int, config: dict[str, Any], folder: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.save(_race(me, RunConfig.from_dict(config), Path(folder) / "race"), f"{folder}/race-{me}.pt")


def _worker(me: int, folder: str, config: dict[str, Any]) -> None:
    warnings.simplefilter("error")
    storage, run = Path(folder), RunConfig.from_dict(config)
    found: dict[str, Any] = {"race": torch.load(storage / f"race-{me}.pt")}
    found |= {"first": share(run, storage), "other": share(run.with_overrides(OTHER), storage)}
    execute(run.with_overrides(OTHER), storage / "alone", cpu(run))
    stage = _stage(run, storage)
    for blind in (None, 0, 1):
        seen_by_me = dataclasses.replace(stage, path=stage.path / "nowhere" if blind == me else stage.path)
        found[f"found but by {blind}"] = seen_by_me.load(_student()) is not None
    dataclasses.replace(stage, path=storage / f"kept by {me}").keep(_student())
    dist.barrier()
    if me == 0:
        _cut(stage.weights_path)
    dist.barrier()
    found["damaged"] = share(run.with_overrides({"classifier.weight": 2.0, "epochs": (2, 1)}), storage)
    found["found again"] = stage.load(_student()) is not None
    torch.save(found, storage / f"found-{me}.pt")


def _race(me: int, run: RunConfig, storage: Path) -> Rows:
    """A run that ends stage embedding when the other process does."""

    def meet(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            (storage / f"ready-{me}").touch()
            while not (storage / f"ready-{1 - me}").exists():
                time.sleep(0.001)

    return share(run.with_overrides({"classifier.weight": 2.0 + me}), storage, meet)


@pytest.fixture(scope="module")
def workers(first: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Their storage folder, and what each of two workers found."""
    folder: Path = tmp_path_factory.mktemp("workers")
    for name in ("race", "alone"):
        (folder / name).mkdir()
    mp.spawn(_worker_alone, args=(first.to_dict(), str(folder)), nprocs=2)
    run_workers(_worker, folder, 2, first.to_dict())
    return folder, [torch.load(folder / f"found-{me}.pt", weights_only=True) for me in (0, 1)]


def test_group_of_workers_decides_alike(workers: tuple[Path, list[dict[str, Any]]], other: RunConfig) -> None:
    folder, results = workers
    for found in results:
        assert were_shared(found["first"]) == were_shared(found["damaged"]) == []
        assert were_shared(found["other"]) == [1, 2]
        assert [row["epoch"] for row in found["other"]] == [1, 2, 3, 4, 5]
        assert found["found but by None"]
        assert not found["found but by 0"]
        assert not found["found but by 1"]
        assert found["found again"]
    assert [(folder / f"kept by {me}").exists() for me in (0, 1)] == [True, False]
    assert_same_run(other, folder, folder / "alone")


def test_two_that_end_the_stage_at_once_leave_one_whole(
    workers: tuple[Path, list[dict[str, Any]]], other: RunConfig, storage: Path
) -> None:
    folder, results = workers
    assert [were_shared(found["race"]) for found in results] == [[], []]
    assert [path.name for path in stage_files(folder / "race")] == ["stage.json", "stage.pt"]
    assert were_shared(share(other, folder / "race")) == [1, 2]
    assert_same_run(other, folder / "race", storage)
