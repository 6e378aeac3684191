"""Step, epoch, stage, run: one loop for students and teachers, on any number of workers.

The loop knows nothing of what carries it. A `Carrier` keeps its state at epoch borders and takes its rows: a folder
alone, or a folder that also passes the rows on to Ray Tune or Ray Train (in `tune/`).

All that is random is a function of (seed, epoch, image), and all that looks at a batch looks at the global batch, so a
run's numbers depend on its configuration, data and seed, not on the workers or on interruptions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from refilled import distributed
from refilled.config import RunConfig
from refilled.data.batches import Batch, epoch_batches, num_batches
from refilled.data.views import Views
from refilled.errors import UserError
from refilled.keyed import derive_seed, keyed_uint64
from refilled.methods import Stage, classifier_loss, embedding_loss, needs_teacher, stages_of
from refilled.models import Model, Output, build_model, parameters_of_embedding
from refilled.shared_stage import SharedStage
from refilled.storage.run_folder import Row
from refilled.tasks.classification import Task
from refilled.teacher import FrozenTeacher, model_state
from refilled.training.carrier import Carrier
from refilled.training.compute import Compute
from refilled.training.evaluation import accuracy, class_means, nearest_mean_accuracy
from refilled.training.optim import build_optimizer, learning_rate, set_learning_rate


@dataclass
class _Learner:
    """What a step works on."""

    config: RunConfig
    task: Task
    teacher: FrozenTeacher | None
    compute: Compute
    student: Model
    trained: Callable[..., Output]  # the student as the steps run it: itself, or compiled
    views: Views
    images: Tensor  # uint8 [N, C, H, W], the whole training set on the device


def run(
    config: RunConfig,
    task: Task,
    teacher: FrozenTeacher | None,
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
        the global batch's loss), `images_per_second`, `epoch_s`, `finished`, and with validation images `val_accuracy`
        (in stage embedding that of the nearest class mean), `best_val_accuracy` and `best_epoch` (over the epochs of
        stage classifier so far).

    Raises:
        FloatingPointError: when the loss is no longer finite.
    """
    _check(config, task, teacher)
    learner = _make_learner(config, task, teacher, compute)
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
        optimizer = build_optimizer(_parameters(learner.student, stage), config.optimizer)
        first = max(0, row.get("epoch", 0) - epochs_before)
        if state is not None and 0 < first < stage.num_epochs:
            optimizer.load_state_dict(state["optimizer"])
        for epoch in range(first, stage.num_epochs):
            row = _epoch(learner, stage, optimizer, epochs_before + epoch, epoch, previous=row)
            rows.append(row)
            if (epoch + 1) % config.checkpoint_every == 0 or epoch + 1 == stage.num_epochs:
                carrier.save(
                    {"rows": rows, "student": learner.student.state_dict(), "optimizer": optimizer.state_dict()},
                )
            carrier.report(row)
        epochs_before += stage.num_epochs
        if shared is not None and stage.name == "embedding" and row["epoch"] == epochs_before:  # not a state beyond it
            shared.keep(learner.student)
    carrier.finish(row, model_state(config, task, learner.student))
    return row


def _take_over(learner: _Learner, shared: SharedStage, carrier: Carrier) -> list[Row]:
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


def _check(config: RunConfig, task: Task, teacher: FrozenTeacher | None) -> None:
    if config.method == "kd" and task.spaces.teacher != task.spaces.student:
        raise UserError(
            f"method kd needs a teacher with exactly the student's classes (Eq. 2), got {len(task.spaces.teacher)} "
            f"teacher and {len(task.spaces.student)} student classes that differ."
        )
    assert teacher is not None or not needs_teacher(config), "the caller loads the teacher of a method that needs one"


def _make_learner(config: RunConfig, task: Task, teacher: FrozenTeacher | None, compute: Compute) -> _Learner:
    channels, height, _ = task.train.images.shape[1:]
    student = build_model(
        config.student,
        num_classes=len(task.spaces.student),
        in_channels=channels,
        image_size=height,
        dropout=config.optimizer.dropout,
        seed=derive_seed(config.seed, "weights"),
    )
    if distributed.world_size() > 1:
        distributed.convert_batch_norm(student)
    student = compute.place_model(student)
    return _Learner(
        config=config,
        task=task,
        teacher=teacher,
        compute=compute,
        student=student,
        trained=torch.compile(student) if config.compile else student,
        views=Views(config.views),
        images=task.train.images.to(compute.device, memory_format=torch.channels_last),  # as views are rendered
    )


