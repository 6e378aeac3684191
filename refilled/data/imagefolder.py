"""Source `imagefolder:PATH`: a folder or a zip with `train/<class>/*` and `test/<class>/*`.

A zip is read member by member in memory and never unpacked. A link in a folder is followed, since data sets are often
folders of links, but only to a file. The same content gives the same ImageSet, and the same
cache entry, whether it lies in a folder or in a zip, with or without one folder around `train` and `test`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from refilled.data.decode import MAX_FILE_BYTES, decode_images
from refilled.data.images import ImageSet, PartName, SourcePart, check_class_names, make_image_set
from refilled.data.text import shown
from refilled.data.zip_images import check_unread, is_link, list_members, open_zip
from refilled.errors import UserError

MAX_PART_BYTES = 16 * 2**30  # of a zip's part after decompression: far above what fits on a device as pixels
_PARTS: tuple[PartName, ...] = ("train", "test")

Reader = Callable[[str], bytes]
"""From the location of an image to its content."""


@dataclass(frozen=True)
class _Listing:
    """What a folder or zip holds, by name only.

    Attributes:
        classes: of each part, the files of each class folder; a file is (name, location), sorted by name.
        num_bytes: size of each part after decompression.
        open: opens the folder or zip for reading files by location.
    """

    classes: dict[PartName, dict[str, list[tuple[str, str]]]]
    num_bytes: dict[PartName, int]
    open: Callable[[], AbstractContextManager[Reader]]


def validate(path: Path) -> None:
    """Raise a UserError unless the path exists and holds a training or test part."""
    _list(path)


def find_part(path: Path, name: PartName) -> SourcePart:
    """The training or test part, its layout checked; classes are the sorted folder names of the training part.

    Raises:
        UserError: naming the file or folder that is wrong.
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
    if empty and name == "train":
        raise UserError(f"{path}/{name}/{empty[0]} holds no images; every class folder needs at least one.")
    if len(empty) == len(names):
        raise UserError(f"{path}/{name} holds no images; its class folders need at least one.")
    if listing.num_bytes[name] > MAX_PART_BYTES:
        raise UserError(
            f"{path}/{name} unpacks to {listing.num_bytes[name]} bytes, too many; at most {MAX_PART_BYTES} are read."
        )
    files = [
        (label, location) for label, class_name in enumerate(names) for _, location in by_class.get(class_name, [])
    ]
    return SourcePart(
        name=name,
        fingerprint=_fingerprint(listing, files, names),
        read=lambda image_size: _read(path, listing, files, names, image_size),
    )


def _fingerprint(listing: _Listing, files: list[tuple[int, str]], names: tuple[str, ...]) -> str:
    sha = hashlib.sha256(json.dumps([names, [label for label, _ in files]]).encode())
    with listing.open() as read:
        for _, location in files:
            sha.update(hashlib.sha256(read(location)).digest())
    return sha.hexdigest()


def _read(
    path: Path, listing: _Listing, files: list[tuple[int, str]], names: tuple[str, ...], image_size: int | None
) -> ImageSet:
    with listing.open() as read:
        encoded = ((f"{path}/{shown(location)}", read(location)) for _, location in files)
        images = decode_images(encoded, len(files), image_size)
    labels = torch.tensor([label for label, _ in files], dtype=torch.int64)
    return make_image_set(torch.from_numpy(images), labels, names)


def _list(path: Path) -> _Listing:
    if path.is_dir():
        listing = _list_folder(path)
    elif path.is_file():
        listing = _list_zip(path)
    else:
        raise UserError(f"imagefolder:{path} must be a folder or a zip file, but there is no such path.")
    if not listing.classes:
        raise UserError(f"imagefolder:{path} must hold train/<class>/ or test/<class>/ folders with images.")
    return listing


def _list_folder(path: Path) -> _Listing:
    classes: dict[PartName, dict[str, list[tuple[str, str]]]] = {}
    try:
        for part in _PARTS:
            folders = [f for f in _children(path / part) if f.is_dir()] if (path / part).is_dir() else []
            for folder in folders:
                files = []
                for file in _children(folder):
                    if file.is_dir():
                        raise _nested(file)
                    files.append((file.name, file.relative_to(path).as_posix()))
                classes.setdefault(part, {})[folder.name] = files
    except OSError as error:
        raise UserError(
            f"{shown(error.filename or path)} cannot be listed ({error.strerror}); it must be readable."
        ) from error

    return _Listing(classes, dict.fromkeys(_PARTS, 0), lambda: nullcontext(lambda location: _content(path / location)))


def _content(file: Path) -> bytes:
    try:
        if not file.is_file():  # a pipe or device would never end
            raise UserError(f"{shown(file)} must be a file with an image, or a link to one.")
        with file.open("rb") as opened:
            content = opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"{shown(file)} cannot be read ({error.strerror}); it must be readable.") from error
    if len(content) > MAX_FILE_BYTES:
        raise UserError(f"{shown(file)} has more than {MAX_FILE_BYTES} bytes, too many for an image.")
    return content


def _children(folder: Path) -> list[Path]:
    return sorted((child for child in folder.iterdir() if not _is_litter(child.name)), key=lambda child: child.name)


def _list_zip(path: Path) -> _Listing:
    named = [(PurePosixPath(member.filename).parts, member) for member in list_members(path)]
    wanted = [(parts, member) for parts, member in named if parts and not any(_is_litter(part) for part in parts)]
    unread = [member for parts, member in named if not parts or any(_is_litter(part) for part in parts)]
    tops = {parts[0] for parts, _ in wanted}
    skip = 1 if len(tops) == 1 and not tops & set(_PARTS) else 0
    classes: dict[PartName, dict[str, list[tuple[str, str]]]] = {}
    num_bytes: dict[PartName, int] = dict.fromkeys(_PARTS, 0)
    for parts, member in sorted(wanted, key=lambda item: item[0]):
        inner = parts[skip:]
        part: PartName | None = next((p for p in _PARTS if inner and inner[0] == p), None)
        if part is not None and is_link(member):
            raise UserError(f"{shown(path / member.filename)} is a link; a zip must hold the images themselves.")
        if part is None or len(inner) < 2 or member.is_dir() or len(inner) == 2:
            unread.append(member)
        if part is None or len(inner) < 2 or (len(inner) == 2 and not member.is_dir()):
            continue
        if len(inner) > 3 or (len(inner) == 3 and member.is_dir()):
            raise _nested(path / member.filename)
        files = classes.setdefault(part, {}).setdefault(inner[1], [])
        if len(inner) == 3:
            if files and files[-1][0] == inner[2]:
                raise UserError(f"{shown(path / member.filename)} is in the zip twice; every image must be there once.")
            files.append((inner[2], member.filename))
            num_bytes[part] += member.file_size
    check_unread(path, unread)
    return _Listing(classes, num_bytes, lambda: open_zip(path))


def _is_litter(name: str) -> bool:
    """Whether a name is what file managers leave behind, not data."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def _nested(path: Path) -> UserError:
    return UserError(f"{shown(path)} must be an image; a class folder holds no folders.")
