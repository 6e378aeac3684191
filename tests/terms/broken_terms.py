"""A term that keeps the contract, and terms that each break it in one way."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled import distributed
from refilled.config import Choice, Float, Searched, TermConfig
from refilled.config.base import require
from refilled.terms import GlobalBatch, Local, Needs, Setting, Term


@dataclass(frozen=True, kw_only=True)
class WholeConfig(TermConfig):
    """weight x squared distance."""

    weight: float = 2.0
    """Weight of the loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.weight > 0, "whole.weight", "above 0", self.weight)


class Whole(Term):
    """Regression to the teacher's embedding, relative to a running mean of the teacher's."""

    name: ClassVar[str] = "whole"
    Config: ClassVar[type[TermConfig]] = WholeConfig
    weight_space: ClassVar[Searched | None] = Searched("weight", Float(0.1, 10.0, log=True))
    needs: ClassVar[Needs] = Needs(student=frozenset({"embedding"}), teacher=frozenset({"embedding"}))
    mean: Tensor

    def __init__(self, config: TermConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.projection = nn.Linear(setting.student.embedding_dim, setting.known_teacher.embedding_dim)
        self.register_buffer("mean", torch.zeros(setting.known_teacher.embedding_dim))

    def rows(self, local: Local) -> dict[str, Tensor]:
        return {"whole": self.projection(local.student.embedding), "wanted": local.known_teacher.embedding}

    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        return self.config.weight * (rows["whole"] - rows["wanted"] + self.mean).square().mean()

    def update(self, rows: dict[str, Tensor], batch: GlobalBatch) -> None:
        self.mean.lerp_(rows["wanted"].mean(dim=0).to(self.mean.dtype), 0.5)


class ParameterInLoss(Whole):
    def rows(self, local: Local) -> dict[str, Tensor]:
        return {"embedding": local.student.embedding, "wanted": local.known_teacher.embedding}

    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        return super().loss({**rows, "whole": self.projection(rows["embedding"])}, batch)


class NormalisesItsShare(Whole):
    def rows(self, local: Local) -> dict[str, Tensor]:
        rows = super().rows(local)
        return rows | {"whole": rows["whole"] / (1 + rows["whole"].square().sum())}


class LossOfItsShare(Whole):
    """As data-parallel training averages it."""

    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        number, count = distributed.rank(), distributed.world_size()
        own = {name: each.tensor_split(count)[number] for name, each in rows.items()}
        return super().loss(own, batch) / count


class DrawsInLoss(Whole):
    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        return super().loss(rows, batch) * (1 + torch.rand(()).item())


class DrawsWithNumPy(Whole):
    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        return super().loss(rows, batch) * (1 + float(np.random.rand()))


class ReturnsNothing(Whole):
    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        return None  # type: ignore[return-value]


class DrawsInRows(Whole):
    def rows(self, local: Local) -> dict[str, Tensor]:
        rows = super().rows(local)
        return rows | {"whole": F.dropout(rows["whole"])}


class MeanOfItsShare(Whole):
    """Updates its buffer from this worker's rows."""

    def rows(self, local: Local) -> dict[str, Tensor]:
        self._own = local.known_teacher.embedding
        return super().rows(local)

    def update(self, rows: dict[str, Tensor], batch: GlobalBatch) -> None:
        if len(self._own):
            super().update({"wanted": self._own}, batch)


class StateThatIsNotSaved(Whole):
    _steps = 0

    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        return super().loss(rows, batch) * (1 + self._steps)

    def update(self, rows: dict[str, Tensor], batch: GlobalBatch) -> None:
        self._steps += 1


class OneRowForAll(Whole):
    def rows(self, local: Local) -> dict[str, Tensor]:
        return {name: each.mean(dim=0, keepdim=True) for name, each in super().rows(local).items()}


class OneLossForEach(Whole):
    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        return (rows["whole"] - rows["wanted"]).square().mean(dim=1)


class TeachesNobody(Whole):
    def rows(self, local: Local) -> dict[str, Tensor]:
        rows = super().rows(local)
        return rows | {"whole": self.projection(local.student.embedding.detach())}


class UsesWhatItDoesNotNeed(Whole):
    def rows(self, local: Local) -> dict[str, Tensor]:
        rows = super().rows(local)
        return rows | {"whole": rows["whole"] + local.student.logits.sum(dim=1, keepdim=True)}


class UsesTheTeachersHead(Whole):
    def __init__(self, config: TermConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self._teacher = setting.known_teacher

    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        return super().loss(rows, batch) * self._teacher.logits(rows["wanted"]).square().mean()


class ChangesWhatItIsGiven(Whole):
    def rows(self, local: Local) -> dict[str, Tensor]:
        local.known_teacher.embedding.sub_(1)
        return super().rows(local)


class BeginsAnyhow(Whole):
    def __init__(self, config: TermConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.shift = nn.Parameter(torch.tensor(random.random()))


class OverflowsInFloat32(Whole):
    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        return super().loss(rows, batch) + (300 * F.normalize(rows["whole"], dim=1)).exp().sum().log()


class SparesTheStudent(Whole):
    def __init__(self, config: TermConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self._others = (next(setting.student.parameters()),)  # type: ignore[attr-defined]

    def undecayed(self) -> tuple[nn.Parameter, ...]:
        return self._others


@dataclass(frozen=True, kw_only=True)
class SilentConfig(TermConfig):
    """A setting says nothing."""

    weight: float = 2.0


class SaysNothing(Whole):
    Config: ClassVar[type[TermConfig]] = SilentConfig


@dataclass(frozen=True, kw_only=True)
class OddConfig(WholeConfig):
    """A default whose keys JSON turns into texts."""

    by_class: dict[int, float] = field(default_factory=lambda: {1: 0.5})
    """Weight by class."""


class HasAnOddDefault(Whole):
    Config: ClassVar[type[TermConfig]] = OddConfig


class SearchesTooFar(Whole):
    weight_space: ClassVar[Searched | None] = Searched("weight", Float(-1.0, 10.0))


class SearchesWhatIsNone(Whole):
    space: ClassVar[tuple[Searched, ...]] = (Searched("wieght", Choice((1.0, 2.0))),)
