"""Decoded images on disk: decoded once per content and image size, memory-mapped by every process after that.

An entry is a folder `images/<key>` with `images.npy` (uint8 [N, C, H, W]), `labels.npy` (int64 [N]) and `meta.json`.
It is written under a file lock into `<key>.partial` and renamed when whole. The kernel releases the lock of a process
that dies, and a `.partial` folder is never read, so a kill at any time costs only the work.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from refilled.data.images import ImageSet, SourcePart, make_image_set
from refilled.errors import UserError

FORMAT_VERSION = 1  # raise when the same source is to be decoded to other pixels, or entries get another layout
# What reading these files raises when they are damaged: NumPy parses a header as Python's own literals, and believes
# its shape; JSON may be nested too deeply. Whatever it was, the entry is made again.
_DAMAGE = (
    *(OSError, EOFError, ValueError, OverflowError, TypeError, KeyError),
    *(MemoryError, RecursionError, SyntaxError, tokenize.TokenError),
)
_log = logging.getLogger(__name__)


def load_cached(part: SourcePart, image_size: int | None, cache: Path) -> ImageSet:
    """The decoded part: from the cache if it is there and whole, else decoded and put there.

    The images are backed by a private (copy-on-write) mapping of the cached file, so that processes share the memory.

    Raises:
        UserError: where the part cannot be read or the cache folder cannot be written.
    """
    key = cache_key(part, image_size)
    found = _read(cache / "images" / key)
    if found is not None:
        return found
    with locked_folder(cache / "images", key) as folder:
        entry = folder / key
        found = _read(entry)  # another process may have decoded it while this one waited for the lock
        if found is not None:
            return found
        _remove_unreadable(entry)
        decoded = part.read(image_size)
        _write(entry, decoded)
        _log.info("Decoded %d %s images into %s", len(decoded), part.name, entry)
        return _read(entry) or decoded


def cache_key(part: SourcePart, image_size: int | None) -> str:
    """32 hex digits naming the entry of a part at an image size."""
    identity = json.dumps([FORMAT_VERSION, part.name, part.fingerprint, image_size])
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


@contextmanager
def locked_folder(folder: Path, name: str) -> Iterator[Path]:
    """Make a folder and hold the lock `<name>.lock` in it; one process at a time is inside.

    Raises:
        UserError: where the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        lock.acquire()
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield folder
    finally:
        lock.release()


def _read(entry: Path) -> ImageSet | None:
    """The entry, or none where it does not exist or is not what was written."""
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        images = np.load(entry / "images.npy", mmap_mode="c", allow_pickle=False)
        labels = np.load(entry / "labels.npy", allow_pickle=False)
        image_set = make_image_set(torch.from_numpy(images), torch.from_numpy(labels), meta["class_names"])
        return image_set if image_set.digest == meta["digest"] else None
    except _DAMAGE:
        return None


def _remove_unreadable(entry: Path) -> None:
    try:
        if entry.exists():
            _log.warning("Cached images in %s are damaged; they are decoded again.", entry)
            shutil.rmtree(entry)
    except OSError as error:
        raise _unwritable(entry.parent, error) from error


def _write(entry: Path, image_set: ImageSet) -> None:
    partial = entry.with_name(f"{entry.name}.partial")
    meta = {"class_names": image_set.class_names, "digest": image_set.digest}
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed: its lock is ours now
        partial.mkdir()
        np.save(partial / "images.npy", image_set.images.numpy())
        np.save(partial / "labels.npy", image_set.labels.numpy())
        (partial / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        partial.rename(entry)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _unwritable(entry.parent, error) from error


def _unwritable(folder: Path, error: OSError) -> UserError:
    reason = error.strerror or type(error).__name__
    return UserError(f"Cache folder {folder} cannot be written ({reason}); name a folder with room and write access.")
