"""A stage's real steps, one at a time, for those who time them or try them before anything is trained."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from refilled.brought import brought_teacher
from refilled.config import RunConfig
from refilled.data.batches import epoch_batches
from refilled.data.images import ImageSet, make_image_set
from refilled.errors import UserError
from refilled.keyed import derive_seed, keyed_permutation
from refilled.methods import StageName
from refilled.metrics import EpochMetrics
from refilled.models import Model
from refilled.networks import build_network
from refilled.stages import named_by_user, needs_teacher, stages_of
from refilled.storage import Storage
from refilled.tasks.classification import Task
from refilled.teacher import FrozenTeacher, InputView
from refilled.training.compute import Compute
from refilled.training.evaluation import accuracy
from refilled.training.learner import begin_stage, make_learner, optimizer_of, state_of
from refilled.training.step import step
from refilled.user_code import blaming

NUM_REHEARSED = 64  # images of a trial step


class Steps:
    """One stage's steps, those of `refilled.training.loop`, on one batch an epoch.

    Attributes:
        student: The network, as the steps leave it.
        optimizer: Its.
    """

    def __init__(
        self, config: RunConfig, task: Task, teacher: FrozenTeacher | None, compute: Compute, name: StageName
    ) -> None:
        self._learner = make_learner(config, task, teacher, compute)
        self.student: Model = self._learner.student
        self._stage = next(stage for stage in stages_of(config) if stage.name == name)
        begin_stage(self._learner, self._stage)
        self.optimizer = optimizer_of(self._learner, self._stage)
        self.student.train()
        self._epoch = 0

    def __call__(self) -> Tensor:
        """Draw a batch and train on it; returns its loss, a scalar on the run's device."""
        config = self._learner.config
        batches = epoch_batches(
            self._learner.task.train.labels,
            global_batch_size=config.global_batch_size,
            seed=config.seed,
            epoch=self._epoch,
        )
        loss, _ = step(self._learner, self._stage, self.optimizer, next(batches), self._epoch)
        self._epoch += 1
        return loss

    def state(self, rows: list[EpochMetrics]) -> dict[str, object]:
        """What a checkpoint would hold now."""
        return state_of(self._learner, self.optimizer, rows)


def rehearse(config: RunConfig, task: Task, storage: Storage | None = None) -> None:
    """Take one step of every stage on a few images, with a teacher that is not trained, and evaluate the student.

    So what a term or a network cannot do is found before anything is trained.

    Args:
        config: The run's configuration.
        task: Its images and classes.
        storage: Has the weights of a teacher that is brought; none: it has initial ones.

    Raises:
        UserError: A step cannot be taken.
    """
    few = some_of(task, NUM_REHEARSED)
    config = dataclasses.replace(config, global_batch_size=NUM_REHEARSED, precision="float32", compile=False)
    compute = Compute(torch.device("cpu"), "float32")
    with blaming([name for _, name in named_by_user(config)]):
        teacher = untrained_teacher(config, few, compute, storage) if needs_teacher(config) else None
        for stage in stages_of(config):
            steps = Steps(config, few, teacher, compute, stage.name)
            loss = float(steps())
            if not math.isfinite(loss):
                raise UserError(
                    f"method {config.method} must have a finite loss, but before anything is trained that of stage "
                    f"{stage.name} is {loss}."
                )
            accuracy(steps.student, few.train, few.normalization, compute)


def untrained_teacher(config: RunConfig, task: Task, compute: Compute, storage: Storage | None = None) -> FrozenTeacher:
    """A teacher of the run's architecture with initial weights, which takes as long as a trained one.

    One that is brought is itself, where the storage is given, which has its weights.
    """
    if config.teacher_weights is not None and storage is not None:
        model = brought_teacher(config, task, storage)
    else:
        num_classes = max(2, len(task.spaces.teacher))
        model = build_network(config, "teacher", task, num_classes=num_classes, seed=derive_seed(0, "timing"))
    model = compute.place_model(model)
    prototypes = torch.randn(len(task.spaces.student), model.embedding_dim, generator=torch.Generator().manual_seed(0))
    prototypes = prototypes.to(compute.device, compute.dtype)
    rounding = getattr(torch, config.embedding_cache.dtype)
    return FrozenTeacher(model, prototypes, compute, rounding, "untrained", InputView(config, task, compute))


def some_of(task: Task, count: int) -> Task:
    """The same task with so many of its training images, drawn at random."""
    chosen = keyed_permutation(len(task.train), derive_seed(0, "timing"), 0)[:count]

    def some(image_set: ImageSet) -> ImageSet:
        return make_image_set(image_set.images[chosen], image_set.labels[chosen], image_set.class_names)

    seen = task.for_teacher
    for_teacher = None if seen is None else dataclasses.replace(seen, train=some(seen.train))
    return dataclasses.replace(task, train=some(task.train), for_teacher=for_teacher)
