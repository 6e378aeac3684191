"""Whose winner a study tries first: its nearest neighbours' of the same method, over overlap x teacher x student."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from optuna.trial import FrozenTrial, TrialState

from refilled.methods import is_users


class Place(Protocol):
    """Where a cell lies on the grid."""

    @property
    def name(self) -> str:
        """Of the cell."""

    @property
    def method(self) -> str:
        """Different methods search different spaces."""

    @property
    def overlap(self) -> float:
        """In [0, 1]."""

    @property
    def teacher(self) -> str:
        """Architecture."""

    @property
    def student(self) -> str:
        """Architecture."""


def donors(cell: Place, earlier: Sequence[Place]) -> tuple[str, ...]:
    """Names of the cells that give to a cell: at most two, the nearest along each axis.

    Args:
        cell: who receives.
        earlier: the cells before it; only they give, so that nobody waits for each other.

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
class Brought:
    """What neighbours' winners brought a cell.

    Attributes:
        sources: the cells that gave.
        default_value: value of the run's own settings, which every cell tries first; None if it was pruned or failed.
        value: the best value of the received settings; None if all were pruned or failed.
        won: whether the cell's winner is one of them.
    """

    sources: tuple[str, ...]
    default_value: float | None
    value: float | None
    won: bool

    @property
    def gain(self) -> float | None:
        """By how much the best received settings beat the default ones, where both were trained to the end."""
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


def brought(trials: Sequence[FrozenTrial], winner: FrozenTrial) -> Brought:
    """Read from a cell's trials what was received and how it did."""
    received = [trial for trial in trials if trial.user_attrs.get("origin") == "transfer"]
    tried = [trial for trial in received if trial.state.is_finished()]
    whole = [trial.value for trial in tried if trial.state == TrialState.COMPLETE and trial.value is not None]
    default = [
        trial.value
        for trial in trials
        if trial.user_attrs.get("origin") == "default" and trial.state == TrialState.COMPLETE
    ]
    return Brought(
        sources=tuple(dict.fromkeys(str(trial.user_attrs["from"]) for trial in tried)),
        default_value=default[0] if default else None,
        value=max(whole, default=None),
        won=any(trial.number == winner.number for trial in tried),
    )
