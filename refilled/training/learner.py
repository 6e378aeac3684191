"""What a step works on: the student, the terms of the present stage with their own parameters, and the optimiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from refilled import batch_norm, distributed
from refilled.config import RunConfig, TermConfig
from refilled.data.pixels import Pixels, on_device
from refilled.data.views import Views
from refilled.keyed import derive_seed
from refilled.metrics import EpochMetrics
from refilled.models import Model, Output, initialise, parameters_of_embedding
from refilled.models.exact import require_exact
from refilled.networks import build_network, image_shape
from refilled.stages import Stage, term_config
from refilled.storage.model_file import model_state
from refilled.tasks.classification import Task
from refilled.terms import Setting, Teacher, TeacherOutput, Term
from refilled.training.compute import Compute
from refilled.training.optim import build_optimizer


class LoadedTeacher(Teacher, Protocol):
    """The frozen network as the loop asks it."""

    def embed(self, images: Tensor, image_ids: Tensor, view_ids: Tensor) -> Tensor:
        """Embeddings [b, D] of views of training images, from a cache or live."""

    def output(self, images: Tensor, image_ids: Tensor, view_ids: Tensor) -> TeacherOutput:
        """Embedding and maps of the same, live."""


@dataclass
class Learner:
    """What a step works on.

    Attributes:
        config: The run's configuration.
        task: Its images and classes.
        teacher: Frozen; none where no stage asks it.
        compute: Device and precision.
        student: The network that is trained.
        trained: The student as the steps run it: itself, or compiled.
        views: The augmentation.
        images: Uint8 [N, C, H, W], the whole training set, on the device where it fits.
        terms: Terms of the present stage.
    """

    config: RunConfig
    task: Task
    teacher: LoadedTeacher | None
    compute: Compute
    student: Model
    trained: Callable[..., Output]
    views: Views
    images: Pixels
    terms: nn.ModuleList

    @property
    def present_terms(self) -> list[Term]:
        """The terms, which torch's types take for modules alone."""
        return [cast(Term, term) for term in self.terms]

    def parameters(self) -> list[nn.Parameter]:
        """The student's, then those of the present stage's terms; the same order on every worker."""
        return [*self.student.parameters(), *self.terms.parameters()]


def make_learner(config: RunConfig, task: Task, teacher: LoadedTeacher | None, compute: Compute) -> Learner:
    """A new student on its device, and what its steps need; no stage has begun."""
    student = build_network(
        config,
        "student",
        task,
        num_classes=len(task.spaces.student),
        seed=derive_seed(config.seed, "weights"),
        dropout=config.optimizer.dropout,
    )
    if distributed.world_size() > 1:
        require_exact(student, config.student, image_shape("student", task), distributed.world_size())
        batch_norm.convert_batch_norm(student)
    student = compute.place_model(student)
    return Learner(
        config=config,
        task=task,
        teacher=teacher,
        compute=compute,
        student=student,
        trained=torch.compile(student) if config.compile else student,
        views=Views(config.views),
        images=on_device(task.train.images, compute.device),  # channels-last, as views are rendered
        terms=nn.ModuleList(),
    )


def begin_stage(learner: Learner, stage: Stage) -> None:
    """Give the learner the stage's terms, new, with initial weights that depend on the run's seed and names alone."""
    config, task, compute = learner.config, learner.task, learner.compute
    terms = nn.ModuleList()
    for kind in stage.terms:
        seed = derive_seed(config.seed, "term", stage.name, kind.name)
        channels, height, width = task.train.images.shape[1:]
        setting = Setting(
            student=learner.student,
            teacher=learner.teacher,
            labels=task.train.labels,
            num_classes=len(task.spaces.student),
            image_shape=(channels, height, width),
            seed=seed,
        )
        terms.append(new_term(kind, term_config(kind, config), setting))
    if distributed.world_size() > 1:
        batch_norm.convert_batch_norm(terms)
    learner.terms = compute.place_model(terms).train()
    if config.compile:
        for term in learner.present_terms:
            if any(True for _ in term.parameters()):
                term.rows = torch.compile(term.rows)  # type: ignore[method-assign]  # compiled in place of its own


def new_term(kind: type[Term], config: TermConfig, setting: Setting) -> Term:
    """A term whose initial weights depend on the setting's seed and their names alone."""
    with torch.random.fork_rng(devices=[]):  # layers draw weights when constructed, most of which are replaced
        torch.manual_seed(setting.seed)
        term = kind(config, setting)
    initialise(term, setting.seed)
    return term


def optimizer_of(learner: Learner, stage: Stage) -> torch.optim.SGD:
    """The optimiser of what a stage trains, and of its terms' own parameters."""
    student = learner.student
    parameters = parameters_of_embedding(student) if stage.trains == "embedding" else list(student.parameters())
    undecayed = [each for term in learner.present_terms for each in term.undecayed()]
    spared = {id(each) for each in undecayed}
    own = [each for each in learner.terms.parameters() if id(each) not in spared]
    return build_optimizer([*parameters, *own], learner.config.optimizer, undecayed)


def state_of(learner: Learner, optimizer: torch.optim.Optimizer, rows: Sequence[EpochMetrics]) -> dict[str, object]:
    """What a checkpoint holds at an epoch border; `rows` are those of all epochs so far."""
    return {
        "rows": [row.to_dict() for row in rows],
        "student": learner.student.state_dict(),
        "terms": learner.terms.state_dict(),
        "optimizer": optimizer.state_dict(),
    }


def state_of_student(config: RunConfig, task: Task, student: Model) -> dict[str, object]:
    """What `model.pt` holds of a run's student."""
    return model_state(
        student,
        architecture=config.student,
        embedding=config.student_embedding,
        features=config.student_features,
        sources=config.sources,
        classes=task.spaces.student,
        image_shape=task.train.images.shape[1:],
        dropout=config.optimizer.dropout,
        mean=task.normalization.mean,
        std=task.normalization.std,
    )
