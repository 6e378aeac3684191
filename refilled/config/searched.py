"""What may be searched of a configuration, as data: names, intervals, choices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Float:
    """A number from an interval, both ends included; uniform, or uniform in its logarithm."""

    low: float
    high: float
    log: bool = False

    def holding(self, value: float) -> Float:
        """The interval, widened to hold a value; a logarithm has no room for 0."""
        if self.log and value <= 0:
            return self
        return dataclasses.replace(self, low=min(self.low, value), high=max(self.high, value))


@dataclass(frozen=True)
class Choice:
    """One of a few unordered values."""

    values: tuple[str | int | float | None, ...]

    def holding(self, value: str | int | float | None) -> Choice:
        """The values and, if it is none of them, the given one."""
        return self if value in self.values else Choice((*self.values, value))


@dataclass(frozen=True)
class Searched:
    """One searched setting: its name, its values, and the setting and values of it that it depends on, if any."""

    name: str
    domain: Float | Choice
    when: tuple[str, tuple[str, ...]] | None = None

    def is_drawn(self, drawn: Mapping[str, Any]) -> bool:
        """Whether the settings drawn before make this one matter."""
        return self.when is None or drawn.get(self.when[0]) in self.when[1]
