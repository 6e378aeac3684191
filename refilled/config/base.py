"""What every configuration can do.

A configuration is a frozen dataclass, documented field by field, whose fields' types say what they may hold
(`refilled.config.fields`); it is checked when it is made. It becomes a nested dict at Ray's border (`to_dict` /
`from_dict`), is varied by dotted names (`with_overrides({"embedding.temperature": 2.0})`, the one way both the command
line and a sampled trial use), and is identified by `content_hash`. The command line shows the fields' docstrings as its
help.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from refilled.config.fields import MisfitError, fitted, shown
from refilled.errors import UserError


class FieldError(UserError):
    """The value of a field is refused.

    `args` are what stands before the field's name, its name, what the value must be, and the value as it is shown.
    """

    def __str__(self) -> str:
        return "{}{} must be {}, got {}.".format(*self.args)

    def within(self, name: str, prefix: str = "") -> FieldError:
        """The same of a field of the nested configuration that has this name."""
        return FieldError(prefix, f"{name}.{self.args[1]}", *self.args[2:])


def require(condition: bool, field_name: str, requirement: str, value: object) -> None:
    """Raise the sentence of a refused field unless the condition holds."""
    if not condition:
        raise FieldError("", field_name, requirement, shown(value))


@dataclass(frozen=True)
class Config:
    """What every configuration class can do."""

    _prefix: ClassVar[str] = ""
    """Before the names of fields in sentences about one that stands alone; empty: they have none in a run either."""
    _types: ClassVar[Mapping[str, Any]]

    def __post_init__(self) -> None:
        """Check every field by its type; classes whose fields depend on each other extend it."""
        for name in self.field_types():
            object.__setattr__(self, name, self._fitted(name, getattr(self, name)))

    def require(self, condition: bool, name: str, requirement: str) -> None:
        """Raise the sentence of a refused field unless the condition holds."""
        if not condition:
            raise FieldError(self._prefix, name, requirement, shown(getattr(self, name)))

    @classmethod
    def field_types(cls) -> Mapping[str, Any]:
        """The types of the fields, with the bounds in them, by name and in order."""
        if "_types" not in vars(cls):
            types_by_name = typing.get_type_hints(cls, include_extras=True)
            cls._types = {field.name: types_by_name[field.name] for field in dataclasses.fields(cls)}
        return cls._types

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dict, ready for JSON (tuples stay tuples in memory, become lists in JSON)."""
        values = {name: getattr(self, name) for name in self.field_types()}
        return {name: value.to_dict() if isinstance(value, Config) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`, also after a round trip through JSON.

        A field that is left out has its default.

        Raises:
            UserError: For a key the class does not have, or a value of a type or size that a field refuses.
        """
        require(isinstance(values, Mapping), cls.__name__, "an object of settings", values)
        hints = cls.field_types()
        unknown = sorted(shown(name) for name in values if name not in hints)
        if unknown:
            raise UserError(f"Unknown setting {unknown[0]}; {cls.__name__} has {', '.join(sorted(hints))}.")
        made = dict(values)
        for name, value in values.items():
            hint = hints[name]
            if isinstance(hint, type) and issubclass(hint, Config) and not isinstance(value, hint):
                with cls._naming(name):
                    made[name] = hint.from_dict(value)
        return cls(**made)

    def with_overrides(self, overrides: Mapping[str, Any]) -> Self:
        """A copy with fields replaced by dotted name, `{"embedding.temperature": 2.0}`.

        Raises:
            UserError: For a name that does not exist, or a value that its field refuses.
        """
        changes: dict[str, Any] = {}
        nested: dict[str, dict[str, Any]] = {}
        names = self.field_types()
        for dotted, value in overrides.items():
            head, _, tail = dotted.partition(".")
            if head not in names or (tail and not isinstance(getattr(self, head), Config)):
                raise UserError(
                    f"Unknown setting {shown(dotted)}; {type(self).__name__} has {', '.join(sorted(names))}."
                )
            if tail:
                nested.setdefault(head, {})[tail] = value
            else:
                changes[head] = self._fitted(head, value)
        for head, inner in nested.items():
            with self._naming(head):
                changes[head] = changes.get(head, getattr(self, head)).with_overrides(inner)
        return dataclasses.replace(self, **changes)

    def flat(self) -> dict[str, Any]:
        """Dotted names to leaf values, in field order."""
        leaves: dict[str, Any] = {}
        for name in self.field_types():
            value = getattr(self, name)
            if isinstance(value, Config):
                leaves |= {f"{name}.{inner}": leaf for inner, leaf in value.flat().items()}
            else:
                leaves[name] = value
        return leaves

    def content_hash(self) -> str:
        """16 hex digits that equal configurations share."""
        return content_hash(self.to_dict())

    @classmethod
    def _fitted(cls, name: str, value: object) -> Any:
        try:
            return fitted(value, cls.field_types()[name])
        except MisfitError as misfit:
            requirement, wrong = misfit.args
            raise FieldError(cls._prefix, name, requirement, shown(wrong)) from None

    @classmethod
    @contextlib.contextmanager
    def _naming(cls, nested: str) -> Iterator[None]:
        """Name fields that the block refuses as the user does who sets them in a nested configuration."""
        try:
            yield
        except FieldError as error:
            raise (error.within(nested, cls._prefix) if error.args[0] else error) from None


def content_hash(values: object) -> str:
    """First 16 hex digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
