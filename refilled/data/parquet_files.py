"""Which files of a folder are the shards of a part: one whole set of them, and nothing of another."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from refilled.data.images import PartName
from refilled.data.text import shown
from refilled.errors import UserError

_NUMBERED = re.compile(r"-(?P<index>\d{1,9})-of-(?P<total>\d{1,9})(-[0-9a-f]+)?")
"""What follows the part's name in that of a shard as Hugging Face writes it; older ones end in a digest."""


@dataclass(frozen=True)
class _Numbered:
    file: Path
    index: int
    total: int
    width: int  # digits of the index


def shard_files(path: Path, name: PartName) -> list[Path]:
    """The files of a part, in the order of their names; none where the folder has no such part.

    Raises:
        UserError: There is no such path, or the files are not one whole set: one is missing, is there twice, or is of
            another set.
    """
    if path.is_file():
        return [path] if path.name.startswith("test") == (name == "test") else []
    if not path.is_dir():
        raise UserError(f"parquet:{path} must be a Parquet file or a folder of them, but there is no such path.")
    files = sorted(file for pattern in (f"{name}.parquet", f"{name}-*.parquet") for file in path.glob(pattern))
    numbered = [
        _Numbered(file, int(found["index"]), int(found["total"]), len(found["index"]))
        for file in files
        if (found := _NUMBERED.fullmatch(file.stem.removeprefix(name)))
    ]
    others = sorted(set(files) - {each.file for each in numbered}, key=lambda file: file.stem != name)
    if others and (numbered or others[0].stem == name) and len(files) > 1:
        beside = next(file for file in files if file != others[0])
        raise UserError(
            f"{shown(path)} must hold one set of {name} shards, but {shown(others[0].name)} and {shown(beside.name)} "
            "are not of one set; move what is too much elsewhere."
        )
    if numbered:
        _check_whole(path, name, numbered)
    return files


def _check_whole(path: Path, name: PartName, shards: Sequence[_Numbered]) -> None:
    """Of numbered shards, which begin with 0 or, as some tools have them, with 1."""
    first = shards[0]
    other = next((each for each in shards if each.total != first.total), None)
    by_index: dict[int, _Numbered] = {}
    for each in shards:
        if other is None and each.index in by_index:
            other, first = each, by_index[each.index]
        by_index[each.index] = each
    if other is not None:
        raise UserError(
            f"{shown(path)} must hold one set of {name} shards, but {shown(first.file.name)} and "
            f"{shown(other.file.name)} are of two; move one of the sets elsewhere."
        )
    begin = 1 if 0 not in by_index and first.total in by_index else 0
    wanted = range(begin, begin + first.total)
    foreign = next((each for index, each in sorted(by_index.items()) if index not in wanted), None)
    if foreign is not None:
        raise UserError(f"{shown(foreign.file)} must be one of {first.total} shards, but its name counts further.")
    missing = next((index for index in wanted if index not in by_index), None)
    if missing is not None:
        absent = f"{name}-{missing:0{first.width}}-of-{first.total:0{first.width}}.parquet"
        raise UserError(f"{shown(path)} lacks {absent}: it holds {len(by_index)} of {first.total} {name} shards.")
