"""Comparison matching (Eq. 3-5): REFILLED's first stage."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from refilled.config import Choice, ComparisonConfig, Float, RunConfig, Searched
from refilled.losses import comparison_matching, truncated_comparison_matching
from refilled.terms.base import GlobalBatch, Local, Needs, Term


class Comparison(Term):
    """weight x student temperature² x mean KL of tuple probabilities (Eq. 5).

    The square makes the gradient's size independent of the temperature, as in distillation (Hinton et al., 2015), so
    that temperature, weight and learning rate can be searched apart from each other. The authors' code multiplies by
    1000 at temperature 4 instead, which is a weight of 62.5 here.
    """

    name: ClassVar[str] = "comparison"
    Config: ClassVar[type[ComparisonConfig]] = ComparisonConfig
    place: ClassVar[str] = "embedding"
    space: ClassVar[tuple[Searched, ...]] = (
        Searched("temperature", Float(0.1, 4.0, log=True)),
        Searched("max_negatives", Choice((1, 5, 20, None))),
    )
    weight_space: ClassVar[Searched] = Searched("weight", Float(0.01, 100.0, log=True))
    needs: ClassVar[Needs] = Needs(student=frozenset({"embedding"}), teacher=frozenset({"embedding"}))

    @classmethod
    def searched(cls, run: RunConfig) -> tuple[Searched, ...]:
        """All of the space, but for K̂ where the batch decides how many impostors a tuple has."""
        if run.embedding.tuples == "all":
            return cls.space
        return tuple(entry for entry in cls.space if entry.name != "max_negatives")

    def rows(self, local: Local) -> dict[str, Tensor]:
        """Both embeddings."""
        return {"embedding": local.student.embedding, "teacher_embedding": local.known_teacher.embedding}

    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        """Eq. 5 over the tuples of the global batch."""
        config = self.config
        student_temperature = config.student_temperature or config.temperature
        if config.tuples == "batch_minimum":
            matching = truncated_comparison_matching(
                rows["embedding"],
                rows["teacher_embedding"],
                batch.labels,
                temperature=config.temperature,
                margin=config.margin,
                student_temperature=student_temperature,
            )
        else:
            matching = comparison_matching(
                rows["embedding"],
                rows["teacher_embedding"],
                batch.labels,
                temperature=config.temperature,
                max_negatives=config.max_negatives,
                margin=config.margin,
                student_temperature=student_temperature,
                largest_class=batch.largest_class,
            )
        loss: Tensor = config.weight * student_temperature**2 * matching
        return loss
