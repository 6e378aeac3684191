"""What a setting may hold, as its type says: the type itself, the bounds beside it, and whether a value fits both.

A type and its bounds are all that is written of a setting. The check, the sentence that refuses a value and the command
line's help follow from them.
"""

from __future__ import annotations

import math
import reprlib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

_LARGEST_INT = 2**63 - 1  # what generators of random numbers, databases and tensors take
_UNIONS = (types.UnionType, typing.Union)
_WORDS: Mapping[Any, str] = {
    **{int: "a whole number of at most 64 bits", float: "a finite number", str: "text"},
    **{bool: "true or false", types.NoneType: "none"},
}
_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlong = 4, 200, 200, 40
_short.maxtuple = _short.maxlist = _short.maxdict = 20


@dataclass(frozen=True)
class Range:
    """Bounds of a number, beside its type: `Annotated[float, Range(0, 1, "[)")]` is in [0, 1).

    Attributes:
        low: The lower bound.
        high: The upper bound.
        ends: Whether the bounds belong to it, as intervals are written: "[" and "]" do, "(" and ")" do not.
    """

    low: float
    high: float = math.inf
    ends: Literal["[]", "[)", "(]", "()"] = "[]"

    def __contains__(self, number: float) -> bool:
        is_above = number > self.low or (number == self.low and self.ends[0] == "[")
        return is_above and (number < self.high or (number == self.high and self.ends[1] == "]"))

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'at least' if self.ends[0] == '[' else 'above'} {self.low}"
        return f"in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}"


PositiveFloat = Annotated[float, Range(0, ends="()")]
NonNegativeFloat = Annotated[float, Range(0)]
PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, "[)")]
ShareAboveZero = Annotated[float, Range(0, 1, "(]")]


class MisfitError(ValueError):
    """A value is not of a type; `args` are what it must be, in words, and the value or the part of it at fault."""


def fitted(value: Any, hint: Any) -> Any:
    """A value as a setting of this type holds it: a list as a tuple, a whole number as a float where only floats are.

    25 and 25.0 are then one setting. Of a type that is none of those below, everything is taken.

    Raises:
        MisfitError: The value is not of the type, or out of its bounds; numbers must be finite and of 64 bits.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _within(value, hint)
    if origin in _UNIONS:
        return _of_any(value, parts)
    if origin is tuple:
        if isinstance(value, tuple | list):
            wanted = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
            if len(wanted) == len(value):
                return tuple(map(fitted, value, wanted))
    elif origin is Literal:
        if any(type(value) is type(part) and value == part for part in parts):
            return value
    elif hint is int or hint is float:
        if isinstance(value, (int, float) if hint is float else int) and _is_representable(value):
            return hint(value)
    elif hint is Any or not isinstance(origin or hint, type) or isinstance(value, origin or hint):
        return value
    raise MisfitError(described(hint), value)


def _within(value: Any, hint: Any) -> Any:
    base, *notes = typing.get_args(hint)
    try:
        made = fitted(value, base)
    except MisfitError:
        raise MisfitError(described(hint), value) from None
    for limits in notes:
        if isinstance(limits, Range) and made not in limits:
            raise MisfitError(str(limits), value)
    return made


def _of_any(value: Any, options: tuple[Any, ...]) -> Any:
    requirements = []
    for option in sorted(options, key=lambda option: option is not type(value)):  # a whole number stays one if it may
        try:
            return fitted(value, option)
        except MisfitError as misfit:
            requirements.append(misfit.args[0])
    raise MisfitError(" or ".join(requirements), value)


def _is_representable(number: float) -> bool:
    if isinstance(number, bool):
        return False
    return abs(number) <= _LARGEST_INT if isinstance(number, int) else math.isfinite(number)


def described(hint: Any) -> str:
    """A type and its bounds in words."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return ", ".join([described(parts[0]), *(str(limits) for limits in parts[1:] if isinstance(limits, Range))])
    if origin is Literal:
        *others, last = map(str, parts)
        return f"{', '.join(others)} or {last}" if others else last
    if origin in _UNIONS:
        return " or ".join(map(described, parts))
    if origin is tuple:
        each = f"a list of which each is {described(parts[0])}"
        return each if parts[-1] is Ellipsis else f"{each}, {len(parts)} in all"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def bounds_of(hint: Any) -> Range | None:
    """The bounds in a type, none where it has none."""
    if isinstance(hint, Range):
        return hint
    return next(filter(None, map(bounds_of, typing.get_args(hint))), None)


def shown(value: object) -> str:
    """A value as Python writes it, but short, whatever it is."""
    try:
        return _short.repr(value)
    except ValueError:  # Python refuses to write out integers of more than 4,300 digits
        return "a far too large number"
