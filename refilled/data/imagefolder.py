"""Source `imagefolder:PATH`: a folder or a zip with `train/<class>/*` and `test/<class>/*`.

A zip is read member by member in memory and never unpacked. A link in a folder is followed, since data sets are often
folders of links, but only to a file. The same content gives the same ImageSet, and the same
cache entry, whether it lies in a folder or in a zip, with or without one folder around `train` and `test`, beside which
other files may lie.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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


Listing = dict[PartName, dict[str, list[str]]]
"""For each part, the files of each class folder, as paths below the root, sorted."""


def validate(path: Path) -> None:
    """Raise a UserError unless the path exists and holds a training or test part."""
    _list(path)


def find_part(path: Path, name: PartName) -> SourcePart:
    """The training or test part, its layout checked; classes are the sorted folder names of the training part.

    Raises:
        UserError: Naming the file or folder that is wrong.
    """
    listing = _list(path)
    if name not in listing:
        raise UserError(f"imagefolder:{path} has no {name} part; {name}/<class>/ folders with images would be one.")
    by_class = listing[name]
    names = check_class_names(sorted(listing.get("train", by_class)), f"{path}/{name}")
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
        fingerprint=_fingerprint(path, files, names),
        read=lambda image_size, file: _read(path, files, names, image_size, file),
    )


def _fingerprint(path: Path, files: list[tuple[int, str]], names: tuple[str, ...]) -> str:
    sha = hashlib.sha256(json.dumps([names, [label for label, _ in files]]).encode())
    with _opened(path) as root:
        for _, location in files:
            sha.update(hashlib.sha256(_content(path, root, location)).digest())
    return sha.hexdigest()


def _read(
    path: Path,
    files: list[tuple[int, str]],
    names: tuple[str, ...],
    image_size: int | None,
    file: Path | None,
) -> ImageSet:
    with _opened(path) as root:
        encoded = ((f"{path}/{shown(location)}", _content(path, root, location)) for _, location in files)
        images = decode_images(encoded, len(files), image_size, file)
    labels = torch.tensor([label for label, _ in files], dtype=torch.int64)
    return make_image_set(torch.from_numpy(images), labels, names)


def _list(path: Path) -> Listing:
    """What a folder or zip holds, by name only."""
    if path.is_file():
        check_zip(path)
    elif not path.is_dir():
        raise UserError(f"imagefolder:{path} must be a folder or a zip file, but there is no such path.")
    with _opened(path) as root:
        listing = _classes(path, root)
    if not listing:
        raise UserError(f"imagefolder:{path} must hold train/<class>/ or test/<class>/ folders with images.")
    return listing


@contextmanager
def _opened(path: Path) -> Iterator[Root]:
    """The folder with the parts, to be walked through and read while the block runs: the path's own, or one in it."""
    with open_zip(path) if path.is_file() else nullcontext(path) as root:
        yield _root_of_parts(path, root)


def _root_of_parts(path: Path, root: Root) -> Root:
    try:
        if _has_part(root):
            return root
        inside = [child for child in _children(root) if _has_part(child)]
    except OSError as error:
        raise _unlistable(path, error) from error
    if len(inside) > 1:
        first, second = (shown(path / child.name) for child in inside[:2])
        raise UserError(f"imagefolder:{path} must hold one data set, but {first} and {second} are two; name one.")
    return inside[0] if inside else root


def _has_part(folder: Root) -> bool:
    return any((folder / part).is_dir() for part in _PARTS)


def _unlistable(path: Path, error: OSError) -> UserError:
    return UserError(f"{shown(error.filename or path)} cannot be listed ({error.strerror}); it must be readable.")


def _classes(path: Path, root: Root) -> Listing:
    """The files of each class folder of each part, as paths below the root."""
    classes: Listing = {}
    try:
        for part in _PARTS:
            for folder in _children(root / part):
                if folder.is_dir():
                    _add_class(classes.setdefault(part, {}), path, part, folder)
    except OSError as error:
        raise _unlistable(path, error) from error
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
