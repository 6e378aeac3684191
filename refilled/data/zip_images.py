"""A zip of images, read member by member in memory and never unpacked to disk; nothing in it is taken on trust.

A zip has its directory at the end, and damage there can make members disappear without any checksum noticing. So the
number of members is compared with the number that the zip says, and the name of every member with the one in front of
its content.
"""

from __future__ import annotations

import lzma
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refilled.data.text import one_line, shown
from refilled.errors import UserError

MAX_BYTES = 16 * 2**30  # after decompression: far above what fits on a device as pixels
# What the standard library raises for zips that are damaged, encrypted or packed in a way it does not know, as seen
# when bytes of a zip were changed.
DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, OSError, RuntimeError, ValueError, IndexError, OverflowError),
)
_LITTER = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),  # of Windows
    *("__macosx", "icon\r", "lost+found", "@eadir", "#recycle", "@recycle"),  # of macOS, Linux and network disks
}
_END = struct.Struct("<4s4H2LH")  # the end record: signature, two disks, members here, members in all, ...
_END_SIGNATURE = b"PK\5\6"
_MANY = 0xFFFF  # the end record's number where another record has it


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.Path]:
    """The root of a zip, to be walked through and read like a folder while the block runs.

    Raises:
        UserError: Naming the zip or the member that is wrong.
    """
    try:
        archive = zipfile.ZipFile(path)
    except DAMAGE as error:
        raise _unreadable(path, one_line(error)) from error
    with archive:
        _turn_backslashes(archive)
        yield zipfile.Path(archive)


def _turn_backslashes(archive: zipfile.ZipFile) -> None:
    """Read names with the separator that some Windows programs write as paths, where no name has the right one."""
    members = archive.infolist()
    if any("/" in member.filename for member in members):
        return
    for member in members:
        member.filename = member.filename.replace("\\", "/")  # its `orig_filename` stays, which content is checked by
        archive.NameToInfo[member.filename] = member


def check_zip(path: Path) -> None:
    """Refuse a zip of which a part is missing, is there twice, or is no file or folder of its own.

    Raises:
        UserError: Naming the zip or the member that is wrong.
    """
    with open_zip(path) as root:
        archive: zipfile.ZipFile = root.root
        members = archive.infolist()
        said = _said_number(path)
        if said not in (len(members), _MANY):
            raise _unreadable(path, f"it says that it has {said} members, but {len(members)} are found")
        if sum(member.file_size for member in members) > MAX_BYTES:
            raise UserError(f"{shown(path)} unpacks to more than {MAX_BYTES} bytes, too many.")
        seen: set[str] = set()
        for member in members:
            _check(path, archive, member)
            if member.filename in seen:
                raise UserError(f"{shown(path / member.filename)} is in the zip twice; every image must be there once.")
            seen.add(member.filename)


def is_litter(name: str) -> bool:
    """Whether a name is what file managers and network disks leave behind, not data."""
    return name.startswith((".", "~$")) or name.lower() in _LITTER


def _check(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Refuse a link, and a member whose content is called otherwise than the zip's directory says."""
    if stat.S_ISLNK(member.external_attr >> 16):
        raise UserError(f"{shown(path / member.filename)} is a link; a zip must hold the images themselves.")
    try:
        archive.open(member).close()
    except DAMAGE as error:
        raise UserError(
            f"{shown(path / member.filename)} cannot be read from the zip ({one_line(error)}); it must be a whole, "
            "unencrypted zip file."
        ) from error


def _said_number(path: Path) -> int:
    """How many members the zip's end says there are; -1 where it says nothing."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _END.size - _MANY))
        tail = file.read()
    end = tail[tail.rfind(_END_SIGNATURE) :][: _END.size]
    return int(_END.unpack(end)[4]) if len(end) == _END.size else -1


def _unreadable(place: Path, reason: str) -> UserError:
    return UserError(f"{shown(place)} cannot be read as a zip ({reason}); it must be a whole zip file.")
