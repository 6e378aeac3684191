"""What a user writes: a term and networks, as texts, and a small run with them."""

from __future__ import annotations

import dataclasses

from refilled.config import RunConfig
from refilled.presets import smoke
from refilled.stages import with_own_code

TERM = '''
"""A term of one's own."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from refilled.config import Float, Searched, TermConfig
from refilled.terms import GlobalBatch, Local, Needs, Setting, Term


@dataclass(frozen=True, kw_only=True)
class RegressionConfig(TermConfig):
    """weight x squared distance."""

    weight: float = 2.0
    """Weight of the loss."""


class Regression(Term):
    """Squared distance of the projected embedding to the teacher's."""

    name: ClassVar[str] = "regression"
    Config: ClassVar[type[TermConfig]] = RegressionConfig
    weight_space: ClassVar[Searched] = Searched("weight", Float(0.1, 10.0, log=True))
    needs: ClassVar[Needs] = Needs(student=frozenset({"embedding"}), teacher=frozenset({"embedding"}))

    def __init__(self, config: TermConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.projection = nn.Linear(setting.student.embedding_dim, setting.known_teacher.embedding_dim)

    def rows(self, local: Local) -> dict[str, Tensor]:
        difference = self.projection(local.student.embedding) - local.known_teacher.embedding
        return {"regression": difference.square().mean(dim=1)}

    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        return self.config.weight * rows["regression"].mean()


NOTHING = 3
'''
NETWORK = '''
from torch import Tensor, nn

from refilled.models import Model, Output


class Tiny(Model):
    """One convolution."""

    def __init__(self, *, num_classes: int, in_channels: int, image_size: int, dropout: float) -> None:
        super().__init__(embedding_dim=6, num_classes=num_classes, feature_channels=(6,))
        self.conv = nn.Conv2d(in_channels, 6, 3, padding=1)
        self.scale = nn.Parameter(__import__("torch").rand(6))
        self.head = nn.Linear(6, num_classes)

    def forward(self, images: Tensor, dropout_keys: Tensor | None = None) -> Output:
        maps = self.conv(images) * self.scale[:, None, None]
        return self.pool_and_classify(maps.relu(), (maps,))


def broken(**arguments: object) -> Model:
    raise RuntimeError("no such network")


def other(**arguments: object) -> nn.Module:
    return nn.Linear(2, 2)
'''


def small(method: str, **changes: object) -> RunConfig:
    run = dataclasses.replace(smoke().run, method=method, overlap=0.4, epochs=(1, 1), teacher_epochs=1)
    return with_own_code(dataclasses.replace(run, **changes))  # type: ignore[arg-type]
