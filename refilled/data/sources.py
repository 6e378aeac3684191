"""From a source string to its images: a new source is one file beside this one and a line a table here.

Training and test images are separate from the start. Reading the training part opens no test file (of a zip: no test
member), so nothing in the test part can change what a search sees.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from refilled.data import cifar100, digits, imagefolder, parquet
from refilled.data.cache import load_cached
from refilled.data.images import ImageSet, PartName, SourcePart
from refilled.data.text import one_line, shown
from refilled.errors import UserError
from refilled.storage import Storage

KINDS = ("digits", "cifar100", "parquet:PATH", "imagefolder:PATH")
_VALIDATE: dict[str, Callable[[Path], None]] = {"parquet": parquet.validate, "imagefolder": imagefolder.validate}
_FIND_PART: dict[str, Callable[[Path, PartName], SourcePart]] = {
    "parquet": parquet.find_part,
    "imagefolder": imagefolder.find_part,
}


def load_train(
    source: str, *, storage: Storage, image_size: int | None = None, max_bytes: int | None = None
) -> ImageSet:
    """All training images of a source, decoded once per content and image size.

    Args:
        source: `digits`, cifar100, parquet:PATH or imagefolder:PATH.
        storage: Keeps decoded images and downloads.
        image_size: Side of the images after resizing the shorter side and cropping the centre; none: as stored, which
            must then be one size.
        max_bytes: Where all pixels take more, they stay in a file (`refilled.data.pixels`); none: any number.

    Raises:
        UserError: Naming the source, file or folder that is wrong.
    """
    return _load(source, "train", storage, image_size, max_bytes)


def load_test(
    source: str, *, storage: Storage, image_size: int | None = None, max_bytes: int | None = None
) -> ImageSet:
    """All test images of a source; arguments and errors as in `load_train`."""
    return _load(source, "test", storage, image_size, max_bytes)


def validate_source(source: str) -> None:
    """Cheap check that a source can be meant: its kind, that its path exists and holds a part. Decodes nothing.

    Raises:
        UserError: Naming the four kinds, the path, or the layout the path would need.
    """
    kind, path = _parse(source)
    if path is not None:
        _VALIDATE[kind](path)


def _load(source: str, name: PartName, storage: Storage, image_size: int | None, max_bytes: int | None) -> ImageSet:
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size must be at least 1 or none, got {image_size}.")
    return load_cached(_find(source, name, storage), image_size, storage, max_bytes)


def _find(source: str, name: PartName, storage: Storage) -> SourcePart:
    kind, path = _parse(source)
    if path is not None:
        return _FIND_PART[kind](path, name)
    return digits.find_part(name) if kind == "digits" else cifar100.find_part(name, storage)


def _parse(source: str) -> tuple[str, Path | None]:
    kind, colon, path = source.partition(":")
    if kind in _FIND_PART and path:
        return kind, _existing(kind, path)
    if kind in KINDS and not colon:
        return kind, None
    raise UserError(f"data must be one of {', '.join(KINDS)}, got {shown(repr(source))}.")


def _existing(kind: str, path: str) -> Path:
    try:
        found = Path(path).expanduser()
        found.stat()
    except (OSError, RuntimeError, ValueError) as error:  # no such user, no such path, not a path
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise UserError(
            f"{kind}:{shown(path)} must be a path that can be read, but there is no such path ({reason})."
        ) from error
    return found
