"""Loss terms by name. A new one is one file and one line in `TERMS`."""

from __future__ import annotations

from collections.abc import Mapping

from refilled.terms.base import (
    GlobalBatch,
    Local,
    Needs,
    Setting,
    Teacher,
    TeacherOutput,
    Term,
)
from refilled.terms.comparison import Comparison
from refilled.terms.cross_entropy import CrossEntropy
from refilled.terms.kd import Kd
from refilled.terms.lkd import Lkd, WeightedLkd

TERMS: Mapping[str, type[Term]] = {
    term.name: term
    for term in (
        CrossEntropy,
        Kd,
        Comparison,
        Lkd,
        WeightedLkd,
    )
}

__all__ = ["TERMS", "GlobalBatch", "Local", "Needs", "Setting", "Teacher", "TeacherOutput", "Term"]
