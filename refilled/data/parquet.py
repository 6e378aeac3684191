"""Source `parquet:PATH`: Hugging Face image data sets, `train-*` and `test-*` shards in a folder, or one file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from refilled.data.decode import decode_images
from refilled.data.images import ImageSet, PartName, SourcePart, check_class_names, make_image_set
from refilled.data.parquet_files import shard_files
from refilled.data.text import one_line, shown
from refilled.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MAX_ROWS = 2**26  # of a shard: a file of some bytes can claim any number, and labels are read all at once
MAX_CLASSES = 2**20  # where labels are the only names
_BATCH_ROWS = 1024  # encoded images held in memory at once
_BATCH_BYTES = 2**31  # and what they may take: every row may repeat the largest value of a dictionary
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Shard:
    """One file and its two columns."""

    path: Path
    image: str
    label: str
    labels: Labels


def validate(path: Path) -> None:
    """Raise a UserError unless the path exists and holds a training or test part."""
    if not shard_files(path, "train") and not shard_files(path, "test"):
        raise UserError(f"parquet:{path} must hold train-*.parquet or test-*.parquet files.")


def find_part(path: Path, name: PartName) -> SourcePart:
    """The training or test part, its columns and labels checked.

    Class names are those of the Hugging Face metadata, else of `classes.json` beside the shards, else the labels
    themselves; they are those of the first shard of the training part, if there is one, and every other shard's labels
    are told by its own names, whatever their order. The training part never asks the test part.

    Raises:
        UserError: Naming the file and what is wrong with it.
    """
    validate(path)
    files = shard_files(path, name)
    if not files:
        raise UserError(f"parquet:{path} has no {name} part; {name}-*.parquet files would be one.")
    shards = [_open_shard(file) for file in files]
    train = shard_files(path, "train") if name == "test" else []
    names = _class_names(_open_shard(train[0]) if train else shards[0])
    if names is None:
        names = _numbers([_open_shard(file) for file in train] or shards)
        named_by = None
    else:
        named_by = train[0] if train else files[0]
    shards = [_with_labels_of(shard, names, named_by) for shard in shards]
    return SourcePart(
        name=name,
        fingerprint=_fingerprint(shards, names),
        read=lambda image_size, file: _read(shards, names, image_size, file),
    )


def _open_shard(path: Path) -> _Shard:
    import pyarrow as pa

    with _opened(path) as file:
        schema = file.schema_arrow
        image, label = _image_column(path, schema), _label_column(path, schema)
        num_rows = file.metadata.num_rows
        if num_rows > MAX_ROWS:
            raise UserError(f"{path} has {num_rows} rows, too many; a shard may have at most {MAX_ROWS}.")
        column = file.read(columns=[label]).column(label)
        if len(column) == 0:
            raise UserError(f"{path} has no rows; a shard must hold at least one image.")
        if column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise UserError(f"{path} has no {shown(label)} in row {row}; every image needs one.")
        return _Shard(path, image, label, column.cast(pa.int64()).to_numpy())


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a shard; what goes wrong inside is told as one sentence.

    Pages are compared with their checksums where the writer wrote any, which few do unless they are asked to.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():  # a pipe would never end
        raise UserError(f"{shown(path)} must be a Parquet file, or a link to one.")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:  # the last two: names that are no UTF-8, twice
        raise _unreadable(path, error) from error


def _image_column(path: Path, schema: pa.Schema) -> str:
    import pyarrow as pa

    def holds_bytes(kind: pa.DataType) -> bool:
        if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
            return False
        inner = kind.field("bytes").type
        return bool(pa.types.is_binary(inner) or pa.types.is_large_binary(inner))

    found = [column.name for column in schema if holds_bytes(column.type)]
    if len(found) != 1:
        raise UserError(
            f"{path} must have one image column struct<bytes, path>, has {len(found)} among {_columns(schema)}."
        )
    return str(found[0])


def _label_column(path: Path, schema: pa.Schema) -> str:
    import pyarrow as pa

    integers = [column.name for column in schema if pa.types.is_integer(column.type)]
    for usual in ("label", "fine_label"):
        if usual in schema.names:
            integers = [usual] if usual in integers else []
            break
    if len(integers) != 1:
        raise UserError(
            f"{path} must have an integer column label or fine_label, or only one integer column, has "
            f"{_columns(schema)}."
        )
    return str(integers[0])


def _numbers(shards: list[_Shard]) -> tuple[str, ...]:
    """Labels as their own names."""
    largest = max(shards, key=lambda shard: int(shard.labels.max()))
    most = int(largest.labels.max())
    if not 0 <= most < MAX_CLASSES:
        raise UserError(
            f"{largest.path} has {shown(largest.label)} {most}; without class names it must be in 0..{MAX_CLASSES - 1}."
        )
    return tuple(str(number) for number in range(most + 1))


def _class_names(shard: _Shard) -> tuple[str, ...] | None:
    with _opened(shard.path) as file:
        metadata = (file.schema_arrow.metadata or {}).get(b"huggingface")
    if metadata is not None:
        names = _at(_parse_json(metadata, shard.path), "info", "features", shard.label, "names")
        if isinstance(names, list):
            return check_class_names(names, str(shard.path))
    beside = shard.path.parent / "classes.json"
    if not beside.is_file():
        return None
    listed = _listed_names(_parse_json(beside.read_bytes(), beside), shard.label)
    if listed is None:
        raise UserError(
            f"{beside} must be a list of class names, or an object with such a list named "
            f"{' or '.join(shown(key) for key in _name_keys(shard.label))}."
        )
    return check_class_names(listed, str(beside))


def _listed_names(content: object, label: str) -> list[Any] | None:
    """Names in `["a", ...]`, `{"fine": ["a", ...]}` or `[{"label": 0, "name": "a"}, ...]`, in label order."""
    if isinstance(content, dict):
        content = next((content[key] for key in _name_keys(label) if key in content), None)
    if not isinstance(content, list):
        return None
    if content and all(isinstance(item, dict) and {"label", "name"} <= item.keys() for item in content):
        by_label = {item["label"]: item["name"] for item in content if isinstance(item["label"], int)}
        if set(by_label) != set(range(len(content))):
            return None
        return [by_label[index] for index in range(len(content))]
    return content


def _name_keys(label: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((label, label.removesuffix("_label"), "names")))


def _with_labels_of(shard: _Shard, names: tuple[str, ...], named_by: Path | None) -> _Shard:
    """The shard, its labels being places in `names`, which another shard may have given (`named_by`)."""
    own = _class_names(shard)
    if (own is None) != (named_by is None):
        has, lacks = (shard.path, "the training part") if named_by is None else (named_by, shard.path)
        raise UserError(f"{has} has class names and {lacks} has none; all shards must have them, or classes.json.")
    own = names if own is None else own
    _check_labels(shard, own)
    if own == names:
        return shard
    odd = next((each for each in own if each not in names), None)
    if odd is not None:
        raise UserError(f"{shard.path} has a class {odd!r} that {named_by} has not; all shards need the same.")
    places = np.array([names.index(each) for each in own])
    return dataclasses.replace(shard, labels=places[shard.labels])


def _check_labels(shard: _Shard, names: tuple[str, ...]) -> None:
    wrong = np.flatnonzero((shard.labels < 0) | (shard.labels >= len(names)))
    if len(wrong):
        row = int(wrong[0])
        raise UserError(
            f"{shard.path} has {shown(shard.label)} {shard.labels[row]} in row {row}; "
            f"with {len(names)} classes it must be in 0..{len(names) - 1}."
        )


def _fingerprint(shards: list[_Shard], names: tuple[str, ...]) -> str:
    columns = [(shard.image, shard.label) for shard in shards]
    sha = hashlib.sha256(json.dumps([names, columns]).encode())
    seen: dict[bytes, Path] = {}
    for shard in shards:
        try:
            with shard.path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise _unreadable(shard.path, error) from error
        if digest in seen:
            raise UserError(f"{seen[digest]} and {shard.path} have the same content; every image must be there once.")
        seen[digest] = shard.path
        sha.update(digest)
    return sha.hexdigest()


def _read(shards: list[_Shard], names: tuple[str, ...], image_size: int | None, file: Path | None) -> ImageSet:
    labels = np.concatenate([shard.labels for shard in shards])
    encoded = (item for shard in shards for item in _encoded(shard))
    images = decode_images(encoded, len(labels), image_size, file)
    return make_image_set(torch.from_numpy(images), torch.from_numpy(labels), names)


def _encoded(shard: _Shard) -> Iterator[tuple[str, bytes]]:
    row = 0
    with _opened(shard.path) as file:
        for content in _contents(file, shard.image):
            if content is None:
                raise UserError(f"{shard.path} holds no image bytes in row {row}; every row needs them.")
            yield f"{shard.path} row {row}", content
            row += 1
    if row != len(shard.labels):
        raise _unreadable(shard.path, ValueError(f"{len(shard.labels)} labels but {row} images"))


def _contents(file: pq.ParquetFile, image: str) -> Iterator[bytes | None]:
    import pyarrow.compute as pc

    for group in range(file.num_row_groups):
        num_rows = _rows_at_once(file.metadata.row_group(group), image)
        for batch in file.iter_batches(batch_size=num_rows, row_groups=[group], columns=[image]):
            yield from pc.struct_field(batch.column(0), "bytes").to_pylist()


def _rows_at_once(group: pq.RowGroupMetaData, image: str) -> int:
    """How many rows of a row group to hold, so that a dictionary's largest value in each of them still fits."""
    columns = [group.column(number) for number in range(group.num_columns)]
    num_bytes = [int(each.total_uncompressed_size) for each in columns if each.path_in_schema == f"{image}.bytes"]
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max([1, *num_bytes])))


def _at(content: object, *keys: str) -> object:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _parse_json(content: bytes, path: Path) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} must have class names in valid JSON ({one_line(error)}).") from error


def _columns(schema: pa.Schema) -> str:
    return shown(", ".join(f"{column.name} ({' '.join(str(column.type).split())})" for column in schema))


def _unreadable(path: Path, error: BaseException) -> UserError:
    return UserError(f"{shown(path)} cannot be read as Parquet ({one_line(error)}); it must be a whole Parquet file.")
