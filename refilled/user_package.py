"""Modules of the user's own package, named `package.module:name`, which travel as texts like single files do.

A package in the user's folders goes along whole, every `.py` file below its top folder, under its own name, so that its
modules import each other as they do at home. One that was installed (`pip install`) does not: it must be installed
wherever a worker runs, and its version counts as its text would.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import sysconfig
import types
from collections.abc import Sequence
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from refilled.config.tables import MAX_SOURCE_CHARS, Sources, digest_of
from refilled.errors import UserError

PREFIX = "package:"
"""Before the paths, below the package's parent folder, of files in `Sources`."""


def top_of(name: str) -> str:
    """The top package of `package.module:name`."""
    return name.partition(":")[0].partition(".")[0]


def files_of(name: str, sources: Sources) -> dict[str, str]:
    """The texts of a name's package among the sources, by key."""
    top = f"{PREFIX}{top_of(name)}"
    return {path: text for path, text in sources.files if path == f"{top}.py" or path.startswith(f"{top}/")}


def read_package(name: str, field_name: str) -> Sources:
    """The texts of the package that a name is in; none where it is installed.

    Args:
        name: `package.module:name`, importable here or from the current folder.
        field_name: The setting, for the message.

    Raises:
        UserError: Python finds no such package, or it is too large.
    """
    top = top_of(name)
    path = _location(top)
    if path is None:
        raise UserError(f"{field_name} must name a module that Python can import, got {name!r}: there is no {top!r}.")
    installed = {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib", "stdlib")}
    if any(each in path.resolve().parents for each in installed):
        return Sources()
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    texts = {}
    for file in files:
        try:
            texts[f"{PREFIX}{file.relative_to(path.parent).as_posix()}"] = file.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise UserError(f"{field_name} {name!r} cannot be read: {file} ({error}).") from error
    if sum(map(len, texts.values())) > MAX_SOURCE_CHARS:
        raise UserError(
            f"{field_name} must name a package of at most {MAX_SOURCE_CHARS} characters in all, got {top!r}; install "
            "it wherever workers run instead."
        )
    return Sources(tuple(sorted(texts.items())))


def identity_of_package(name: str, sources: Sources) -> str:
    """What a name is, wherever its files lie: its package's digest, or where that is installed its version."""
    texts = files_of(name, sources)
    if texts:
        return f"{digest_of(repr(sorted(texts.items())))}:{name}"
    distributions = packages_distributions().get(top_of(name), ())
    return f"{name} {' '.join(sorted({f'{each} {version(each)}' for each in distributions}))}"


def load_from_package(name: str, sources: Sources, field_name: str) -> Any:
    """What `package.module:name` names, from the run's own copy of the package where it has one.

    Raises:
        UserError: The module cannot be imported, or has no such name.
    """
    module_name, _, attribute = name.partition(":")
    texts = files_of(name, sources)
    if texts and not _is_imported_alike(name, texts):
        _Finder.serve(top_of(name), texts)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        said = " ".join(str(error).split())
        raise UserError(
            f"{field_name} must name a module that can be imported, but {module_name!r} raises "
            f"{type(error).__name__}: {said.rstrip('.')}."
        ) from error
    if not hasattr(module, attribute):
        raise UserError(f"{field_name} {name!r} must name something in {module_name}, which has no {attribute!r}.")
    return getattr(module, attribute)


def _is_imported_alike(name: str, texts: dict[str, str]) -> bool:
    """Whether the process has imported the package itself, as from a notebook, and its files are what the run has."""
    module = sys.modules.get(top_of(name))
    if module is None or isinstance(getattr(module.__spec__, "loader", None), _Finder):
        return False
    return dict(read_package(name, "model").files) == texts


def _location(top: str) -> Path | None:
    """The package's folder, or its file where it is a single module; looked for in the current folder too."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    finally:
        if added:
            sys.path.remove(here)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds and loads the modules of one package from texts."""

    def __init__(self, top: str, texts: dict[str, str]) -> None:
        self._top, self.texts = top, texts

    @classmethod
    def serve(cls, top: str, texts: dict[str, str]) -> None:
        """Let imports of a package find these texts first; modules of other texts are forgotten."""
        present = [each for each in sys.meta_path if isinstance(each, cls) and each._top == top]
        if any(each.texts == texts for each in present):
            return
        sys.meta_path[:] = [each for each in sys.meta_path if each not in present]
        sys.meta_path.insert(0, cls(top, texts))
        for name in [name for name in sys.modules if name == top or name.startswith(f"{top}.")]:
            del sys.modules[name]
        importlib.invalidate_caches()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A module of the package, none of others."""
        if fullname != self._top and not fullname.startswith(f"{self._top}."):
            return None
        is_package = self.is_package(fullname)
        if not is_package and self._key(fullname) is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=f"<{fullname}>", is_package=is_package)

    def get_source(self, fullname: str) -> str:
        """The module's text; of a folder without `__init__.py` an empty one."""
        key = self._key(fullname)
        return "" if key is None else self.texts[key]

    def is_package(self, fullname: str) -> bool:
        """Whether it is a folder."""
        return any(key.startswith(f"{PREFIX}{fullname.replace('.', '/')}/") for key in self.texts)

    def _key(self, fullname: str) -> str | None:
        base = f"{PREFIX}{fullname.replace('.', '/')}"
        return next((key for key in (f"{base}/__init__.py", f"{base}.py") if key in self.texts), None)


def forget_packages() -> None:
    """Drop all packages that came as texts, with their modules."""
    for finder in [each for each in sys.meta_path if isinstance(each, _Finder)]:
        sys.meta_path.remove(finder)
        top = finder._top
        for name in [name for name in sys.modules if name == top or name.startswith(f"{top}.")]:
            del sys.modules[name]
