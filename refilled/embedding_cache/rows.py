"""Banks on disk: whole or not there, checked when opened, bounded in size.

    banks/KEY/embeddings.bin   little-endian rows [N, V, D]
    banks/KEY/meta.json        shape, type, checksum, what they were made from and with
    banks/KEY/used             touched whenever the bank is opened
    banks/KEY.partial/         a bank being built, or what a killed process left of one
    banks/KEY.lock             held by whoever builds or deletes that bank

Whoever has a bank open holds a shared lock on its rows, and only a bank that nobody has open makes room for another: on
one machine a deleted file stays readable where it is mapped, but over NFS the reader would be killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import mmap
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from filelock import FileLock, Timeout

from refilled.storage.store import read_json, write_json

Rows = np.ndarray[Any, np.dtype[Any]]
ROWS, META, USED, PARTIAL = "embeddings.bin", "meta.json", "used", ".partial"
_CHUNK_BYTES = 2**22
_verified: set[tuple[str, int, int, int]] = set()  # path, inode, time and size of the files this process has checked


class NoRoomError(OSError):
    """Banks that are open or being built leave too little of what all banks may take together."""


class DamagedError(ValueError):
    """A bank's files do not hold what they should; the message says what is wrong."""


@dataclass(frozen=True)
class BankFormat:
    """What a bank's rows look like.

    Attributes:
        num_images: N.
        num_views: V.
        dim: D.
        dtype: of the stored numbers.
    """

    num_images: int
    num_views: int
    dim: int
    dtype: Literal["float16", "float32"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """[N, V, D]."""
        return self.num_images, self.num_views, self.dim

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Little-endian, whatever machine wrote it."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def num_bytes(self) -> int:
        """Size of the rows."""
        return math.prod(self.shape) * self.numpy_dtype.itemsize

    def to_dict(self) -> dict[str, Any]:
        """As `meta.json` holds it."""
        return {"shape": list(self.shape), "dtype": self.dtype}


def open_bank(path: Path, expected: BankFormat) -> Rows | None:
    """Map a finished bank, or say there is none.

    The checksum is compared once for each process and file: trials come and go in a process, and share the check.

    Args:
        path: the bank's folder.
        expected: what it must hold.

    Returns:
        [N x V, D], read-only; row i x V + v is the v-th view of image i. While it lives the bank is not deleted.

    Raises:
        DamagedError: something is there, but not a whole bank of this format.
    """
    if not path.exists():
        return None
    try:
        meta = _meta(path / META)
        with (path / ROWS).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            _verify(path / ROWS, file, meta, expected)
            mapped = mmap.mmap(
                file.fileno(), 0, access=mmap.ACCESS_READ
            )  # has its own copy of the file: keeps the lock
    except FileNotFoundError as error:
        if not path.exists():
            return None  # deleted between two looks
        raise DamagedError(f"{Path(error.filename).name} is missing") from None
    except BlockingIOError:
        return None  # just being deleted
    with contextlib.suppress(OSError):  # a bank that can only be read is still a bank
        (path / USED).touch()
    return np.frombuffer(mapped, dtype=expected.numpy_dtype).reshape(-1, expected.dim)


def _meta(path: Path) -> Any:
    try:
        return read_json(path)
    except (ValueError, RecursionError):  # neither UTF-8 nor JSON, or JSON nested too deeply
        raise DamagedError(f"{META} is not JSON") from None


def _verify(path: Path, file: BinaryIO, meta: Any, expected: BankFormat) -> None:
    status = os.fstat(file.fileno())
    identity = str(path), status.st_ino, status.st_mtime_ns, status.st_size
    if not isinstance(meta, dict) or {name: meta.get(name) for name in expected.to_dict()} != expected.to_dict():
        raise DamagedError(f"{META} does not describe {list(expected.shape)} numbers of {expected.dtype}")
    if status.st_size != expected.num_bytes:
        raise DamagedError(f"{ROWS} has {status.st_size} bytes instead of {expected.num_bytes}")
    if identity not in _verified:
        if _checksum(file) != meta.get("crc32"):
            raise DamagedError(f"{ROWS} does not have the checksum that {META} says")
        _verified.add(identity)


def _checksum(file: BinaryIO) -> int:
    """CRC-32 of a whole file: of what the standard library has, the fastest everywhere, and damage is no attack."""
    file.seek(0)
    value, buffer = 0, memoryview(bytearray(_CHUNK_BYTES))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        value = zlib.crc32(buffer[:count], value)
    return value


def start_partial(path: Path, bank_format: BankFormat, max_bytes: int) -> None:
    """Make room for a bank and reserve it. The caller holds the bank's lock.

    Args:
        path: the bank's folder to be; one that is there is damaged, and deleted.
        bank_format: of the bank.
        max_bytes: what all banks of the folder may take, at least what this one needs.

    Raises:
        NoRoomError: the other banks are all open, or being built.
        OSError: the file system does not have the room.
    """
    partial = partial_of(path)
    with FileLock(path.with_name("room.lock")):  # two builders must not count on the same room
        discard(path)
        shutil.rmtree(partial, ignore_errors=True)
        _make_room(path.parent, max_bytes - bank_format.num_bytes)
        partial.mkdir()
        with (partial / ROWS).open("wb") as file:
            if sys.platform == "linux":  # finds out now, not after the teacher's work, that the disk is full
                os.posix_fallocate(file.fileno(), 0, bank_format.num_bytes)
            else:
                file.truncate(bank_format.num_bytes)


def seal_partial(path: Path, bank_format: BankFormat, origin: dict[str, Any]) -> None:
    """Turn the rows that were written into a bank. The caller holds the bank's lock.

    Args:
        path: the bank's folder to be.
        bank_format: of the bank.
        origin: what `meta.json` says besides.
    """
    partial = partial_of(path)
    with (partial / ROWS).open("rb") as file:
        write_json(partial / META, bank_format.to_dict() | {"crc32": _checksum(file)} | origin)
    (partial / USED).touch()
    os.rename(partial, path)


def discard(path: Path) -> None:
    """Delete a bank so that a kill in between leaves a partial bank and never a damaged one; the lock is held."""
    if path.exists():
        partial = partial_of(path)
        shutil.rmtree(partial, ignore_errors=True)
        os.rename(path, partial)
        shutil.rmtree(partial)


def partial_of(path: Path) -> Path:
    """Where a bank is while it is being built."""
    return path.with_name(f"{path.name}{PARTIAL}")


def _make_room(folder: Path, limit_bytes: int) -> None:
    """Delete what killed builders left, then the least recently used banks, until the rest takes at most the limit."""
    for partial in folder.glob(f"*{PARTIAL}"):
        with _if_free(partial.with_name(partial.name.removesuffix(PARTIAL))) as here:
            if here:
                shutil.rmtree(partial, ignore_errors=True)
    total = sum(_num_bytes(each) for each in _folders(folder))
    finished = [each for each in _folders(folder) if each.suffix != PARTIAL]
    for bank in sorted(finished, key=_last_used):
        if total <= limit_bytes:
            break
        size = _num_bytes(bank)
        if _discard_unless_open(bank):
            total -= size
    if total > limit_bytes:
        raise NoRoomError(f"banks that are in use take {total / 2**30:.2f} GiB")


def _discard_unless_open(bank: Path) -> bool:
    with _if_free(bank) as here:
        if not here:
            return False
        try:
            with (bank / ROWS).open("r+b") as file:  # over NFS an exclusive lock needs a file open for writing
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                discard(bank)
        except BlockingIOError:
            return False
        except FileNotFoundError:
            discard(bank)  # damaged: there are no rows that anybody could have open
        return True


@contextlib.contextmanager
def _if_free(bank: Path) -> Iterator[bool]:
    """Hold a bank's lock where nobody does; the lock of `only_here`, but taken by one process and not by its group."""
    lock = FileLock(bank.with_name(f"{bank.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _folders(folder: Path) -> Iterator[Path]:
    return (each for each in folder.iterdir() if each.is_dir())


def _num_bytes(folder: Path) -> int:
    """Size of a folder's files, 0 of those that go away meanwhile."""
    total = 0
    for each in folder.glob("*"):
        try:
            total += each.stat().st_size
        except FileNotFoundError:
            continue
    return total


def _last_used(bank: Path) -> int:
    """When a bank was opened last, in nanoseconds; 0 where nothing says."""
    try:
        return (bank / USED).stat().st_mtime_ns
    except FileNotFoundError:
        return 0
