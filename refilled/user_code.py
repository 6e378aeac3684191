"""Classes and functions of the user's own, named `path/file.py:Name` or, in a package, `package.module:name`.

The text of such a file travels inside the run's configuration (`Sources`), so a worker on another machine needs no copy
of it, and what a run was made of is part of its identity. A file may import installed packages, not its neighbours.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
import traceback
import types
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from refilled.config.tables import MAX_SOURCE_CHARS, Sources, digest_of
from refilled.errors import UserError
from refilled.methods import is_of_package
from refilled.user_package import forget_packages, load_from_package, read_package

_PREFIX = "refilled_user_"


def read_source(name: str, field_name: str) -> Sources:
    """The text of the file that `path/file.py:Name` names, or the texts of a package's files.

    Args:
        name: The name as the user wrote it; relative paths are looked up in the current folder.
        field_name: The setting, for the message.

    Raises:
        UserError: The file cannot be read, or is no text of at most `MAX_SOURCE_CHARS` characters.
    """
    if is_of_package(name):
        return read_package(name, field_name)
    path = name.rpartition(":")[0]
    return Sources(((path, read_text(path, field_name, "a Python file")),))


def read_text(path: str, field_name: str, kind: str) -> str:
    """The text of a file that a setting names.

    Raises:
        UserError: It cannot be read, or is no text of at most `MAX_SOURCE_CHARS` characters.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{field_name} must name {kind} that can be read, got {path!r} ({reason}).") from error
    if len(text) > MAX_SOURCE_CHARS:
        raise UserError(f"{field_name} must name a file of at most {MAX_SOURCE_CHARS} characters, got {path!r}.")
    return text


def load_object(name: str, sources: Sources, field_name: str) -> Any:
    """What `path/file.py:Name` names, from the run's own copy of the file.

    Equal texts are run once in a process.

    Args:
        name: `path/file.py:Name` or `package.module:name`.
        sources: The run's, which must hold the file.
        field_name: The setting, for the message.

    Raises:
        UserError: The file is not among the sources, raises an error when it is run, or has no such name.
    """
    if is_of_package(name):
        return load_from_package(name, sources, field_name)
    path, _, attribute = name.rpartition(":")
    text = sources.text_of(path)
    if text is None:
        raise UserError(f"{field_name} {name!r} must come with the text of {path!r} in `sources`, which lacks it.")
    module = _module(path, text, field_name)
    if not hasattr(module, attribute):
        raise UserError(f"{field_name} {name!r} must name something in {path!r}, which has no {attribute!r}.")
    return getattr(module, attribute)


@contextlib.contextmanager
def blaming(names: Collection[str]) -> Iterator[None]:
    """Turn whatever the block raises into one sentence that names the user's files; without any, raise it as it is.

    Args:
        names: What the run names as `path/file.py:Name`.

    Raises:
        UserError: The block raised something, and the user's code has a part in it.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if not names:
            raise
        said = " ".join(str(error).split()) or "no message"
        where = _place_in_users_file(error)
        raise UserError(f"{', '.join(names)} cannot be used: {type(error).__name__}: {said}{where}.") from error


def _place_in_users_file(error: BaseException) -> str:
    """Where in a file of the user's an error was raised, nothing where it was not raised in one."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    return f", in line {frames[-1].lineno} of {frames[-1].filename[1:].rpartition(' ')[0]}" if frames else ""


def _is_users(filename: str) -> bool:
    """As `_module` names what it compiles: `<path digest>`."""
    return filename.startswith("<") and ".py " in filename


def forget_modules() -> None:
    """Drop the modules of the user's files and packages, with whatever state they have gathered."""
    forget_packages()
    for name in [name for name in sys.modules if name.startswith(_PREFIX)]:
        del sys.modules[name]


def _module(path: str, text: str, field_name: str) -> types.ModuleType:
    """The module of a text; its name holds the text's digest, so two versions of one file live side by side."""
    name = f"{_PREFIX}{Path(path).stem}_{digest_of(text)}"
    if name in sys.modules:
        return sys.modules[name]
    module = types.ModuleType(name)
    module.__file__ = f"<{path} {digest_of(text)}>"
    # Tracebacks, docstring tools and torch.compile look a line up here where there is no file.
    linecache.cache[module.__file__] = (len(text), None, text.splitlines(keepends=True), module.__file__)
    sys.modules[name] = module  # dataclasses look their module up while it is being run
    try:
        exec(compile(text, module.__file__, "exec"), module.__dict__)
    except BaseException as error:  # whatever the user's code raises; a module that ran half is none
        del sys.modules[name]
        if not isinstance(error, (Exception, SystemExit)):
            raise
        raised = f"{type(error).__name__}: {error}{_place_in_users_file(error)}"
        raise UserError(
            f"{field_name} must name a Python file that can be run, but {path!r} raises {raised}."
        ) from error
    return module
