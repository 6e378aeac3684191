"""A run from its configuration to its folder: load, find the teacher, train, and for a refit read the test set."""

from __future__ import annotations

from typing import Any

from refilled import distributed
from refilled.config import RunConfig
from refilled.embedding_cache import embedding_cache
from refilled.identity import run_key
from refilled.metrics import EpochMetrics, Report
from refilled.stages import complete, needs_teacher
from refilled.storage import Storage
from refilled.storage.model_file import load_model
from refilled.storage.run_folder import RunFolder
from refilled.tasks.classification import Task, load_task, load_test_images
from refilled.teacher import FrozenTeacher, pretraining_run, teacher_folder
from refilled.training.compute import Compute
from refilled.training.evaluation import accuracy
from refilled.training.loop import run


def run_folder(config: RunConfig, storage: Storage) -> RunFolder:
    """The folder of a run, whether or not it exists yet."""
    task = load_task(config, storage)
    return RunFolder(storage, storage.root / "runs" / run_key(config, task.spaces, task.data_digest))


def pretrain_once(config: RunConfig, storage: Storage, compute: Compute) -> RunFolder:
    """The folder of the finished teacher of a configuration, trained here unless it exists or others are at it.

    The configuration must be one that pre-trains its teacher.
    """
    folder = teacher_folder(config, storage)
    _train_once(pretraining_run(config), folder, compute)
    return folder


def embed_once(config: RunConfig, storage: Storage, compute: Compute) -> None:
    """See to it that the embedding cache of a configuration is there, and its teacher; waits for others at it."""
    task = load_task(config, storage)
    _load_teacher(config, task, storage, compute, with_cache=True)


def execute(config: RunConfig, storage: Storage, compute: Compute, on_report: Report | None = None) -> EpochMetrics:
    """Train, or continue, or find finished, one run on this worker or this group of workers.

    Args:
        config: The run's configuration.
        storage: Shared by all workers.
        compute: Device and precision of this worker.
        on_report: Takes every row as it comes; a run that is continued, or is finished already, passes its rows again.

    Returns:
        The last row.
    """
    return _train_once(config, run_folder(config, storage), compute, on_report)


def _train_once(
    config: RunConfig, folder: RunFolder, compute: Compute, on_report: Report | None = None
) -> EpochMetrics:
    """Find a run finished in its folder, or train it while no other process does."""
    rows = _rows_of_finished(folder)
    if rows is None:
        with folder.storage.exclusive(folder.path):
            rows = _rows_of_finished(folder)  # whoever had the lock before may have done it
            if rows is None:
                task = load_task(config, folder.storage)
                folder.create(*_about(config, task))
                teacher = _load_teacher(config, task, folder.storage, compute)
                return run(config, task, teacher, folder, compute, on_report)
    if on_report is not None:
        for each in rows:
            on_report(each)
    return rows[-1]


def _rows_of_finished(folder: RunFolder) -> list[EpochMetrics] | None:
    """The rows of a run that is finished, as rank 0 finds it."""
    is_finished = distributed.rank() == 0 and folder.result() is not None
    if not distributed.agree(is_finished):
        return None
    folder.complete()
    return distributed.from_rank_zero(folder.rows())


def refit(config: RunConfig, storage: Storage, compute: Compute, on_report: Report | None = None) -> float:
    """Train on all training images, then read the test set, once for this configuration, seed and set (invariant 1).

    This is the only place that tests on test images, and it takes only configurations that hold nothing out, which no
    search runs. What was read from other test images than those of now is read again. The arguments are those of
    `execute`.

    Returns:
        Test accuracy of the student at the end of the run.
    """
    assert config.val_fraction == 0, "a refit trains on all training images"
    execute(config, storage, compute, on_report)
    folder = run_folder(config, storage)
    with storage.exclusive(folder.path):
        task = load_task(config, storage)
        test = load_test_images(config, storage, task.spaces.student)
        known = folder.test() if distributed.rank() == 0 else None
        if known is not None and known["test_digest"] != test.digest:
            known = None
        known = distributed.from_rank_zero(known)
        if known is None:
            storage.fetch(folder.model_path)
            student = compute.place_model(load_model(folder.model_path))
            value = accuracy(student, test, task.normalization, compute)
            known = {"test_accuracy": value, "num_images": len(test.labels), "test_digest": test.digest}
            folder.keep_test(known)
        return float(known["test_accuracy"])


def _about(config: RunConfig, task: Task) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What a run's folder says the run is, its terms' defaults written out; and the student's classes."""
    about = {
        "config": complete(config).to_dict(),
        "teacher_classes": task.spaces.teacher,
        "student_classes": task.spaces.student,
        "data_digest": task.data_digest,
    }
    return about, task.spaces.student


def _load_teacher(
    config: RunConfig, task: Task, storage: Storage, compute: Compute, *, with_cache: bool | None = None
) -> FrozenTeacher | None:
    """The teacher of a run that needs one, pre-trained here unless it is there, with its embedding cache if it has one.

    Args:
        config: The run's configuration.
        task: Its images.
        storage: Where teachers and caches are kept.
        compute: Device and precision.
        with_cache: See `embedding_cache`.
    """
    if not needs_teacher(config):
        return None
    if config.teacher_weights is None:
        pretrain_once(config, storage, compute)
    teacher = FrozenTeacher.load(config, task, storage, compute)
    teacher.cache = embedding_cache(config, task, teacher, storage, compute, is_wanted=with_cache)
    return teacher
