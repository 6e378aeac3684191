"""Labelled images as every later part sees them, and what a source promises before anything is decoded."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from refilled.data.pixels import Pixels, chunks
from refilled.data.text import shown
from refilled.errors import UserError

PartName = Literal["train", "test"]
MAX_NAME_CHARS = 255  # what a folder's name may have
_NO_TEXT = ("Cc", "Cs", "Zl", "Zp")  # Unicode's categories of control characters, half characters and line ends
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # make text read as another


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one part of a data set; equal digests mean equal sets. Made by `make_image_set`.

    Attributes:
        images: Uint8 [N, C, H, W], in memory or in a file.
        labels: Int64 [N], positions in `class_names`.
        class_names: Name of every class; a class may have no image here.
        digest: SHA-256, in hex, over shape, pixels, labels and class names.
    """

    images: Pixels = field(repr=False)
    labels: Tensor = field(repr=False)
    class_names: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)


@dataclass(frozen=True)
class SourcePart:
    """The training or the test part of a source, found and checked but not decoded.

    Attributes:
        name: Which part it is.
        fingerprint: Identifies everything the decoded part depends on except the image size.
        read: Decodes the part at an image size (none: as stored); pixels that are too many for memory go to the file.
    """

    name: PartName
    fingerprint: str
    read: Callable[[int | None, Path | None], ImageSet]


def make_image_set(images: Pixels, labels: Tensor, class_names: Sequence[str]) -> ImageSet:
    """Check images, labels and class names against each other and compute their digest.

    Args:
        images: Uint8 [N, C, H, W], N at least 1.
        labels: Int64 [N], each in [0, len(class_names)).
        class_names: Different, non-empty names.

    Raises:
        UserError: Naming the part that does not fit.
    """
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise UserError(f"images must be uint8 [N, C, H, W], got {images.dtype} {list(images.shape)}.")
    if min(images.shape) < 1:
        raise UserError(f"images must hold at least one image and one pixel, got shape {list(images.shape)}.")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise UserError(
            f"labels must be int64 [{len(images)}] like the images, got {labels.dtype} {list(labels.shape)}."
        )
    names = check_class_names(class_names, "class_names")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(names):
        raise UserError(f"labels must be in 0..{len(names) - 1}, one for each class name, got {low}..{high}.")
    return ImageSet(images=images, labels=labels, class_names=names, digest=_digest(images, labels, names))


def check_class_names(class_names: Sequence[str], where: str) -> tuple[str, ...]:
    """The names as a tuple, if they are different, non-empty strings that can be printed as they are.

    Accents are composed (NFC), as file systems and lists that people write have them both ways.

    Args:
        class_names: Names to check.
        where: The file or field they come from, for the message.

    Raises:
        UserError: Naming `where` and the odd name.
    """
    names = tuple(unicodedata.normalize("NFC", name) if isinstance(name, str) else name for name in class_names)
    if not names:
        raise UserError(f"{where} must name at least one class.")
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{where} must hold non-empty strings as class names, got {shown(repr(name))}.")
        if len(name) > MAX_NAME_CHARS or any(_is_unprintable(each) for each in name):
            raise UserError(
                f"{where} must hold class names of at most {MAX_NAME_CHARS} printable characters, "
                f"got {shown(ascii(name))}."
            )
        if name in seen:
            raise UserError(f"{where} must name every class once, got {name!r} twice.")
        seen.add(name)
    return names


def _is_unprintable(character: str) -> bool:
    """Whether it ends a line, controls a terminal, turns text around, or cannot be written as UTF-8."""
    return unicodedata.category(character) in _NO_TEXT or character in _REORDERING


def _digest(images: Pixels, labels: Tensor, class_names: tuple[str, ...]) -> str:
    # The header has no free-length part that pixels could imitate: JSON ends where its brackets close.
    header = json.dumps({"shape": list(images.shape), "class_names": class_names})
    sha = hashlib.sha256(header.encode())
    for part in chunks(images):
        sha.update(part.cpu().contiguous().numpy().data)
    sha.update(labels.cpu().numpy().astype("<i8").data)
    return sha.hexdigest()
