"""From a preset to a command line: every field of the configuration is a flag, its docstring the help.

The flags are made from the preset's instance, so `--help` shows that preset's values, and what the user gives comes
back as dotted overrides through `Config.with_overrides`, the same door a sampled trial uses. Methods are read first:
the settings of their terms are flags too.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import field, make_dataclass
from typing import Annotated, Any, TypeVar

import cyclopts
import docstring_parser
from cyclopts import Parameter, Token

from refilled.command import exit_code, new_app
from refilled.config import Config, RunConfig, TermConfig, TermSettings
from refilled.config.fields import Range, bounds_of
from refilled.errors import UserError
from refilled.methods import user_terms
from refilled.presets import PRESETS
from refilled.stages import stages_of, term_config, with_own_code
from refilled.terms import Term
from refilled.user_code import blaming

ConfigT = TypeVar("ConfigT", bound=Config)


def run_command(
    name: str,
    help_text: str,
    start: Callable[[str, tuple[str, ...]], ConfigT],
    main: Callable[[ConfigT], int],
    *,
    terms: Callable[[ConfigT], Mapping[str, TermConfig]],
    beside_method: str = "",
    hidden: Collection[str] = (),
    inlined: Collection[str] = (),
    arguments: Sequence[str] | None = None,
) -> int:
    """Parse `[PRESET] [--flag value ...]`, apply the flags to the preset, run `main`, return the exit code.

    Args:
        name: The name of the command, before its error messages.
        help_text: First lines of `--help`.
        start: Makes, of a preset's name and the methods that the user gives, if any, the configuration whose fields
            become flags.
        main: What the command does.
        terms: Settings of the loss terms, by the term's name; they are flags `--TERM.NAME`.
        beside_method: `--method A` stands for this method and A; empty: for A alone.
        hidden: Dotted names of fields that are no flags.
        inlined: Nested configurations whose fields are flags without a prefix.
        arguments: Instead of the process's.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    preset_name = given.pop(0) if given and not given[0].startswith("-") else "smoke"
    app = new_app(
        name, f"{help_text}\n\nPRESET is one of {', '.join(PRESETS)}; values below are those of {preset_name}."
    )
    app.usage = f"Usage: {name} [PRESET] [OPTIONS]"

    def command() -> int:  # the preset is looked up inside, so that an unknown one is a user error like others
        methods, others = _methods(given, beside_method)
        config = start(preset_name, methods)
        maker = _Flags(terms(config), set(hidden), set(inlined))
        flags = maker.of(config)

        def parsed(*, flags: Annotated[Any, Parameter(name="*")]) -> int:
            return main(config.with_overrides(maker.changes(flags, config)))

        parsed.__annotations__["flags"] = Annotated[flags, Parameter(name="*")]  # a class made at run time
        parsed.__kwdefaults__ = {"flags": flags()}  # not None, which cyclopts refuses where Pydantic is loaded
        app.default(parsed)
        code = app(others)
        return code if isinstance(code, int) else 0

    return exit_code(name, command)


def term_configs(run: RunConfig, methods: Iterable[str]) -> dict[str, TermConfig]:
    """The settings of all terms of some methods that have no place of their own in a run, by the term's name."""
    found: dict[str, TermConfig] = {}
    classes: dict[str, type[Term]] = {}
    for method in methods:
        own = dataclasses.replace(run, method=method, epochs=(1, 1))
        with blaming(user_terms(method)):
            own = with_own_code(own)
            for term in (term for stage in stages_of(own) for term in stage.terms):
                if classes.setdefault(term.name, term) is not term:
                    raise UserError(f"methods must have terms of different names, but two are called {term.name!r}.")
                if not term.place and dataclasses.fields(term.Config):
                    found[term.name] = term_config(term, own)
                    _Flags({}, set(), set()).of(found[term.name])
    return found


def _methods(arguments: Sequence[str], beside_method: str) -> tuple[tuple[str, ...], list[str]]:
    """The methods that are given, and the other arguments.

    Raises:
        UserError: Both forms are given, or one of them without a value.
    """
    found: dict[str, list[str]] = {}
    others: list[str] = []
    position = 0
    while position < len(arguments):
        flag, equals, value = arguments[position].partition("=")
        position += 1
        if flag not in ("--methods", "--method"):
            others.append(arguments[position - 1])
            continue
        values = found.setdefault(flag, [])
        if equals:
            values.append(value)
        while position < len(arguments) and not arguments[position].startswith("-") and not (equals and values):
            values.append(arguments[position])
            position += 1
    for flag, values in found.items():
        if not values:
            raise UserError(f"{flag} must be followed by a method.")
    if len(found) > 1:
        raise UserError("--methods and --method must not both be given.")
    if "--method" in found:
        if len(found["--method"]) > 1:
            raise UserError(f"--method must be followed by one method, got {' '.join(found['--method'])}.")
        return tuple(dict.fromkeys([*([beside_method] if beside_method else []), *found["--method"]])), others
    return tuple(found.get("--methods", ())), others


