"""Banks in an object store: one machine builds a bank and uploads it, others download it (see `storage.mirror`)."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path

from filelock import FileLock

from refilled.embedding_cache.rows import (
    META,
    ROWS,
    USED,
    BankFormat,
    DamagedError,
    open_bank,
    partial_of,
    start_partial,
)
from refilled.storage import mirror

_log = logging.getLogger(__name__)


def upload(path: Path) -> None:
    """Let an object store, if the bank lies in the copy of one, have it too; where it cannot, that is a warning.

    Nothing removes it there but a person, or the store's own rules.
    """
    try:
        for name in (ROWS, META):  # a bank without the second is not looked at
            mirror.push(path / name)
    except OSError as error:
        _log.warning("Bank %s stays on this machine (%s).", path.name, error)


def download(path: Path, bank_format: BankFormat, max_bytes: int) -> None:
    """Get the bank that an object store has to this machine, where it has one; the caller opens it, which checks it.

    Args:
        path: the bank's folder to be, in the copy of the store; one that is there is kept if it is whole.
        bank_format: of the bank.
        max_bytes: as for `start_partial`.

    Raises:
        OSError: as `start_partial`; and the store's own errors.
    """
    source = mirror.mirror_of(path)
    if source is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock")):
        with contextlib.suppress(DamagedError):
            if open_bank(path, bank_format) is not None:
                return
        if not source.has(path / META):
            return
        partial = partial_of(path)
        try:
            start_partial(path, bank_format, max_bytes)
            if all(source.download(path / name, partial / name) for name in (ROWS, META)):
                (partial / USED).touch()
                os.rename(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
