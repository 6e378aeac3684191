"""A stage's real steps, one at a time, for those who time them."""

from __future__ import annotations

import dataclasses

from refilled.config import RunConfig
from refilled.data.batches import epoch_batches
from refilled.data.images import make_image_set
from refilled.keyed import derive_seed, keyed_permutation
from refilled.methods import StageName
from refilled.models import Model
from refilled.stages import stages_of
from refilled.storage.run_folder import Row
from refilled.tasks.classification import Task
from refilled.teacher import FrozenTeacher
from refilled.training.compute import Compute
from refilled.training.learner import begin_stage, make_learner, optimizer_of, state_of
from refilled.training.step import step


class Steps:
    """One stage's steps, those of `refilled.training.loop`, on one batch an epoch.

    Attributes:
        student: as the steps leave it.
        optimizer: its.
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

    def __call__(self) -> None:
        """Draw a batch and train on it."""
        config = self._learner.config
        batches = epoch_batches(
            self._learner.task.train.labels,
            global_batch_size=config.global_batch_size,
            seed=config.seed,
            epoch=self._epoch,
        )
        step(self._learner, self._stage, self.optimizer, next(batches), self._epoch)
        self._epoch += 1

    def state(self, rows: list[Row]) -> dict[str, object]:
        """What a checkpoint would hold now."""
        return state_of(self._learner, self.optimizer, rows)


def some_of(task: Task, count: int) -> Task:
    """The same task with so many of its training images, drawn at random."""
    chosen = keyed_permutation(len(task.train), derive_seed(0, "timing"), 0)[:count]
    train = make_image_set(task.train.images[chosen], task.train.labels[chosen], task.train.class_names)
    return dataclasses.replace(task, train=train)