def field_help(cls: type) -> dict[str, str]:
    """Field names to their docstrings, inherited ones included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            found |= {
                each.arg_name: (each.description or "") for each in docstring_parser.parse_from_object(base).params
            }
    return found


class _Flags:
    """Classes whose fields are flags, and the way back to dotted names."""

    def __init__(self, terms: Mapping[str, TermConfig], hidden: set[str], inlined: set[str]) -> None:
        self._terms, self._hidden, self._inlined = terms, hidden, inlined

    def of(self, config: Config, prefix: str = "") -> type:
        """The class for a configuration."""
        if isinstance(config, TermSettings):
            return _made("Terms", [self._nested(name, each, f"{prefix}{name}") for name, each in self._terms.items()])
        hints, documented = config.field_types(), field_help(type(config))
        fields: list[Any] = []
        for each in dataclasses.fields(config):
            dotted, value = f"{prefix}{each.name}", getattr(config, each.name)
            if dotted in self._hidden:
                continue
            if isinstance(value, TermSettings) and not self._terms:
                continue
            if isinstance(value, Config):
                fields.append(self._nested(each.name, value, dotted))
                continue
            bounds = bounds_of(hints[each.name])
            parameter = Parameter(
                help=documented.get(each.name, ""),
                consume_multiple=_is_list(hints[each.name]),
                negative=None if hints[each.name] in (bool, bool | None) else "",
                show_default=functools.partial(_default, bounds) if bounds or value is None else None,
                converter=_whole if _holds_whole_numbers(hints[each.name]) else None,
            )
            fields.append((each.name, Annotated[hints[each.name], parameter], field(default=value)))
        return _made(type(config).__name__, fields)

    def _nested(self, name: str, config: Config, dotted: str) -> Any:
        inner = self.of(config, f"{dotted}.")
        parameter = Parameter(name="*") if dotted in self._inlined else Parameter()
        return name, Annotated[inner, parameter], field(default_factory=inner)

    def changes(self, flags: Any, config: Config, prefix: str = "") -> dict[str, Any]:
        """Dotted names to the values that differ from the preset's."""
        found: dict[str, Any] = {}
        for each in dataclasses.fields(flags):
            value = getattr(flags, each.name)
            before = self._terms[each.name] if isinstance(config, TermSettings) else getattr(config, each.name)
            if isinstance(before, Config):
                found |= self.changes(value, before, f"{prefix}{each.name}.")
            elif value != before:
                found[f"{prefix}{each.name}"] = value
        return found


def _is_list(hint: Any) -> bool:
    """Whether a type takes several values, be it optional."""
    return typing.get_origin(hint) is tuple or any(map(_is_list, typing.get_args(hint)))


def _holds_whole_numbers(hint: Any) -> bool:
    """Whether the numbers that a type takes, be it a list's, optional or beside words, are all whole."""
    leaves = set(_leaves(hint))
    return int in leaves and float not in leaves


def _leaves(hint: Any) -> Iterator[Any]:
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is Annotated:
        inner = inner[:1]
    if not inner:
        yield hint
    for each in inner:
        yield from _leaves(each)


def _whole(hint: Any, tokens: Sequence[Token]) -> Any:
    """Whole numbers of the command line, of which cyclopts would round those with a point.

    Raises:
        CycloptsError: Naming the flag.
    """
    for token in tokens:
        if "." in token.value:
            raise cyclopts.CycloptsError(msg=f"{token.keyword} must be a whole number, got {token.value}.")
    return cyclopts.convert(hint, tokens)


def _default(bounds: Range | None, value: object) -> str:
    shown = "none" if value is None else str(value)
    return f"{shown}; {bounds}" if bounds else shown


def _made(name: str, fields: list[Any]) -> type:
    here = {"__module__": __name__}  # cyclopts takes classes of make_dataclass's own module for built-in types
    return make_dataclass(name, fields, namespace=here, frozen=True, kw_only=True)
