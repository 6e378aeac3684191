"""Source `imagefolder:PATH`: a folder or a zip with `train/<class>/*` and `test/<class>/*`.

A zip is read member by member in memory and never unpacked. A link in a folder is followed, since data sets are often
folders of links, but only to a file. The same content gives the same ImageSet, and the same
cache entry, whether it lies in a folder or in a zip, with or without one folder around `train` and `test`.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from refilled.data.decode import MAX_FILE_BYTES, decode_images
from refilled.data.images import ImageSet, PartName, SourcePart, check_class_names, make_image_set
from refilled.data.text import one_line, shown
from refilled.data.zip_images import DAMAGE, check_zip, is_litter, open_zip
from refilled.errors import UserError

_PARTS: tuple[PartName, ...] = ("train", "test")

Root = Path | zipfile.Path
"""A folder, or a zip as one: both are walked through and read alike."""


@dataclass(frozen=True)
class _Listing:
    """What a folder or zip holds, by name only.

    Attributes:
        classes: For each part, the files of each class folder, as paths below the root, sorted.
        open: Opens the folder or zip for reading.
    """

    classes: dict[PartName, dict[str, list[str]]]
    open: Callable[[], AbstractContextManager[Root]]


def validate(path: Path) -> None:
    """Raise a UserError unless the path exists and holds a training or test part."""
    _list(path)


def find_part(path: Path, name: PartName) -> SourcePart:
    """The training or test part, its layout checked; classes are the sorted folder names of the training part.

    Raises:
        UserError: Naming the file or folder that is wrong.
    """
    listing = _list(path)
    if name not in listing.classes:
        raise UserError(f"imagefolder:{path} has no {name} part; {name}/<class>/ folders with images would be one.")
    by_class = listing.classes[name]
    names = check_class_names(sorted(listing.classes.get("train", by_class)), f"{path}/{name}")
    unknown = sorted(set(by_class) - set(names))
    if unknown:
        odd = shown(unknown[0])
        raise UserError(f"{path}/{name}/{odd} must have a folder {odd} in {path}/train too.")
    empty = [class_name for class_name in names if not by_class.get(class_name)]
    if len(empty) == len(names):
        raise UserError(f"{path}/{name} holds no images; its class folders need at least one.")
    files = [(label, location) for label, class_name in enumerate(names) for location in by_class.get(class_name, [])]
    return SourcePart(
        name=name,
        fingerprint=_fingerprint(path, listing, files, names),
        read=lambda image_size, file: _read(path, listing, files, names, image_size, file),
    )


def _fingerprint(path: Path, listing: _Listing, files: list[tuple[int, str]], names: tuple[str, ...]) -> str:
    sha = hashlib.sha256(json.dumps([names, [label for label, _ in files]]).encode())
    with listing.open() as root:
        for _, location in files:
            sha.update(hashlib.sha256(_content(path, root, location)).digest())
    return sha.hexdigest()


def _read(
    path: Path,
    listing: _Listing,
    files: list[tuple[int, str]],
    names: tuple[str, ...],
    image_size: int | None,
    file: Path | None,
) -> ImageSet:
    with listing.open() as root:
        encoded = ((f"{path}/{shown(location)}", _content(path, root, location)) for _, location in files)
        images = decode_images(encoded, len(files), image_size, file)
    labels = torch.tensor([label for label, _ in files], dtype=torch.int64)
    return make_image_set(torch.from_numpy(images), labels, names)


def _list(path: Path) -> _Listing:
    if path.is_dir():
        listing = _Listing(_classes(path, path), lambda: nullcontext(path))
    elif path.is_file():
        check_zip(path)
        with open_zip(path) as root:
            listing = _Listing(_classes(path, root), lambda: open_zip(path))
    else:
        raise UserError(f"imagefolder:{path} must be a folder or a zip file, but there is no such path.")
    if not listing.classes:
        raise UserError(f"imagefolder:{path} must hold train/<class>/ or test/<class>/ folders with images.")
    return listing


def _classes(path: Path, root: Root) -> dict[PartName, dict[str, list[str]]]:
    """The files of each class folder of each part, as paths below the root."""
    classes: dict[PartName, dict[str, list[str]]] = {}
    try:
        for part in _PARTS:
            for folder in _children(root / part):
                if folder.is_dir():
                    _add_class(classes.setdefault(part, {}), path, part, folder)
    except OSError as error:
        raise UserError(
            f"{shown(error.filename or path)} cannot be listed ({error.strerror}); it must be readable."
        ) from error
    return classes


def _add_class(classes: dict[str, list[str]], path: Path, part: PartName, folder: Root) -> None:
    """Add a class folder's files, those of folders inside it too; names are compared as people read them (NFC)."""
    name = unicodedata.normalize("NFC", folder.name)
    if name in classes:
        raise UserError(f"{shown(path / part / folder.name)} is there twice, in two spellings of the same characters.")
    classes[name] = sorted(f"{part}/{folder.name}/{each}" for each in _files_below(folder, ""))


def _files_below(folder: Root, prefix: str) -> Iterator[str]:
    for child in _children(folder):
        if child.is_dir():
            if isinstance(child, Path) and child.is_symlink():
                raise UserError(
                    f"{shown(child)} must not be a link to a folder."
                )  # which might lead around in a circle
            yield from _files_below(child, f"{prefix}{child.name}/")
        else:
            yield f"{prefix}{child.name}"


def _children(folder: Root) -> list[Any]:
    """What is in a folder, but for what file managers leave behind, by name; nothing where it is no folder."""
    if not folder.is_dir():
        return []
    return sorted((child for child in folder.iterdir() if not is_litter(child.name)), key=lambda child: child.name)


def _content(path: Path, root: Root, location: str) -> bytes:
    place, file = shown(path / location), root / location
    try:
        if not file.is_file():  # a pipe or device would never end
            raise UserError(f"{place} must be a file with an image, or a link to one.")
        with file.open("rb") as opened:
            content: bytes = opened.read(MAX_FILE_BYTES + 1)
    except UserError:
        raise
    except DAMAGE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise UserError(f"{place} cannot be read ({reason}); it must be whole and readable.") from error
    if len(content) > MAX_FILE_BYTES:
        raise UserError(f"{place} has more than {MAX_FILE_BYTES} bytes, too many for an image.")
    return content
