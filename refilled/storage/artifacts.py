"""Artifacts: folders named by the hash of what made them, made once, whole or not there, checked when opened.

They lie in `cache/KIND/KEY/` (see `artifact_folder`). All can be deleted at any time: what is missing is made again, of
the same content.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from refilled import distributed
from refilled.errors import UserError
from refilled.storage.artifact_folder import (
    MANIFEST,
    USED,
    Artifact,
    DamagedError,
    discard,
    files_of,
    locked,
    make_room,
    open_whole,
    partial_of,
    seal,
    start,
    verify,
)
from refilled.storage.files import read_json
from refilled.storage.storage import Storage

FOLDER = "cache"  # of the storage
_Value = TypeVar("_Value")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """A kind of artifact.

    Attributes:
        name: Name of its folder.
        is_local: Every machine, and every worker of a group for itself, sees to its own; else it is made once for all
            machines, by the workers of a group together.
    """

    name: str
    is_local: bool = False


class Artifacts:
    """The artifacts of a storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def folder(self, kind: Kind, key: str) -> Path:
        """Where an artifact is or will be."""
        return self._storage.root / FOLDER / kind.name / key

    def open(self, kind: Kind, key: str, *, max_bytes: int | None = None) -> Artifact | None:
        """An artifact, if it is there and whole, and for kinds that workers share, if all of a group have it.

        Args:
            kind: Its kind.
            key: The hash of what made it.
            max_bytes: What all of the kind may take on this machine, should it have to be downloaded; none: any size.
        """
        return self._open(kind, key, max_bytes)

    def _open(self, kind: Kind, key: str, max_bytes: int | None, *, quiet: bool = False) -> Artifact | None:
        """See `open`; `quiet` where the same was looked at, and warned of, just before."""
        folder = self.folder(kind, key)
        found = open_whole(folder, quiet=quiet)
        if found is None and self._storage.is_remote and not kind.is_local:
            try:
                self._download(folder, max_bytes)
            except (DamagedError, UserError, OSError) as error:
                if not quiet:
                    _log.warning("%s %s cannot be downloaded (%s).", kind.name, key, error)
            found = open_whole(folder, quiet=True)
        if kind.is_local:
            return found
        return found if distributed.everyone(found is not None) else None

    def make(
        self,
        kind: Kind,
        key: str,
        build: Callable[[Path | None], Mapping[str, Any]],
        *,
        wait: bool = True,
        reserve: Mapping[str, int] | None = None,
        max_bytes: int | None = None,
    ) -> Artifact | None:
        """An artifact, made here unless it is there; none where others are making it and nobody waits.

        Of a kind that is not local all workers of a group call it, and each calls `build`.

        Args:
            kind: Its kind.
            key: The hash of what makes it.
            build: Takes the folder to write files into, none on workers other than the first, and returns what is to
                be said about the artifact, as plain data.
            wait: Whether to wait for others who are making it.
            reserve: Sizes in bytes of files that are there, as large, before `build` is called: a disk that is too full
                is found before the work is done.
            max_bytes: What all of the kind may take on this machine; the least recently used go. None: any size.

        Raises:
            OSError: It cannot be written, or read by one of them, on all workers alike.
        """
        found = self.open(kind, key, max_bytes=max_bytes)
        if found is not None:
            return found
        folder = self.folder(kind, key)
        with self._making(kind, folder, wait) as here:
            if not here:
                return None
            found = self._open(kind, key, max_bytes, quiet=True)  # who had the lock before may have made it
            if found is not None:
                return found
            writes = kind.is_local or distributed.rank() == 0
            try:
                partial = _on_all(kind, lambda: start(folder, reserve or {}, max_bytes) if writes else None)
                about = _on_all(kind, lambda: build(partial))
                _on_all(kind, lambda: self._seal(kind, folder, about) if writes else None)
            finally:
                if writes:
                    shutil.rmtree(partial_of(folder), ignore_errors=True)
            found = self._open(kind, key, max_bytes)
            if found is None:
                raise OSError("a worker cannot read what was written")
            return found

    def _making(self, kind: Kind, folder: Path, wait: bool) -> contextlib.AbstractContextManager[bool]:
        if kind.is_local:
            return locked(folder, wait=wait)
        return self._storage.exclusive(folder, wait=wait)

    def _seal(self, kind: Kind, folder: Path, about: Mapping[str, Any]) -> None:
        names = seal(folder, about)
        if not kind.is_local:
            try:
                self._storage.publish(folder, [*names, MANIFEST])
            except OSError as error:
                _log.warning("%s %s stays on this machine (%s).", kind.name, folder.name, error)

    def _download(self, folder: Path, max_bytes: int | None) -> None:
        """Get an artifact, if an object store has it.

        Raises:
            DamagedError, UserError: It is damaged there.
            OSError: There is no room for it, or the store fails.
        """
        target = folder.with_name(f"{folder.name}.download")  # beside what a maker here may be writing
        with locked(target, wait=True):
            if open_whole(folder, quiet=True) is not None:  # another process of this machine was first
                return
            partial = start(target, {}, None)
            try:
                if not self._storage.obtain(folder, MANIFEST, partial / MANIFEST):
                    return
                files = files_of(read_json(partial / MANIFEST))
                if max_bytes is not None:
                    make_room(folder.parent, max_bytes - sum(size for size, _ in files.values()))
                if all(self._storage.obtain(folder, name, partial / name) for name in files):
                    (partial / USED).touch()
                    verify(partial)
                    discard(folder)
                    os.rename(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)


def _on_all(kind: Kind, action: Callable[[], _Value]) -> _Value:
    """Do something on every worker of a group; where it fails on one for the file system, all raise."""
    error: OSError | None = None
    try:
        value = action()
    except OSError as failure:
        error = failure
    if error is None and (kind.is_local or distributed.everyone(True)):
        return value
    if error is not None and not kind.is_local:
        distributed.everyone(False)
    raise error or OSError("another worker could not write it")
