from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from image_files import make_items, write_parquet

from refilled.data.parquet_files import shard_files
from refilled.data.sources import load_test, load_train
from refilled.errors import UserError
from refilled.storage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "storage")


def touched(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ("train.parquet",),
        ("train-b.parquet", "train-a.parquet"),
        ("train-00001-of-00002.parquet", "train-00000-of-00002.parquet"),
        ("train-1-of-2.parquet", "train-2-of-2.parquet"),
        ("train-00000-of-00002-0a1b2c3d4e5f6071.parquet", "train-00001-of-00002-ffff2c3d4e5f6071.parquet"),
    ],
)
def test_a_whole_set_in_the_order_of_its_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = touched(tmp_path / "p", *names, "test-00000-of-00001.parquet", "readme.md")
    assert [each.name for each in shard_files(folder, "train")] == sorted(names)
    assert [each.name for each in shard_files(folder, "test")] == ["test-00000-of-00001.parquet"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("train-00000-of-00003.parquet", "train-00002-of-00003.parquet"),
            "lacks train-00001-of-00003.parquet: it holds 2 of 3 train shards.",
        ),
        (("train-00001-of-00002.parquet",), "lacks train-00000-of-00002.parquet"),
        (("train-1-of-3.parquet", "train-3-of-3.parquet"), "lacks train-2-of-3.parquet"),
        (
            ("train-00000-of-00001.parquet", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"),
            "one set of train shards, but train-00000-of-00001.parquet and train-00000-of-00002.parquet are of two",
        ),
        (
            ("train-00000-of-00001-0a1b.parquet", "train-00000-of-00001-ffff.parquet"),
            "but train-00000-of-00001-0a1b.parquet and train-00000-of-00001-ffff.parquet are of two",
        ),
        (
            ("train-00000-of-00002.parquet", "train-00007-of-00002.parquet"),
            "train-00007-of-00002.parquet must be one of",
        ),
        (
            ("train.parquet", "train-00000-of-00001.parquet"),
            "but train.parquet and train-00000-of-00001.parquet are not of one set",
        ),
        (("train.parquet", "train-more.parquet"), "but train.parquet and train-more.parquet are not of one set"),
        (
            ("train-00000-of-00001.parquet", "train-00000-of-00001 (1).parquet"),
            r"but train-00000-of-00001 (1).parquet and train-00000-of-00001.parquet are not of one set",
        ),
    ],
)
def test_what_is_no_whole_set_is_named(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    folder = touched(tmp_path / "p", *names)
    with pytest.raises(UserError) as error:
        shard_files(folder, "train")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_same_images_twice_are_refused(tmp_path: Path, storage: Storage) -> None:
    write_parquet(tmp_path / "p" / "train-a.parquet", make_items("train"))
    shutil.copy(tmp_path / "p" / "train-a.parquet", tmp_path / "p" / "train-b.parquet")
    with pytest.raises(UserError, match=r"train-a\.parquet and .*train-b\.parquet have the same content"):
        load_train(f"parquet:{tmp_path / 'p'}", storage=storage)


def parts(folder: Path, *shards: tuple[str, str, tuple[str, ...] | None]) -> str:
    """Files of a part each, with the class names that their metadata have."""
    for file, part, names in shards:
        write_parquet(folder / file, make_items(part), names=names)
    return f"parquet:{folder}"


def images_by_name(found: object) -> dict[str, list[bytes]]:
    names = found.class_names  # type: ignore[attr-defined]
    by_name: dict[str, list[bytes]] = {}
    for image, label in zip(found.images[:], found.labels.tolist(), strict=True):  # type: ignore[attr-defined]
        by_name.setdefault(names[label], []).append(image.numpy().tobytes())
    return by_name


@pytest.mark.parametrize("load", [load_train, load_test])
def test_labels_of_every_shard_are_told_by_its_own_names(
    tmp_path: Path, storage: Storage, load: Callable[..., object]
) -> None:
    """Two shards of the same images, of which one numbers its classes the other way round, have every class twice."""
    names = ("a", "b", "c")
    same = parts(tmp_path / "same", ("train.parquet", "train", names), ("test.parquet", "test", names))
    turned = parts(
        tmp_path / "turned",
        ("train-0.parquet", "train", names),
        ("train-1.parquet", "train", ("c", "b", "a")),
        ("test-0.parquet", "test", names),
        ("test-1.parquet", "test", ("c", "b", "a")),
    )
    plain, found = images_by_name(load(same, storage=storage)), images_by_name(load(turned, storage=storage))
    opposite = {"a": "c", "b": "b", "c": "a"}
    assert load(turned, storage=storage).class_names == names  # type: ignore[attr-defined]
    for name, images in plain.items():
        assert found[name] == images + plain[opposite[name]]


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        (
            (("train.parquet", "train", ("a", "b", "c")), ("test.parquet", "test", None)),
            r"train\.parquet has class names and .*test\.parquet has none",
        ),
        (
            (("train.parquet", "train", None), ("test.parquet", "test", ("a", "b", "c"))),
            r"test\.parquet has class names and the training part has none",
        ),
        (
            (("train.parquet", "train", ("a", "b", "c")), ("test.parquet", "test", ("a", "b", "x"))),
            r"test\.parquet has a class 'x' that .*train\.parquet has not",
        ),
    ],
)
def test_both_parts_name_the_same_classes(
    tmp_path: Path, storage: Storage, shards: tuple[tuple[str, str, tuple[str, ...] | None], ...], message: str
) -> None:
    source = parts(tmp_path / "p", *shards)
    load_train(source, storage=storage)  # which never asks the test part
    with pytest.raises(UserError, match=message):
        load_test(source, storage=storage)


def test_a_shard_of_the_training_part_without_names_is_named(tmp_path: Path, storage: Storage) -> None:
    source = parts(tmp_path / "p", ("train-0.parquet", "train", ("a", "b", "c")), ("train-1.parquet", "train", None))
    with pytest.raises(UserError, match=r"train-0\.parquet has class names and .*train-1\.parquet has none"):
        load_train(source, storage=storage)
