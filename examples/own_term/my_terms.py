"""A loss term of one's own, which stands beside the package's without touching it.

python tune/search.py --methods student examples/own_term/my_terms.py:Regression --regression.weight 5
"""

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
        """One number for each of this worker's images; the only place for own parameters."""
        difference = self.projection(local.student.embedding) - local.known_teacher.embedding
        return {"regression": difference.square().mean(dim=1)}

    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        """The mean over everybody's images."""
        loss: Tensor = self.config.weight * rows["regression"].mean()
        return loss
