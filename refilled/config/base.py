"""What every configuration can do.

A configuration is a frozen dataclass, checked when it is made and documented field by field. It becomes a nested dict
at Ray's border (`to_dict` / `from_dict`), is varied by dotted names (`with_overrides({"embedding.temperature": 2.0})`,
the one way both the command line and a sampled trial use), and is identified by `content_hash`. The command line shows
the fields' docstrings as its help.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Self

from refilled.errors import UserError

_LARGEST_INT = 2**63 - 1  # what generators of random numbers, databases and tensors take
_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlong = 4, 200, 200, 40
_short.maxtuple = _short.maxlist = _short.maxdict = 20


def require(condition: bool, field_name: str, requirement: str, value: object) -> None:
    """Raise the sentence of a refused field unless the condition holds."""
    if not condition:
        raise UserError(f"{field_name} must be {requirement}, got {shown(value)}.")


def is_positive(value: float) -> bool:
    """Whether a number is finite and above 0."""
    return math.isfinite(value) and value > 0


class Config:
    """What every configuration class can do."""

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dict, ready for JSON (tuples stay tuples in memory, become lists in JSON)."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {name: value.to_dict() if isinstance(value, Config) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`, also after a round trip through JSON.

        A field that is left out has its default.

        Raises:
            UserError: for a key the class does not have, or a value of a type or size that a field refuses.
        """
        require(isinstance(values, Mapping), cls.__name__, "an object of settings", values)
        types_by_name = typing.get_type_hints(cls)
        hints = {f.name: types_by_name[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(shown(name) for name in values if name not in hints)
        if unknown:
            raise UserError(f"Unknown setting {unknown[0]}; {cls.__name__} has {', '.join(sorted(hints))}.")
        made: dict[str, Any] = {}
        for name, value in values.items():
            hint = hints[name]
            if isinstance(hint, type) and issubclass(hint, Config):
                made[name] = value if isinstance(value, hint) else hint.from_dict(value)
            else:
                made[name] = tuple(value) if isinstance(value, list) else value
                require(is_value_of(made[name], hint), f"{cls.__name__}.{name}", _wanted(hint), value)
                made[name] = _as_of(made[name], hint)
        return cls(**made)

    def with_overrides(self, overrides: Mapping[str, Any]) -> Self:
        """A copy with fields replaced by dotted name, `{"embedding.temperature": 2.0}`.

        Raises:
            UserError: for a name that does not exist, or a value that its field refuses.
        """
        changes: dict[str, Any] = {}
        nested: dict[str, dict[str, Any]] = {}
        names = {f.name for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        hints = typing.get_type_hints(type(self))
        for dotted, value in overrides.items():
            head, _, tail = dotted.partition(".")
            if head not in names or (tail and not isinstance(getattr(self, head), Config)):
                raise UserError(
                    f"Unknown setting {shown(dotted)}; {type(self).__name__} has {', '.join(sorted(names))}."
                )
            if tail:
                nested.setdefault(head, {})[tail] = value
            else:
                changes[head] = tuple(value) if isinstance(value, list) else value
                require(is_value_of(changes[head], hints[head]), dotted, _wanted(hints[head]), value)
                changes[head] = _as_of(changes[head], hints[head])
        for head, inner in nested.items():
            changes[head] = changes.get(head, getattr(self, head)).with_overrides(inner)
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def flat(self) -> dict[str, Any]:
        """Dotted names to leaf values, in field order."""
        leaves: dict[str, Any] = {}
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Config):
                leaves |= {f"{f.name}.{name}": leaf for name, leaf in value.flat().items()}
            else:
                leaves[f.name] = value
        return leaves

    def content_hash(self) -> str:
        """16 hex digits that equal configurations share."""
        return content_hash(self.to_dict())


def content_hash(values: object) -> str:
    """First 16 hex digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def is_value_of(value: object, hint: Any) -> bool:
    """Whether a plain value is of a field's type, numbers finite and of at most 64 bits."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin in (types.UnionType, typing.Union):
        return any(is_value_of(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        wanted = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return len(wanted) == len(value) and all(map(is_value_of, value, wanted))
    if hint is int or hint is float:
        numbers = (int, float) if hint is float else (int,)
        return isinstance(value, numbers) and not isinstance(value, bool) and _is_representable(value)
    return value is None if hint is types.NoneType else isinstance(value, hint)


def _as_of(value: Any, hint: Any) -> Any:
    """A whole number as a float where a field holds floats alone: 25 and 25.0 are one setting."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and float in options and int not in options else value


def _is_representable(number: float) -> bool:
    return abs(number) <= _LARGEST_INT if isinstance(number, int) else math.isfinite(number)


def _wanted(hint: Any) -> str:
    """A field's type in words."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(parts)}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_wanted(part) for part in parts)
    if origin is tuple:
        return f"a list of which each is {_wanted(parts[0])}" + (
            "" if parts[-1] is Ellipsis else f", {len(parts)} in all"
        )
    words = {int: "a whole number of at most 64 bits", float: "a finite number", str: "text", bool: "true or false"}
    return words.get(hint, "none" if hint is types.NoneType else hint.__name__)


def shown(value: object) -> str:
    """A value as Python writes it, but short, whatever it is."""
    try:
        return _short.repr(value)
    except ValueError:  # Python refuses to write out integers of more than 4,300 digits
        return "a far too large number"
