"""Step, epoch, stage, run: one loop for students and teachers, on any number of workers.

The loop knows nothing of Ray: a run's folder keeps its state at epoch borders and its rows, and whoever wants the rows
as they come is called. Nor does it know a method: it asks the terms of a stage.

All that is random is a function of (seed, epoch, image), and all that looks at a batch looks at the global batch, so a
run's numbers depend on its configuration, data and seed, not on the workers or on interruptions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from refilled import distributed
from refilled.brought import start_from_weights
from refilled.config import RunConfig
from refilled.data.batches import Batch, epoch_batches, num_batches
from refilled.data.pixels import StoredPixels
from refilled.keyed import derive_seed
from refilled.metrics import EpochMetrics, Report
from refilled.stages import Stage, check, check_classes, needs_teacher, num_epochs_of, stages_of
from refilled.storage.run_folder import RunFolder
from refilled.tasks.classification import Task
from refilled.training.compute import Compute
from refilled.training.evaluation import accuracy, class_means, nearest_mean_accuracy
from refilled.training.learner import (
    Learner,
    LoadedTeacher,
    begin_stage,
    make_learner,
    optimizer_of,
    state_of,
    state_of_student,
)
from refilled.training.optim import learning_rate, set_learning_rate
from refilled.training.step import step


def run(
    config: RunConfig,
    task: Task,
    teacher: LoadedTeacher | None,
    folder: RunFolder,
    compute: Compute,
    on_report: Report | None = None,
) -> EpochMetrics:
    """Train a student through all stages of its method, from wherever the folder's state says.

    Args:
        config: The run's configuration.
        task: Its images and classes.
        teacher: Frozen; none for methods that need none.
        folder: Keeps the state, before the epoch's row, and the rows.
        compute: Device and precision.
        on_report: Takes every row, those of earlier processes too: whoever decides by rows may have died with the
            process that reported them, and must see each before the next.

    Returns:
        The last row.

    Raises:
        FloatingPointError: The loss is no longer finite.
    """
    _check(config, task, teacher)

    def report(row: EpochMetrics) -> None:
        folder.append_row(row)  # again, should the folder have lost it
        if on_report is not None:
            on_report(row)

    learner = make_learner(config, task, teacher, compute)
    state = folder.load_checkpoint()
    if config.student_weights is not None and state is None:
        start_from_weights(learner.student, config, folder.storage)
    rows: list[EpochMetrics] = []
    if state is not None:
        rows = [EpochMetrics.from_dict(each) for each in state["rows"]]
        learner.student.load_state_dict(state["student"])
        for each in rows:
            report(each)
    row = rows[-1] if rows else None
    epochs_before = 0
    for stage in stages_of(config):
        begin_stage(learner, stage)
        optimizer = optimizer_of(learner, stage)
        first = max(0, len(rows) - epochs_before)
        if state is not None and 0 < first < stage.num_epochs:
            learner.terms.load_state_dict(state["terms"])
            optimizer.load_state_dict(state["optimizer"])
        for epoch in range(first, stage.num_epochs):
            # Nothing of our own draws from torch's generator. What a network of the user's draws follows from the
            # epoch, so that a run that was interrupted goes on as if it had not been.
            torch.manual_seed(derive_seed(config.seed, "epoch", epochs_before + epoch))
            row = _epoch(learner, stage, optimizer, epochs_before + epoch, epoch, previous=row)
            rows.append(row)
            if (epoch + 1) % config.checkpoint_every == 0 or epoch + 1 == stage.num_epochs:
                folder.save_checkpoint(state_of(learner, optimizer, rows))
            report(row)
        epochs_before += stage.num_epochs
    assert row is not None, "a run has an epoch"
    folder.finish(row, state_of_student(config, task, learner.student))
    return row


def _check(config: RunConfig, task: Task, teacher: LoadedTeacher | None) -> None:
    check(config)
    check_classes(config, task.spaces)
    assert teacher is not None or not needs_teacher(config), "the caller loads the teacher of a method that needs one"


def _epoch(
    learner: Learner,
    stage: Stage,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    epoch_of_stage: int,
    previous: EpochMetrics | None,
) -> EpochMetrics:
    """Train one epoch, validate, and say how it went. `epoch` counts over stages, `epoch_of_stage` within; 0-based."""
    config, started_s = learner.config, time.perf_counter()
    labels = learner.task.train.labels
    steps = num_batches(len(labels), config.global_batch_size)
    loss_sum, norm_sum, norm_max = torch.zeros(3, dtype=torch.float64, device=learner.compute.device)
    learner.student.train()
    rate = 0.0
    batches = epoch_batches(
        labels,
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        epoch=epoch,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    for number, batch in enumerate(_with_images_ahead(learner, batches)):
        rate = learning_rate(stage.schedule, (epoch_of_stage * steps + number) / (stage.num_epochs * steps))
        set_learning_rate(optimizer, rate)
        loss, norm = step(learner, stage, optimizer, batch, epoch)
        loss_sum += loss * len(batch.image_ids)
        norm_sum += norm
        norm_max = torch.maximum(norm_max, norm.double())
    train_loss = float(loss_sum) / len(labels)
    if not torch.isfinite(loss_sum):
        raise FloatingPointError(f"The loss is {train_loss} in epoch {epoch + 1} (stage {stage.name}).")
    train_s = time.perf_counter() - started_s
    values = _validate(learner, stage, epoch, previous)
    return EpochMetrics(
        epoch=epoch + 1,
        stage=stage.name,
        train_loss=train_loss,
        learning_rate=rate,
        gradient_norm=float(norm_sum) / steps,
        gradient_norm_max=float(norm_max),
        images_per_second=len(labels) / train_s,
        epoch_s=time.perf_counter() - started_s,
        finished=epoch + 1 == num_epochs_of(config),
        val_accuracy=values.val_accuracy,
        best_val_accuracy=values.best_val_accuracy,
        best_epoch=values.best_epoch,
    )


def _with_images_ahead(learner: Learner, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches; while the caller is at one, the images of the next are gathered, if they are in a file."""
    images = learner.images
    if not isinstance(images, StoredPixels):
        yield from batches
        return
    batch = next(batches, None)
    while batch is not None:
        following = next(batches, None)
        if following is not None:
            images.expect(following.share)
        yield batch
        batch = following


class _Validation(NamedTuple):
    """Fields of `EpochMetrics`."""

    val_accuracy: float | None = None
    best_val_accuracy: float | None = None
    best_epoch: int | None = None


def _validate(learner: Learner, stage: Stage, epoch: int, previous: EpochMetrics | None) -> _Validation:
    """Validation accuracy after an epoch, and the best of stage `classifier` so far."""
    validation = learner.task.validation
    if validation is None:
        return _Validation()
    student, normalization, compute = learner.student, learner.task.normalization, learner.compute
    if stage.validates_by == "nearest_mean":
        count = learner.config.ncm_images_per_class
        means = class_means(student, learner.task.train, normalization, compute, images_per_class=count)
        return _Validation(nearest_mean_accuracy(student, validation, means, normalization, compute))
    value = accuracy(student, validation, normalization, compute)
    best = None if previous is None else previous.best_val_accuracy
    if previous is None or best is None or value > best:
        return _Validation(value, value, epoch + 1)
    return _Validation(value, best, previous.best_epoch)
