"""Files that appear whole or not at all.

Everything kept on disk is written to a temporary name in the same folder and renamed, so that a kill at any moment
leaves either the old state or the new one.
"""

from __future__ import annotations

import errno
import json
import os
import uuid
from pathlib import Path
from typing import Any

from refilled.errors import StorageFullError, UserError, full_sentence, storage_full


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file's content atomically, flushed to the disk.

    Raises:
        StorageFullError: There is no room; the file stays as it was.
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


def append_to_file(path: Path, content: bytes) -> None:
    """Add to the end of a file, which is made where it is not there; all or nothing, but for a kill.

    Raises:
        StorageFullError: There is no room.
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


def json_bytes(value: object) -> bytes:
    """A value's JSON, indented and ending in a newline."""
    return (json.dumps(value, indent=2) + "\n").encode()


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        FileNotFoundError: It is not there.
        UserError: It is damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # which bytes that are not text raise too
        raise UserError(f"{path} must be a whole JSON file, but cannot be read.") from error


def _named(error: OSError, path: Path) -> OSError | StorageFullError:
    """The error to raise: of a full disk the one that says what to do."""
    is_full = storage_full(error) is not None
    return StorageFullError(full_sentence(path)) if is_full else error


def folder_name(run_key: str) -> str:
    """Of a run in its storage: the key in MLflow has the search's in front."""
    return run_key.partition("-")[2]
