"""Cross-entropy with the labels (Eq. 1)."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from refilled.terms.base import GlobalBatch, Local, Needs, Term


class CrossEntropy(Term):
    """-log of the label's probability, mean over the batch; every other term's weight is relative to it."""

    name: ClassVar[str] = "cross_entropy"
    needs: ClassVar[Needs] = Needs(student=frozenset({"logits"}))

    def rows(self, local: Local) -> dict[str, Tensor]:
        """The student's logits."""
        return {"logits": local.student.logits}

    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        """Eq. 1."""
        return F.cross_entropy(rows["logits"], batch.labels)
