"""Small real data sets on disk, made from the digits: what the tests of sources and of the cache read."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits

CLASSES = ("nil", "one", "two")
FORMATS = ("PNG", "JPEG", "WEBP")


def encode(pixels: np.ndarray, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format)
    return buffer.getvalue()


def pixels_of(content: bytes) -> np.ndarray:
    """What Pillow alone makes of an image: RGB, [3, H, W]."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def make_items(part: str, per_class: int = 4, size: tuple[int, int] = (12, 12)) -> list[tuple[int, str, bytes]]:
    """(label, file name, content), sorted by label and name; colours tell classes and parts apart."""
    upstream = load_digits()
    items = []
    for label in range(len(CLASSES)):
        members = np.flatnonzero(upstream.target == label)
        chosen = members[:per_class] if part == "train" else members[-per_class:]
        for number, index in enumerate(chosen):
            gray = Image.fromarray((upstream.images[index] * 15).astype(np.uint8)).resize(size)
            rgb = np.stack([np.asarray(gray) // (1 + channel * label) for channel in range(3)], axis=2)
            file_format = FORMATS[number % len(FORMATS)]
            items.append((label, f"{number}.{file_format.lower()}", encode(rgb, file_format)))
    return items


def write_folder(root: Path, parts: dict[str, list[tuple[int, str, bytes]]]) -> Path:
    for part, items in parts.items():
        for label, name, content in items:
            file = root / part / CLASSES[label] / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    return root


def write_zip(path: Path, parts: dict[str, list[tuple[int, str, bytes]]], top: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for part, items in parts.items():
            for label, name, content in reversed(items):  # the order in the zip must not matter
                archive.writestr(f"{top}{part}/{CLASSES[label]}/{name}", content)
    return path


def write_parquet(
    path: Path,
    items: list[tuple[int, str, bytes]],
    *,
    label: str = "label",
    names: tuple[str, ...] | None = CLASSES,
    extra: dict[str, list[object]] | None = None,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, object] = {
        "img": pa.array(
            [{"bytes": c, "path": n} for _, n, c in items], pa.struct({"bytes": pa.binary(), "path": pa.string()})
        ),
        label: pa.array([i[0] for i in items], pa.int64()),
    }
    table = pa.table(columns | (extra or {}))
    if names is not None:
        features = {"img": {"_type": "Image"}, label: {"_type": "ClassLabel", "names": list(names)}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=5)
    return path


def write_shards(root: Path, *, names: tuple[str, ...] | None = CLASSES, label: str = "label") -> Path:
    train, test = make_items("train"), make_items("test")
    write_parquet(root / "train-00000-of-00002.parquet", train[:7], names=names, label=label)
    write_parquet(root / "train-00001-of-00002.parquet", train[7:], names=names, label=label)
    write_parquet(root / "test-00000-of-00001.parquet", test, names=names, label=label)
    return root
