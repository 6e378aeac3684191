"""A zip of images, read member by member in memory and never unpacked to disk; nothing in it is taken on trust.

A zip has its directory at the end, and damage there can make members disappear without any checksum noticing. So the
number of members is compared with the number that the zip says, and the name of every member that holds no image is
compared with the one in front of its content; for images that happens when they are read.
"""

from __future__ import annotations

import lzma
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from refilled.data.decode import MAX_FILE_BYTES
from refilled.data.text import one_line, shown
from refilled.errors import UserError

# What the standard library raises for zips that are damaged, encrypted or packed in a way it does not know, as seen
# when bytes of a zip were changed.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, OSError, RuntimeError, ValueError, IndexError, OverflowError),
)
_END = struct.Struct("<4s4H2LH")  # the end record: signature, two disks, members here, members in all, ...
_END_SIGNATURE = b"PK\5\6"
_MANY = 0xFFFF  # the end record's number where another record has it
_BOUNDED_PIECE = 2**20
_UNBOUNDED_PIECE = 2**12  # Python unpacks a whole piece of these at once, and one byte of it can become 20,000


def list_members(path: Path) -> list[zipfile.ZipInfo]:
    """All members of a zip.

    Raises:
        UserError: naming the zip, where it is not whole.
    """
    with _opened(path) as archive:
        members = archive.infolist()
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _END.size - _MANY))
        tail = file.read()
    end = tail[tail.rfind(_END_SIGNATURE) :][: _END.size]
    said = _END.unpack(end)[4] if len(end) == _END.size else -1
    if said not in (len(members), _MANY):
        raise UserError(
            f"{shown(path)} cannot be read as a zip (it says that it has {said} members, but {len(members)} are "
            "found); it must be a whole zip file."
        )
    return members


def check_unread(path: Path, members: Iterable[zipfile.ZipInfo]) -> None:
    """Raise a UserError unless members that hold no image are called by their content as by the zip's directory."""
    with _opened(path) as archive:
        for member in members:
            try:
                archive.open(member).close()
            except _DAMAGE as error:
                raise _unreadable(path, member, error) from error


def is_link(member: zipfile.ZipInfo) -> bool:
    """Whether a member is a symbolic link."""
    return stat.S_ISLNK(member.external_attr >> 16)


class ZipReader:
    """Reads members of an open zip, each of bounded size."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self._path = path
        self._archive = archive

    def __call__(self, name: str) -> bytes:
        """Content of the member with a name, its checksum compared.

        Raises:
            UserError: naming the member, where it cannot be read or is too large for an image.
        """
        member = self._archive.getinfo(name)
        bounded = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        piece_bytes, content = _BOUNDED_PIECE if bounded else _UNBOUNDED_PIECE, bytearray()
        try:
            with self._archive.open(member) as file:
                while piece := file.read(piece_bytes):
                    content += piece
                    if len(content) > MAX_FILE_BYTES:
                        raise UserError(
                            f"{shown(self._path / name)} unpacks to more than {MAX_FILE_BYTES} bytes, too many for an "
                            "image."
                        )
        except UserError:
            raise
        except _DAMAGE as error:
            raise _unreadable(self._path, member, error) from error
        return bytes(content)


@contextmanager
def open_zip(path: Path) -> Iterator[ZipReader]:
    """Open a zip for reading members."""
    with _opened(path) as archive:
        yield ZipReader(path, archive)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(path)
    except _DAMAGE as error:
        raise UserError(
            f"{shown(path)} cannot be read as a zip ({one_line(error)}); it must be a whole zip file."
        ) from error
    with archive:
        yield archive


def _unreadable(path: Path, member: zipfile.ZipInfo, error: BaseException) -> UserError:
    return UserError(
        f"{shown(path / member.filename)} cannot be read from the zip ({one_line(error)}); it must be a whole, "
        "unencrypted zip file."
    )
