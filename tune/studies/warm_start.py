"""Warm start: a study first tries the winners of its nearest source cells, over overlap x networks x images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from optuna.trial import FrozenTrial, TrialState

from refilled.networks import NetworkSize


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

    @property
    def images_per_class(self) -> int | None:
        """The student's training images of each class; none: all."""

    @property
    def teacher_size(self) -> NetworkSize | None:
        """The teacher's size; none where there is none."""

    @property
    def student_size(self) -> NetworkSize | None:
        """The student's."""


def source_cells(cell: Place, earlier: Sequence[Place]) -> tuple[str, ...]:
    """Names of the source cells of a cell: at most three, the nearest along each axis.

    Args:
        cell: The cell that starts warm.
        earlier: The cells before it. Only these are candidates, so that no two cells wait for each other.

    Returns:
        The nearest overlap, then the nearest architectures, then the nearest number of images a class; what is not
        said to be near is the same.
    """
    same_method = [each for each in earlier if each.method == cell.method]
    found = []
    for axis, distance in (("overlap", _by_overlap), ("networks", _by_networks), ("images_per_class", _by_images)):
        others = {name for name in _AXES if name != axis}
        along = [each for each in same_method if all(_AXES[name](each) == _AXES[name](cell) for name in others)]
        if along:
            found.append(min(along, key=lambda each: distance(each, cell)))
    return tuple(each.name for each in found)


_AXES: Mapping[str, Callable[[Place], object]] = {
    "overlap": lambda place: place.overlap,
    "networks": lambda place: (place.teacher, place.student),
    "images_per_class": lambda place: place.images_per_class,
}


def _by_overlap(one: Place, other: Place) -> float:
    return abs(one.overlap - other.overlap)


def _by_networks(one: Place, other: Place) -> float:
    """How far two pairs of architectures are: in factors of parameters and multiply-adds, summed in the logarithm."""
    return _between(one.teacher_size, other.teacher_size) + _between(one.student_size, other.student_size)


def _between(one: NetworkSize | None, other: NetworkSize | None) -> float:
    if one is None or other is None:
        return 0.0
    pairs = ((one.num_parameters, other.num_parameters), (one.multiply_adds, other.multiply_adds))
    return sum(abs(math.log(max(1, a) / max(1, b))) for a, b in pairs)


def _by_images(one: Place, other: Place) -> float:
    """In factors; all images are farther than any number of them, and nearest to the largest."""
    if one.images_per_class is None or other.images_per_class is None:
        number = one.images_per_class or other.images_per_class
        return 0.0 if number is None else 1e3 - math.log(number)
    return abs(math.log(one.images_per_class / other.images_per_class))


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
