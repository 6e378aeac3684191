"""One batch and the widths of two networks, for tests of loss terms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from refilled.config import RunConfig
from refilled.models import Output
from refilled.stages import term_class, term_config
from refilled.terms import GlobalBatch, Local, Setting, TeacherOutput, Term

LABELS = torch.tensor([0, 1, 3, 0, 1, 3, 3, 0])
CLASSES = torch.tensor([0, 1, 3])


@dataclass
class Widths:
    """What a term may know of a network; of a teacher also what it says, from numbers that are drawn once."""

    embedding_dim: int
    num_classes: int
    feature_channels: tuple[int, ...]
    borders_end_in_relu: bool = False
    prototypes: Tensor = field(default_factory=lambda: torch.empty(0))
    head: Tensor = field(default_factory=lambda: torch.empty(0))

    def logits(self, embedding: Tensor) -> Tensor:
        return embedding @ self.head.T


@dataclass
class Bench:
    """One batch of eight images on one worker: a student and a teacher of different widths, random but fixed."""

    setting: Setting
    local: Local
    batch: GlobalBatch

    def term(self, method: str, name: str, **settings: Any) -> Term:
        """A term as a run of a method makes it; settings by dotted name."""
        run = RunConfig(method=method, overlap=1.0).with_overrides(settings)
        kind = term_class(name, run)
        return kind(term_config(kind, run), self.setting).double()

    def loss(self, term: Term, local: Local | None = None) -> Tensor:
        return term.loss(term.rows(local or self.local), self.batch)

    def value(self, term: Term, local: Local | None = None) -> float:
        """The loss as a number."""
        return float(self.loss(term, local).detach())


def new_bench() -> Bench:
    """The same every time."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    maps = tuple(draw(8, channels, size, size) for channels, size in ((2, 8), (3, 4), (4, 4)))
    student = Output(draw(8, 3), draw(8, 5), maps)
    teacher_maps = tuple(draw(8, channels, size, size) for channels, size in ((3, 8), (5, 4), (6, 2)))
    teacher = TeacherOutput(draw(8, 4), teacher_maps)
    setting = Setting(
        student=Widths(3, 5, (2, 3, 4)),
        teacher=Widths(4, 5, (3, 5, 6), prototypes=draw(5, 4), head=draw(5, 4)),
        labels=torch.cat([LABELS, torch.tensor([2, 4, 2, 4])]),
        num_classes=5,
        image_shape=(1, 8, 8),
        seed=7,
    )
    image_ids = torch.arange(8)
    local = Local(image_ids, LABELS, draw(8, 1, 8, 8), student, teacher, epoch=0)
    return Bench(setting, local, GlobalBatch(image_ids, LABELS, CLASSES, largest_class=3, epoch=0))