def _parameters(student: Model, stage: Stage) -> list[nn.Parameter]:
    """What a stage optimises: the embedding alone in stage `embedding` (Eq. 5), everything in stage `classifier`."""
    return parameters_of_embedding(student) if stage.name == "embedding" else list(student.parameters())


def _epoch(
    learner: _Learner, stage: Stage, optimizer: torch.optim.Optimizer, epoch: int, epoch_of_stage: int, previous: Row
) -> Row:
    """Train one epoch, validate, and say how it went. `epoch` counts over stages, `epoch_of_stage` within; 0-based."""
    config, started_s = learner.config, time.perf_counter()
    labels = learner.task.train.labels
    steps = num_batches(len(labels), config.global_batch_size)
    loss_sum, norm_sum, norm_max = torch.zeros(3, dtype=torch.float64, device=learner.compute.device)
    learner.student.train()
    rate = 0.0
    for step, batch in enumerate(
        epoch_batches(
            labels,
            global_batch_size=config.global_batch_size,
            seed=config.seed,
            epoch=epoch,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
    ):
        rate = learning_rate(stage.schedule, (epoch_of_stage * steps + step) / (stage.num_epochs * steps))
        set_learning_rate(optimizer, rate)
        loss, norm = _step(learner, stage, optimizer, batch, epoch)
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
    row["finished"] = epoch + 1 == sum(each.num_epochs for each in stages_of(config))
    return row


def _step(
    learner: _Learner, stage: Stage, optimizer: torch.optim.Optimizer, batch: Batch, epoch: int
) -> tuple[Tensor, Tensor]:
    """One update by one global batch; returns its loss, detached, and the norm of its gradients; nothing waits."""
    config, compute = learner.config, learner.compute
    share = batch.share.to(compute.device, non_blocking=True)
    view_ids = learner.views.draw(share, seed=config.seed, epoch=epoch)
    images = compute.place_images(learner.views.render(learner.images[share], view_ids), learner.task.normalization)
    keys = keyed_uint64(derive_seed(config.seed, "dropout"), epoch, share) if config.optimizer.dropout else None
    output = compute.forward(learner.trained, images, keys)
    labels = batch.labels.to(compute.device, non_blocking=True)
    signal = None
    if learner.teacher is not None and needs_teacher(config, stage.name):
        said = learner.teacher.embed(images, share, view_ids)
        signal = learner.teacher.signal(distributed.gather_rows(said, batch.counts))
    if stage.name == "embedding":
        assert signal is not None
        embedding = distributed.gather_rows(output.embedding, batch.counts)
        loss = embedding_loss(config.embedding, embedding, signal.embedding, labels, batch.largest_class)
    else:
        logits = distributed.gather_rows(output.logits, batch.counts)
        classes = batch.classes.to(compute.device, non_blocking=True)
        loss = classifier_loss(config, logits, labels, classes, signal)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    distributed.sum_gradients(learner.student.parameters())
    gradients = [each.grad for each in learner.student.parameters() if each.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    optimizer.step()
    return loss.detach(), norm


def _validate(learner: _Learner, stage: Stage, epoch: int, previous: Row) -> Row:
    """Validation accuracy after an epoch, and the best of stage `classifier` so far."""
    validation = learner.task.validation
    if validation is None:
        return {}
    student, normalization, compute = learner.student, learner.task.normalization, learner.compute
    if stage.name == "embedding":
        count = learner.config.ncm_images_per_class
        means = class_means(student, learner.task.train, normalization, compute, images_per_class=count)
        return {"val_accuracy": nearest_mean_accuracy(student, validation, means, normalization, compute)}
    value = accuracy(student, validation, normalization, compute)
    best, best_epoch = previous.get("best_val_accuracy", -1.0), previous.get("best_epoch", 0)
    if value > best:
        best, best_epoch = value, epoch + 1
    return {"val_accuracy": value, "best_val_accuracy": best, "best_epoch": best_epoch}
