"""Files that appear whole or not at all, and work that one process does while others wait.

Everything kept on disk is written to a temporary name in the same folder and renamed, so that a kill at any moment
leaves either the old state or the new one. Where the storage is an object store's, a file is uploaded before its
writer goes on (see `refilled.storage.mirror`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from refilled import distributed
from refilled.errors import StorageFullError, UserError, full_sentence, storage_full
from refilled.storage import mirror

WAIT_S = 30.0  # how long a group waits for a lock before its workers talk to each other


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file's content atomically, flushed to the disk.

    Raises:
        StorageFullError: there is no room; the file stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _named(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)
    mirror.push(path)


def append_bytes(path: Path, content: bytes) -> None:
    """Add to the end of a file, which is made where it is not there; all or nothing, but for a kill.

    Raises:
        StorageFullError: there is no room.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab", buffering=0) as file:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        if path.exists():
            os.truncate(path, size)
        raise _named(error, path) from error
    mirror.push(path)


def _named(error: OSError, path: Path) -> OSError | StorageFullError:
    """The error to raise: of a full disk the one that says what to do."""
    is_full = storage_full(error) is not None
    return StorageFullError(full_sentence(path)) if is_full else error


def write_json(path: Path, value: object) -> None:
    """Replace a file by a value's JSON, indented and ending in a newline."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        FileNotFoundError: it is not there.
        UserError: it is damaged.
    """
    mirror.fetch(path)
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # which bytes that are not text raise too
        raise UserError(f"{path} must be a whole JSON file, but cannot be read.") from error


@contextlib.contextmanager
def only_here(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Let one process, or one group of workers, at a time work on `path`; others wait.

    Rank 0 holds the lock for its group. The kernel releases it when that process dies. While waiting the group talks to
    each other now and then, so that no collective runs into its time-out.

    Args:
        path: what is worked on; it need not exist.
        wait: whether to wait while others work on it.

    Yields:
        Whether the work may be done here, always true where it waits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    timeout_s = WAIT_S if wait else 0.0
    here = distributed.agree(distributed.rank() != 0 or _acquire(lock, timeout_s))
    while wait and not here:
        here = distributed.agree(distributed.rank() != 0 or _acquire(lock, timeout_s))
    try:
        yield here
    finally:
        if here and distributed.rank() == 0:
            lock.release()


def _acquire(lock: FileLock, timeout_s: float) -> bool:
    try:
        lock.acquire(timeout=timeout_s)
    except Timeout:
        return False
    return True


def require_writable(folder: Path, field_name: str) -> None:
    """Create a folder if need be and prove that files can be written to it.

    Raises:
        UserError: naming the field and the folder.
    """
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{field_name} must be a folder that can be written, got {folder} ({error.strerror})."
        ) from error
