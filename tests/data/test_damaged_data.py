"""Damaged shards, archives, images, caches and lists: one sentence that names the file, or the same images."""

from __future__ import annotations

import importlib.util
import io
import logging
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from image_files import make_items, write_folder, write_shards, write_zip
from PIL import Image

from refilled.data.label_space import order_classes
from refilled.data.sources import load_train
from refilled.errors import UserError
from refilled.storage import Storage

_spec = importlib.util.spec_from_file_location("damage", Path(__file__).parents[1] / "faults" / "damage.py")
assert _spec is not None
assert _spec.loader is not None
_damage = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_damage)


def refusal(call: Callable[[], Any]) -> tuple[Any, str]:
    """What is read and no sentence, or nothing and the sentence; anything else is raised."""
    try:
        return call(), ""
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    return None, message


def try_all(source: str, victim: Path, folder: Path, num: int, *, has_checksums: bool = True) -> tuple[int, int]:
    """Damage a file of a source in `num` ways; how many were tried, and how many were refused."""
    whole = victim.read_bytes()
    expected = load_train(source, storage=Storage.open(folder / "whole")).digest
    num_tried = num_refused = 0
    for name, content in _damage.damages(whole, random.Random(num), num):
        victim.write_bytes(content)
        storage = Storage.open(folder / str(num_tried))
        found, message = refusal(lambda storage=storage: load_train(source, storage=storage))
        num_tried += 1
        num_refused += bool(message)
        assert not message or str(victim.name) in message or str(victim.parent) in message, (name, message)
        assert found is None or found.digest == expected or not has_checksums, name
    victim.write_bytes(whole)
    return num_tried, num_refused


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_damaged_shards(compression: str, tmp_path: Path) -> None:
    root = write_shards(tmp_path / "shards")
    victim = root / "train-00001-of-00002.parquet"
    pq.write_table(pq.read_table(victim), victim, row_group_size=5, compression=compression, write_page_checksum=True)
    num_tried, num_refused = try_all(f"parquet:{root}", victim, tmp_path / "storage", 63)
    assert num_tried == 63
    assert num_refused > 40


def test_damaged_shards_without_checksums_are_refused_or_read(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "shards")
    victim = root / "train-00001-of-00002.parquet"
    num_tried, num_refused = try_all(f"parquet:{root}", victim, tmp_path / "storage", 63, has_checksums=False)
    assert num_tried == 63
    assert num_refused > 40


def test_damaged_zips(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "images.zip", {part: make_items(part) for part in ("train", "test")})
    num_tried, num_refused = try_all(f"imagefolder:{path}", path, tmp_path / "storage", 90)
    assert num_tried == 90
    assert num_refused > 60


@pytest.mark.parametrize("suffix", ["png", "jpeg", "webp"])
def test_damaged_images(suffix: str, tmp_path: Path) -> None:
    """Only PNG compares checksums; a JPEG in which a bit changed may be another picture."""
    root = write_folder(tmp_path / "folder", {part: make_items(part) for part in ("train", "test")})
    victim = next((root / "train" / "one").glob(f"*.{suffix}"))
    num_tried, num_refused = try_all(f"imagefolder:{root}", victim, tmp_path / "storage", 36, has_checksums=False)
    assert num_tried == 36
    assert num_refused > 10


def test_damaged_caches_are_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_folder(tmp_path / "folder", {part: make_items(part) for part in ("train", "test")})
    storage = Storage.open(tmp_path / "storage")
    expected = load_train(f"imagefolder:{root}", storage=storage).digest
    files = [path for path in storage.root.rglob("*") if path.is_file() and path.suffix in (".npy", ".json")]
    assert len(files) >= 2
    num_tried = 0
    for seed, path in enumerate(files):
        whole = path.read_bytes()
        for name, content in _damage.damages(whole, random.Random(seed), 18):
            path.write_bytes(content)
            with caplog.at_level(logging.ERROR):  # each says a warning
                assert load_train(f"imagefolder:{root}", storage=storage).digest == expected, (path.name, name)
            num_tried += 1
            path.write_bytes(whole)
    assert num_tried >= 36


def test_damaged_class_orders(tmp_path: Path) -> None:
    names = tuple(f"class {number}" for number in range(10))
    path = tmp_path / "order.txt"
    whole = "\n".join(reversed(names)).encode()
    num_refused = 0
    for name, content in _damage.damages(whole, random.Random(0), 36):
        path.write_bytes(content)
        found, message = refusal(lambda: order_classes(str(path), names))
        num_refused += bool(message)
        assert not message or str(path) in message, (name, message)
        assert found is None or sorted(found) == sorted(names), name
    assert num_refused > 25


def test_a_zip_that_would_expand_is_refused_before_it_does(tmp_path: Path) -> None:
    items = {part: make_items(part) for part in ("train", "test")}
    path = write_zip(tmp_path / "images.zip", items)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/one/bomb.png", bytes(2**29))
    assert path.stat().st_size < 2**20
    _, message = refusal(lambda: load_train(f"imagefolder:{path}", storage=Storage.open(tmp_path / "storage")))
    assert "bomb.png" in message


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "folder", {part: make_items(part) for part in ("train", "test")})
    buffer = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 2**20
    (root / "train" / "one" / "large.png").write_bytes(buffer.getvalue())
    _, message = refusal(lambda: load_train(f"imagefolder:{root}", storage=Storage.open(tmp_path / "storage")))
    assert "large.png" in message


@pytest.mark.parametrize("name", ["../outside.png", "/outside.png", "train/../../outside.png", "train\\one\\..\\x.png"])
def test_names_in_a_zip_that_lead_outside_write_nothing(name: str, tmp_path: Path) -> None:
    items = {part: make_items(part) for part in ("train", "test")}
    (tmp_path / "in").mkdir()
    path = write_zip(tmp_path / "in" / "images.zip", items)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, items["train"][0][2])
    before = {each for each in tmp_path.rglob("*") if "storage" not in each.parts}
    refusal(lambda: load_train(f"imagefolder:{path}", storage=Storage.open(tmp_path / "storage")))
    assert {each for each in tmp_path.rglob("*") if "storage" not in each.relative_to(tmp_path).parts} == before
    assert not Path("/outside.png").exists()
