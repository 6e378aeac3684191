"""A run from its configuration to its folder: load, find the teacher, train, and for a refit read the test set."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refilled import distributed
from refilled.config import RunConfig
from refilled.embedding_cache.bank import bank_for
from refilled.errors import UserError
from refilled.identity import run_key, stage_key
from refilled.methods import has_embedding_stage
from refilled.shared_stage import SharedStage, embeddings_of
from refilled.stages import complete, needs_teacher
from refilled.storage import mirror
from refilled.storage.model_file import load_model
from refilled.storage.run_folder import Row, RunFolder
from refilled.storage.store import only_here, read_json, write_json
from refilled.tasks.classification import Task, load_task, load_test_images
from refilled.teacher import FrozenTeacher, pretraining_run, teacher_folder
from refilled.training.carrier import FolderCarrier
from refilled.training.compute import Compute
from refilled.training.evaluation import accuracy
from refilled.training.loop import run

_log = logging.getLogger(__name__)


def cache_of(storage: Path) -> Path:
    """Where decoded images are kept."""
    return storage / "cache"


def run_folder(config: RunConfig, storage: Path) -> RunFolder:
    """The folder of a run, whether or not it exists yet."""
    task = load_task(config, cache_of(storage))
    return RunFolder(storage / "runs" / run_key(config, task.spaces, task.data_digest))


def pretrain_once(config: RunConfig, storage: Path, compute: Compute) -> RunFolder:
    """The folder of the finished teacher, trained here unless it exists or others are at it."""
    folder = teacher_folder(config, storage)
    if distributed.agree(folder.result() is not None):
        folder.complete()
        return folder
    with only_here(folder.path):
        if not distributed.agree(folder.result() is not None):
            pretraining = pretraining_run(config)
            task = load_task(pretraining, storage / "cache")
            if distributed.rank() == 0:
                folder.create(*_about(pretraining, task))
            run(pretraining, task, None, FolderCarrier(folder), compute)
    return folder


def execute(
    config: RunConfig,
    storage: Path,
    compute: Compute,
    on_report: Callable[[Row], None] | None = None,
    *,
    num_sharing_runs: int = 1,
    share_embeddings: bool = False,
) -> Row:
    """Train, or continue, or find finished, one run on this worker or this group of workers.

    Args:
        config: of the run.
        storage: folder shared by all workers.
        compute: device and precision of this worker.
        on_report: takes every row as it comes; a run that is continued, or is finished already, passes its rows again.
        num_sharing_runs: runs, this one among them, of the same teacher and images, which would share a bank.
        share_embeddings: continue from the finished stage embedding of another run that has the same one, and leave it
            for others where it is trained here. Rows that were taken over have `shared`: true; nothing else differs.

    Returns:
        The last row (see `refilled.training.loop.run`).
    """
    task = load_task(config, cache_of(storage))
    folder = RunFolder(storage / "runs" / run_key(config, task.spaces, task.data_digest))
    carrier = FolderCarrier(folder, on_report)
    with only_here(folder.path):
        finished = folder.result()
        if distributed.agree(finished is not None):
            row: Row = finished or folder.result() or {}
            folder.complete()
            carrier.repeat(distributed.from_rank_zero(folder.rows()))
            return row
        if distributed.rank() == 0:
            folder.create(*_about(config, task))
        teacher = _teacher(config, task, storage, compute, num_sharing_runs)
        shared = _shared_stage(config, task, teacher, folder, storage, compute) if share_embeddings else None
        return run(config, task, teacher, carrier, compute, shared)


def refit(
    config: RunConfig,
    storage: Path,
    compute: Compute,
    on_report: Callable[[Row], None] | None = None,
    *,
    num_sharing_runs: int = 1,
) -> float:
    """Train on all training images, then read the test set, once for this configuration and seed (invariant 1).

    This is the only place that reads test images, and it takes only configurations that hold nothing out, which no
    search runs. The arguments are those of `execute`, but it trains every stage itself.

    Returns:
        Test accuracy of the student at the end of the run.
    """
    assert config.val_fraction == 0, "a refit trains on all training images"
    execute(config, storage, compute, on_report, num_sharing_runs=num_sharing_runs)
    folder = run_folder(config, storage)
    path = folder.path / "test.json"
    with only_here(folder.path):
        if not distributed.agree(_is_tested(path)):
            task = load_task(config, cache_of(storage))
            test = load_test_images(config, cache_of(storage), task.spaces.student)
            student = compute.place_model(load_model(folder.path / "model.pt"))
            value = accuracy(student, test, task.normalization, compute)
            if distributed.rank() == 0:
                write_json(path, {"test_accuracy": value, "num_images": len(test.labels), "test_digest": test.digest})
            distributed.agree(True)  # nobody reads the file before it is there
    return float(read_json(path)["test_accuracy"])


def _about(config: RunConfig, task: Task) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What a run's folder says the run is, its terms' defaults written out; and the student's classes."""
    about = {
        "config": complete(config).to_dict(),
        "teacher_classes": task.spaces.teacher,
        "student_classes": task.spaces.student,
        "data_digest": task.data_digest,
    }
    return about, task.spaces.student


def _is_tested(path: Path) -> bool:
    """Whether a refit's test accuracy is known; a damaged file is a warning, and the same model is tested again."""
    try:
        return mirror.fetch(path) and 0 <= float(read_json(path)["test_accuracy"]) <= 1
    except (UserError, KeyError, TypeError, ValueError) as error:
        _log.warning("%s must hold a test accuracy, but does not (%s).", path, error)
        return False


def _teacher(
    config: RunConfig, task: Task, storage: Path, compute: Compute, num_sharing_runs: int
) -> FrozenTeacher | None:
    if not needs_teacher(config):
        return None
    pretrain_once(config, storage, compute)
    teacher = FrozenTeacher.load(config, task, storage, compute)
    teacher.bank = bank_for(config, task, teacher, storage, compute, num_sharing_runs)
    return teacher


def _shared_stage(
    config: RunConfig, task: Task, teacher: FrozenTeacher | None, folder: RunFolder, storage: Path, compute: Compute
) -> SharedStage | None:
    if teacher is None or not has_embedding_stage(config.method):
        return None
    return SharedStage(
        path=embeddings_of(storage) / stage_key(config, task.spaces, task.data_digest),
        num_epochs=config.epochs[0],
        teacher=teacher.identity,
        run=folder,
        device=compute.device,
    )
