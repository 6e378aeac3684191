"""From a preset to a command line: every field of the configuration is a flag, its docstring the help.

The flags are made from the preset's instance, so `--help` shows that preset's values, and what the user gives comes
back as dotted overrides through `Config.with_overrides`, the same door a sampled trial uses.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Callable, Collection, Sequence
from dataclasses import field, make_dataclass
from typing import Annotated, Any, TypeVar

import docstring_parser
from cyclopts import Parameter

from refilled.command import exit_code, new_app
from refilled.config import Config
from refilled.presets import PRESETS

ConfigT = TypeVar("ConfigT", bound=Config)


def run_command(
    name: str,
    help_text: str,
    start: Callable[[str], ConfigT],
    main: Callable[[ConfigT], int],
    *,
    hidden: Collection[str] = (),
    inlined: Collection[str] = (),
    arguments: Sequence[str] | None = None,
) -> int:
    """Parse `[PRESET] [--flag value ...]`, apply the flags to the preset, run `main`, return the exit code.

    Args:
        name: of the command, before its error messages.
        help_text: first lines of `--help`.
        start: from a preset's name to the configuration whose fields become flags.
        main: what the command does.
        hidden: dotted names of fields that are no flags.
        inlined: nested configurations whose fields are flags without a prefix.
        arguments: instead of the process's.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    preset_name = given.pop(0) if given and not given[0].startswith("-") else "smoke"
    app = new_app(
        name, f"{help_text}\n\nPRESET is one of {', '.join(PRESETS)}; values below are those of {preset_name}."
    )
    app.usage = f"Usage: {name} [PRESET] [OPTIONS]"

    def command() -> int:  # the preset is looked up inside, so that an unknown one is a user error like others
        config = start(preset_name)
        flags = _flags_class(config, hidden=set(hidden), inlined=set(inlined), prefix="")

        def parsed(*, flags: Annotated[Any, Parameter(name="*")]) -> int:
            return main(config.with_overrides(_changes(flags, config, inlined=set(inlined), prefix="")))

        parsed.__annotations__["flags"] = Annotated[flags, Parameter(name="*")]  # a class made at run time
        parsed.__kwdefaults__ = {"flags": None}
        app.default(parsed)
        code = app(given)
        return code if isinstance(code, int) else 0

    return exit_code(name, command)


def field_help(cls: type) -> dict[str, str]:
    """Field names to their docstrings."""
    parsed = docstring_parser.parse_from_object(cls)
    return {each.arg_name: (each.description or "") for each in parsed.params}


def _flags_class(config: Config, *, hidden: set[str], inlined: set[str], prefix: str) -> type:
    hints, documented = typing.get_type_hints(type(config)), field_help(type(config))
    fields: list[Any] = []
    for each in dataclasses.fields(config):  # type: ignore[arg-type]
        dotted = f"{prefix}{each.name}"
        if dotted in hidden:
            continue
        value = getattr(config, each.name)
        if isinstance(value, Config):
            inner = _flags_class(value, hidden=hidden, inlined=inlined, prefix=f"{dotted}.")
            parameter = Parameter(name="*") if dotted in inlined else Parameter()
            fields.append((each.name, Annotated[inner, parameter], field(default_factory=inner)))
        else:
            shown = "none" if value is None else None
            parameter = Parameter(
                help=documented.get(each.name, ""),
                consume_multiple=isinstance(value, tuple),
                negative=None if hints[each.name] in (bool, bool | None) else "",
                show_default=(lambda _: "none") if shown else None,
            )
            fields.append((each.name, Annotated[hints[each.name], parameter], field(default=value)))
    here = {"__module__": __name__}  # cyclopts takes classes of make_dataclass's own module for built-in types
    return make_dataclass(type(config).__name__, fields, namespace=here, frozen=True, kw_only=True)


def _changes(flags: Any, config: Config, *, inlined: set[str], prefix: str) -> dict[str, Any]:
    """Dotted names to the values that differ from the preset's."""
    changes: dict[str, Any] = {}
    if flags is None:
        return changes
    for each in dataclasses.fields(flags):
        value, before = getattr(flags, each.name), getattr(config, each.name)
        if isinstance(before, Config):
            changes |= _changes(value, before, inlined=inlined, prefix=f"{prefix}{each.name}.")
        elif value != before:
            changes[f"{prefix}{each.name}"] = value
    return changes
