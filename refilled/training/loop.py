"""Step, epoch, stage, run: one loop for students and teachers, on any number of workers.

The loop knows nothing of what carries it. A `Carrier` keeps its state at epoch borders and takes its rows: a folder
alone, or a folder that also passes the rows on to Ray Tune or Ray Train (in `tune/`). Nor does it know a method: it
asks the terms of a stage.

All that is random is a function of (seed, epoch, image), and all that looks at a batch looks at the global batch, so a
run's numbers depend on its configuration, data and seed, not on the workers or on interruptions.
"""

from __future__ import annotations

import time

import torch

from refilled import distributed
from refilled.config import RunConfig
from refilled.data.batches import epoch_batches, num_batches
from refilled.keyed import derive_seed
from refilled.shared_stage import SharedStage
from refilled.stages import Stage, check, check_classes, needs_teacher, num_epochs_of, stages_of
from refilled.storage.run_folder import Row
from refilled.tasks.classification import Task
from refilled.training.carrier import Carrier
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
    carrier: Carrier,
    compute: Compute,
    shared: SharedStage | None = None,
) -> Row:
    """Train a student through all stages of its method, from wherever the carrier's state says.

    Args:
        config: of the run.
        task: its images and classes.
        teacher: frozen; none for methods that need none.
        carrier: keeps state and takes rows.
        compute: device and precision.
        shared: where a run without a state of its own takes a finished stage embedding from, and where one that has
            trained it keeps it; none: it trains every stage, for itself.

    Returns:
        The last row: `epoch` (1-based, over all stages), `stage`, `train_loss`, `learning_rate`, `gradient_norm` and
        `gradient_norm_max` (mean and largest, over the epoch's steps, of the l2 norm of all parameters' gradients by
        the global batch's loss, the terms' own included), `images_per_second`, `epoch_s`, `finished`, and with
        validation images `val_accuracy` (in stage embedding that of the nearest class mean), `best_val_accuracy` and
        `best_epoch` (over the epochs of stage classifier so far).

    Raises:
        FloatingPointError: when the loss is no longer finite.
    """
    _check(config, task, teacher)
    learner = make_learner(config, task, teacher, compute)
    state = carrier.load()
    rows: list[Row] = []
    if state is not None:
        rows = state["rows"]
        learner.student.load_state_dict(state["student"])
        carrier.repeat(rows)
    elif shared is not None:
        rows = _take_over(learner, shared, carrier)
    row: Row = rows[-1] if rows else {}
    epochs_before = 0
    for stage in stages_of(config):
        begin_stage(learner, stage)
        optimizer = optimizer_of(learner, stage)
        first = max(0, row.get("epoch", 0) - epochs_before)
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
                carrier.save(state_of(learner, optimizer, rows))
            carrier.report(row)
        epochs_before += stage.num_epochs
        if shared is not None and stage.name == "embedding" and row["epoch"] == epochs_before:  # not a state beyond it
            shared.keep(learner.student)
    carrier.finish(row, state_of_student(config, task, learner.student))
    return row


def _take_over(learner: Learner, shared: SharedStage, carrier: Carrier) -> list[Row]:
    """Continue from a finished stage embedding, where there is one, as if it had been trained here.

    Its rows are reported with `shared`: true. No state is saved: until stage classifier has one, the stage is found
    again.

    Returns:
        The stage's rows, none where there is no such stage.
    """
    finished = shared.load(learner.student)
    if finished is None:
        return []
    learner.student.load_state_dict(finished.student)
    rows = [row | {"shared": True} for row in finished.rows]
    for row in rows:
        carrier.report(row)
    return rows


def _check(config: RunConfig, task: Task, teacher: LoadedTeacher | None) -> None:
    check(config)
    check_classes(config, task.spaces)
    assert teacher is not None or not needs_teacher(config), "the caller loads the teacher of a method that needs one"


def _epoch(
    learner: Learner, stage: Stage, optimizer: torch.optim.Optimizer, epoch: int, epoch_of_stage: int, previous: Row
) -> Row:
    """Train one epoch, validate, and say how it went. `epoch` counts over stages, `epoch_of_stage` within; 0-based."""
    config, started_s = learner.config, time.perf_counter()
    labels = learner.task.train.labels
    steps = num_batches(len(labels), config.global_batch_size)
    loss_sum, norm_sum, norm_max = torch.zeros(3, dtype=torch.float64, device=learner.compute.device)
    learner.student.train()
    rate = 0.0
    for number, batch in enumerate(
        epoch_batches(
            labels,
            global_batch_size=config.global_batch_size,
            seed=config.seed,
            epoch=epoch,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
    ):
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
    row: Row = {
        "epoch": epoch + 1,
        "stage": stage.name,
        "train_loss": train_loss,
        "learning_rate": rate,
        "gradient_norm": float(norm_sum) / steps,
        "gradient_norm_max": float(norm_max),
        "images_per_second": len(labels) / train_s,
    }
    row |= _validate(learner, stage, epoch, previous)
    row["epoch_s"] = time.perf_counter() - started_s
    row["finished"] = epoch + 1 == num_epochs_of(config)
    return row


def _validate(learner: Learner, stage: Stage, epoch: int, previous: Row) -> Row:
    """Validation accuracy after an epoch, and the best of stage `classifier` so far."""
    validation = learner.task.validation
    if validation is None:
        return {}
    student, normalization, compute = learner.student, learner.task.normalization, learner.compute
    if stage.validates_by == "nearest_mean":
        count = learner.config.ncm_images_per_class
        means = class_means(student, learner.task.train, normalization, compute, images_per_class=count)
        return {"val_accuracy": nearest_mean_accuracy(student, validation, means, normalization, compute)}
    value = accuracy(student, validation, normalization, compute)
    best, best_epoch = previous.get("best_val_accuracy", -1.0), previous.get("best_epoch", 0)
    if value > best:
        best, best_epoch = value, epoch + 1
    return {"val_accuracy": value, "best_val_accuracy": best, "best_epoch": best_epoch}
