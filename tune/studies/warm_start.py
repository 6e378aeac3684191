"""Warm start: a study first tries the winners of its nearest source cells, over overlap x teacher x student."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from optuna.trial import FrozenTrial, TrialState

from refilled.methods import is_users


class Place(Protocol):
    """Where a study lies on the grid."""

    @property
    def name(self) -> str:
        """The study's name."""

    @property
    def method(self) -> str:
        """The method; different ones search different spaces."""

    @property
    def overlap(self) -> float:
        """Overlap ratio in [0, 1]."""

    @property
    def teacher(self) -> str:
        """The teacher's architecture."""

    @property
    def student(self) -> str:
        """The student's architecture."""


def source_cells(cell: Place, earlier: Sequence[Place]) -> tuple[str, ...]:
    """Names of the source cells of a cell: at most two, the nearest along each axis.

    Args:
        cell: The cell that starts warm.
        earlier: The cells before it. Only these are candidates, so that no two cells wait for each other.

    Returns:
        The nearest overlap with the same architectures, then the nearest architectures at the same overlap.
    """
    same_method = [each for each in earlier if each.method == cell.method]
    networks = (cell.teacher, cell.student)
    along_overlap = [each for each in same_method if (each.teacher, each.student) == networks]
    along_networks = [each for each in same_method if each.overlap == cell.overlap]
    found = []
    if along_overlap:
        found.append(min(along_overlap, key=lambda each: abs(each.overlap - cell.overlap)))
    if along_networks:
        found.append(min(along_networks, key=lambda each: _distance(each, cell)))
    return tuple(each.name for each in found)


def _distance(one: Place, other: Place) -> float:
    """How far two pairs of architectures are: in factors of depth and width, summed in the logarithm."""
    return _between(one.teacher, other.teacher) + _between(one.student, other.student)


def _between(one: str, other: str) -> float:
    """`wrn-40-2` and `wrn-16-2` differ by log(40 / 16); another family is farther than any depth or width.

    So is a network of the user's own: the digits of its path say nothing of its size.
    """
    if one == other:
        return 0.0
    if is_users(one) or is_users(other):
        return 100.0
    sizes, other_sizes = re.findall(r"\d+", one), re.findall(r"\d+", other)
    if one.partition("-")[0] != other.partition("-")[0] or len(sizes) != len(other_sizes):
        return 100.0
    return sum(abs(math.log(int(a) / int(b))) for a, b in zip(sizes, other_sizes, strict=True))


@dataclass(frozen=True)
class WarmStartReport:
    """How a cell's warm start did.

    Attributes:
        sources: The source cells.
        default_value: Value of the run's own settings, which every cell tries first; none if it was pruned or failed.
        value: Best value of the source cells' winning settings; none if all were pruned or failed.
        won: Whether one of these settings won the cell.
    """

    sources: tuple[str, ...]
    default_value: float | None
    value: float | None
    won: bool

    @property
    def gain(self) -> float | None:
        """By how much the best of them beat the default settings, where both were trained to the end."""
        return None if self.value is None or self.default_value is None else self.value - self.default_value

    def to_json(self) -> dict[str, Any]:
        """For `summary.json`."""
        return {
            "from": list(self.sources),
            "default_val_accuracy": self.default_value,
            "val_accuracy": self.value,
            "gain": self.gain,
            "won": self.won,
        }


def warm_start_report(trials: Sequence[FrozenTrial], winner: FrozenTrial) -> WarmStartReport:
    """How a cell's warm start did, read from its trials."""
    warm = [trial for trial in trials if trial.user_attrs.get("origin") == "transfer"]
    tried = [trial for trial in warm if trial.state.is_finished()]
    whole = [trial.value for trial in tried if trial.state == TrialState.COMPLETE and trial.value is not None]
    default = [
        trial.value
        for trial in trials
        if trial.user_attrs.get("origin") == "default" and trial.state == TrialState.COMPLETE
    ]
    return WarmStartReport(
        sources=tuple(dict.fromkeys(str(trial.user_attrs["from"]) for trial in tried)),
        default_value=default[0] if default else None,
        value=max(whole, default=None),
        won=any(trial.number == winner.number for trial in tried),
    )
