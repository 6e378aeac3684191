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
import typing
from collections.abc import Mapping
from typing import Any, Self

from refilled.errors import UserError


def require(condition: bool, field_name: str, requirement: str, value: object) -> None:
    """Raise the sentence of a refused field unless the condition holds."""
    if not condition:
        raise UserError(f"{field_name} must be {requirement}, got {value!r}.")


def is_positive(value: float) -> bool:
    """Whether a number is finite and above 0."""
    return math.isfinite(value) and value > 0


class Config:
    """What every configuration class can do."""

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dict, ready for JSON (tuples stay tuples in memory, become lists in JSON)."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`, also after a round trip through JSON.

        Raises:
            UserError: for a key the class does not have, or a value a field refuses.
        """
        hints = typing.get_type_hints(cls)
        unknown = sorted(set(values) - set(hints))
        if unknown:
            raise UserError(f"Unknown setting {unknown[0]!r}; {cls.__name__} has {', '.join(sorted(hints))}.")
        made: dict[str, Any] = {}
        for name, value in values.items():
            hint = hints[name]
            if isinstance(hint, type) and issubclass(hint, Config):
                made[name] = value if isinstance(value, hint) else hint.from_dict(value)
            else:
                made[name] = tuple(value) if isinstance(value, list) else value
        return cls(**made)

    def with_overrides(self, overrides: Mapping[str, Any]) -> Self:
        """A copy with fields replaced by dotted name, `{"embedding.temperature": 2.0}`.

        Raises:
            UserError: for a name that does not exist, or a value that its field refuses.
        """
        changes: dict[str, Any] = {}
        nested: dict[str, dict[str, Any]] = {}
        names = {f.name for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        for dotted, value in overrides.items():
            head, _, tail = dotted.partition(".")
            if head not in names or (tail and not isinstance(getattr(self, head), Config)):
                raise UserError(f"Unknown setting {dotted!r}; {type(self).__name__} has {', '.join(sorted(names))}.")
            if tail:
                nested.setdefault(head, {})[tail] = value
            else:
                changes[head] = value
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
