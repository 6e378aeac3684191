"""The exceptions that are meant for the person at the keyboard."""

from __future__ import annotations

import errno
import sqlite3


class UserError(ValueError):
    """Something the user gave is wrong.

    The message is one sentence that names the field or file and says what would be right. Commands print it on
    stderr, without a traceback, and exit with code 2.
    """


class StorageFullError(UserError):
    """There is no room left where something must be kept; what was there is whole."""


class DataChangedError(UserError):
    """Images are no longer those with which a search, or a run, began."""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def storage_full(error: BaseException) -> StorageFullError | None:
    """What to say of an error that comes from a full disk, none of any other.

    Args:
        error: An error of this program, or of a library that met it on the way; its causes are looked at too.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, StorageFullError):
            return seen
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return StorageFullError(full_sentence(seen.filename))
        if isinstance(seen, sqlite3.Error) and getattr(seen, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            return StorageFullError(full_sentence(None))
        seen = seen.__cause__ or seen.__context__
    return None


def full_sentence(place: object) -> str:
    """Where there is no room, and what to do."""
    where = f"The disk of {place}" if place else "The disk"
    return f"{where} is full: free some space and start the same command again, which continues."
