"""Parts of a run's configuration whose names are not known beforehand: settings of terms, and the user's own files."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self, cast

from refilled.config.base import Config, FieldError, require
from refilled.config.fields import MisfitError, fitted, shown
from refilled.errors import UserError

Setting = str | int | float | bool | None | tuple[int | float, ...]
MAX_SOURCE_CHARS = 500_000


@dataclass(frozen=True)
class TermSettings(Config):
    """Settings of loss terms by the term's name: `{"rkd": {"angle_weight": 50.0}}`.

    What names and values a term takes is for the term to say, when the run's stages are put together. Settings that are
    not given have the term's defaults.
    """

    given: tuple[tuple[str, tuple[tuple[str, Setting], ...]], ...] = ()
    """(term, ((setting, value), ...)), sorted, so that equal settings are equal."""

    def of(self, term: str) -> dict[str, Setting]:
        """What is given for a term."""
        return dict(dict(self.given).get(term, ()))

    def to_dict(self) -> dict[str, Any]:
        """Settings by term and name."""
        return {term: dict(settings) for term, settings in self.given}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            UserError: It is no table of plain settings.
        """
        require(isinstance(values, Mapping), "terms", "an object of settings by term", values)
        made = {}
        for term, settings in values.items():
            require(isinstance(term, str), "terms", "an object whose names are texts", term)
            require(isinstance(settings, Mapping), f"terms.{shown(term)}", "an object of settings", settings)
            made[term] = tuple(sorted((name, _setting(term, name, value)) for name, value in settings.items()))
        return cls(tuple(sorted(made.items())))

    def with_overrides(self, overrides: Mapping[str, Any]) -> Self:
        """A copy with settings replaced or added by dotted name, `{"rkd.angle_weight": 2.0}`."""
        values = self.to_dict()
        for dotted, value in overrides.items():
            term, dot, name = dotted.partition(".")
            if not dot:
                raise UserError(f"Unknown setting {shown('terms.' + dotted)}; settings of terms are TERM.NAME.")
            values.setdefault(term, {})[name] = value
        return type(self).from_dict(values)

    def flat(self) -> dict[str, Any]:
        """Dotted names to values."""
        return {f"{term}.{name}": value for term, settings in self.given for name, value in settings}


@dataclass(frozen=True)
class Sources(Config):
    """Source text of the user's files that a run names, by the path in the name.

    A run that uses a term or a network of the user's carries its code, so that workers on other machines need no copy
    of the file, and what a finished run was made of stays known.
    """

    files: tuple[tuple[str, str], ...] = ()
    """(path, text), sorted."""

    def text_of(self, path: str) -> str | None:
        """The text of a file, none where it is not among them."""
        return dict(self.files).get(path)

    def only(self, paths: Collection[str]) -> Self:
        """Those of these paths."""
        return type(self)(tuple((path, text) for path, text in self.files if path in paths))

    def to_dict(self) -> dict[str, Any]:
        """Texts by path."""
        return dict(self.files)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            UserError: It is no table of texts.
        """
        require(isinstance(values, Mapping), "sources", "an object of texts by path", values)
        for path, text in values.items():
            require(isinstance(path, str), "sources", "an object whose names are texts", path)
            is_text = isinstance(text, str) and len(text) <= MAX_SOURCE_CHARS
            require(is_text, f"sources.{shown(path)}", f"text of at most {MAX_SOURCE_CHARS} characters", text)
        return cls(tuple(sorted(values.items())))

    def with_overrides(self, overrides: Mapping[str, Any]) -> Self:
        """A copy with files replaced or added."""
        return type(self).from_dict(self.to_dict() | dict(overrides))

    def flat(self) -> dict[str, Any]:
        """Paths to digests of the texts: as one value of a table the text would say less."""
        return {path: digest_of(text) for path, text in self.files}


def digest_of(text: str) -> str:
    """First 16 hex digits of a text's SHA-256."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def _setting(term: str, name: object, value: object) -> Setting:
    require(isinstance(name, str), f"terms.{shown(term)}", "an object whose names are texts", name)
    try:
        return cast(Setting, fitted(value, Setting))
    except MisfitError:
        where = f"terms.{shown(term)}.{shown(name)}"
        wanted = "a finite number, text, true, false, none or a list of numbers"
        raise FieldError("", where, wanted, shown(value)) from None
