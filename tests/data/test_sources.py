"""Every source reads back what was written, keeps train apart from test, and refuses bad input in one sentence."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_files import CLASSES, encode, make_items, pixels_of, write_folder, write_parquet, write_shards, write_zip
from PIL import Image
from sklearn.datasets import load_digits

from refilled.data import zip_images
from refilled.data.decode import one_line
from refilled.data.images import make_image_set
from refilled.data.sources import load_test, load_train, validate_source
from refilled.errors import UserError
from refilled.storage import Storage


def one_sentence(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert message[0] != " "
    return message


def assert_holds(image_set, items) -> None:
    assert image_set.images.dtype == torch.uint8
    assert image_set.labels.tolist() == [label for label, _, _ in items]
    assert np.array_equal(image_set.images.numpy(), np.stack([pixels_of(content) for _, _, content in items]))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """One that no other test has decoded anything into."""
    return Storage.open(tmp_path / "storage")


def images_in(storage: Storage) -> list[Path]:
    """The folders of decoded images."""
    return [entry for entry in storage.root.glob("cache/images/*") if entry.is_dir()]


def part_of(storage: Storage, name: object) -> Storage:
    """A storage of its own inside another one."""
    return Storage.open(storage.root / str(name))


# ---- digits


def test_digits_are_all_upstream_images_split_once_and_for_ever(storage: Storage) -> None:
    train, test = load_train("digits", storage=storage), load_test("digits", storage=storage)
    upstream = load_digits()
    assert train.class_names == test.class_names == tuple("0123456789")
    assert train.images.shape[1:] == (1, 8, 8)
    for digit in range(10):
        total = int((upstream.target == digit).sum())
        assert int((test.labels == digit).sum()) == round(0.25 * total)
        assert int((train.labels == digit).sum()) == total - round(0.25 * total)
    expected = sorted(
        (int(label), np.round(image * 255 / 16).astype(np.uint8).tobytes())
        for label, image in zip(upstream.target, upstream.images, strict=True)
    )
    found = sorted(
        (int(label), image.numpy().tobytes())
        for s in (train, test)
        for label, image in zip(s.labels, s.images, strict=True)
    )
    assert found == expected
    # A changed split, scaling or digest would make every earlier result incomparable.
    assert train.digest.startswith("8a4e9aee")
    assert test.digest.startswith("42f77385")


def test_digits_resize(storage: Storage) -> None:
    small, large = load_train("digits", storage=storage), load_train("digits", storage=storage, image_size=16)
    expected = Image.fromarray(small.images[5, 0].numpy()).resize((16, 16), Image.Resampling.BICUBIC)
    assert large.images.shape == (len(small), 1, 16, 16)
    assert np.array_equal(large.images[5, 0].numpy(), np.asarray(expected))


# ---- folders and zips


def test_folder_and_zip_hold_the_same_images(tmp_path: Path, storage: Storage) -> None:
    parts = {"train": make_items("train"), "test": make_items("test", per_class=3)}
    folder = write_folder(tmp_path / "folder", parts)
    (folder / "train" / ".DS_Store").write_bytes(b"litter")
    (folder / "train" / CLASSES[0] / "Thumbs.db").write_bytes(b"litter")
    paths = [folder, write_zip(tmp_path / "a.zip", parts), write_zip(tmp_path / "b.zip", parts, top="birds/")]
    with zipfile.ZipFile(paths[2], "a") as archive:
        archive.writestr("__MACOSX/birds/train/nil/._0.png", b"litter")
    for index, path in enumerate(paths):
        own = part_of(storage, index)
        train, test = load_train(f"imagefolder:{path}", storage=own), load_test(f"imagefolder:{path}", storage=own)
        assert train.class_names == test.class_names == CLASSES
        assert_holds(train, parts["train"])
        assert_holds(test, parts["test"])
        again = load_train(f"imagefolder:{path}", storage=part_of(storage, "0"))
        assert again.digest == train.digest == load_train(f"imagefolder:{folder}", storage=part_of(storage, "0")).digest


def test_test_classes_may_be_fewer_and_keep_the_labels_of_train(tmp_path: Path, storage: Storage) -> None:
    test = [item for item in make_items("test") if item[0] == 2]
    path = write_folder(tmp_path / "f", {"train": make_items("train"), "test": test})
    read = load_test(f"imagefolder:{path}", storage=storage)
    assert read.class_names == CLASSES
    assert read.labels.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("size", [(20, 30), (33, 18)])
def test_image_size_resizes_the_shorter_side_and_crops_the_centre(
    tmp_path: Path, storage: Storage, size: tuple[int, int]
) -> None:
    items = make_items("train", per_class=1, size=size)
    path = write_folder(tmp_path / "f", {"train": items})
    read = load_train(f"imagefolder:{path}", storage=storage, image_size=12)
    width, height = (18, 12) if size[0] > size[1] else (12, 18)
    width = round(33 * 12 / 18) if size == (33, 18) else width
    for pixels, (_, _, content) in zip(read.images.numpy(), items, strict=True):
        with Image.open(io.BytesIO(content)) as image:
            resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - 12) // 2, (height - 12) // 2
        assert np.array_equal(pixels, np.asarray(resized)[top : top + 12, left : left + 12].transpose(2, 0, 1))


# ---- Parquet


def test_shards_hold_the_same_images_as_a_folder(tmp_path: Path, storage: Storage) -> None:
    path = write_shards(tmp_path / "p")
    train, test = load_train(f"parquet:{path}", storage=storage), load_test(f"parquet:{path}", storage=storage)
    assert_holds(train, make_items("train"))
    assert_holds(test, make_items("test"))
    folder = write_folder(tmp_path / "f", {"train": make_items("train")})
    assert train.digest == load_train(f"imagefolder:{folder}", storage=storage).digest


def test_many_images_stay_in_order(tmp_path: Path, storage: Storage) -> None:
    items = [(n % 3, f"{n}", encode(np.full((2, 2, 3), (n % 251, n // 251, 7), np.uint8))) for n in range(1500)]
    read = load_train(f"parquet:{write_parquet(tmp_path / 'all.parquet', items)}", storage=storage)
    assert_holds(read, items)


def test_one_file_is_one_part(tmp_path: Path, storage: Storage) -> None:
    items = make_items("train")
    train = write_parquet(tmp_path / "birds.parquet", items)
    test = write_parquet(tmp_path / "test-birds.parquet", items)
    assert_holds(load_train(f"parquet:{train}", storage=storage), items)
    assert_holds(load_test(f"parquet:{test}", storage=storage), items)
    for load, path, part in ((load_test, train, "test"), (load_train, test, "train")):
        with pytest.raises(UserError) as error:
            load(f"parquet:{path}", storage=storage)
        assert f"{path} has no {part} part" in one_sentence(error)


@pytest.mark.parametrize(
    ("label", "content"),
    [
        ("fine_label", {"fine": ["x", "y", "z"], "coarse": ["c"]}),
        ("fine_label", {"fine_label": ["x", "y", "z"]}),
        ("label", {"names": ["x", "y", "z"]}),
        ("species", ["x", "y", "z"]),
        ("label", [{"label": 2, "name": "z"}, {"label": 0, "name": "x"}, {"label": 1, "name": "y"}]),
    ],
)
def test_class_names_beside_the_shards(tmp_path: Path, storage: Storage, label: str, content: object) -> None:
    path = write_shards(tmp_path / "p", names=None, label=label)
    (path / "classes.json").write_text(json.dumps(content))
    assert load_train(f"parquet:{path}", storage=storage).class_names == ("x", "y", "z")


def test_class_names_of_the_metadata_come_first_and_labels_last(tmp_path: Path, storage: Storage) -> None:
    named = write_shards(tmp_path / "named")
    (named / "classes.json").write_text('["x", "y", "z"]')
    assert load_train(f"parquet:{named}", storage=storage).class_names == CLASSES
    bare = write_shards(tmp_path / "bare", names=None)
    write_parquet(bare / "test-00000-of-00001.parquet", make_items("test")[:2], names=None)  # class 0 alone
    assert load_train(f"parquet:{bare}", storage=storage).class_names == ("0", "1", "2")
    assert load_test(f"parquet:{bare}", storage=storage).class_names == ("0", "1", "2")


def test_label_is_preferred_to_fine_label_and_to_other_integers(tmp_path: Path, storage: Storage) -> None:
    items = make_items("train")
    others = {"fine_label": [9] * len(items), "year": [2011] * len(items)}
    path = write_parquet(tmp_path / "a.parquet", items, extra=others)
    assert_holds(load_train(f"parquet:{path}", storage=storage), items)
    path = write_parquet(tmp_path / "b.parquet", items, label="fine_label", extra={"year": others["year"]})
    assert_holds(load_train(f"parquet:{path}", storage=storage), items)


# ---- train and test are separate


def test_train_does_not_depend_on_the_test_part_of_parquet(tmp_path: Path, storage: Storage) -> None:
    path = write_shards(tmp_path / "p", names=None)  # no names: how many classes there are must come from train alone
    source = f"parquet:{path}"
    before = load_train(source, storage=part_of(storage, "1"))
    items = make_items("test")
    shuffled = [(label, name, content) for (_, name, content), (label, _, _) in zip(items, items[::-1], strict=True)]
    test_file = write_parquet(path / "test-00000-of-00001.parquet", [(7, *items[0][1:]), *shuffled[1:]], names=None)
    after_shuffle = load_train(source, storage=part_of(storage, "2"))
    test_file.write_bytes(b"not Parquet")
    after_damage = load_train(source, storage=part_of(storage, "3"))
    test_file.unlink()
    after_removal = load_train(source, storage=part_of(storage, "4"))
    for after in (after_shuffle, after_damage, after_removal):
        assert torch.equal(before.images, after.images)
        assert torch.equal(before.labels, after.labels)
        assert before.digest == after.digest
        assert before.class_names == after.class_names
    assert len({entry.name for number in range(1, 5) for entry in images_in(part_of(storage, number))}) == 1
    with pytest.raises(UserError) as error:
        load_test(source, storage=storage)
    assert f"{path} has no test part" in one_sentence(error)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_train_does_not_depend_on_the_test_part_of_images(tmp_path: Path, storage: Storage, kind: str) -> None:
    train, test = make_items("train"), make_items("test")
    shuffled = [(2 - label, name, content) for label, name, content in test]
    broken = [(label, name, b"not an image") for label, name, _ in test]
    digests = set()
    for index, items in enumerate((test, shuffled, broken, [])):
        parts = {"train": train, "test": items}
        path = (
            write_folder(tmp_path / f"{index}", parts) if kind == "folder" else write_zip(tmp_path / f"{index}", parts)
        )
        digests.add(load_train(f"imagefolder:{path}", storage=part_of(storage, index)).digest)
    assert len(digests) == 1
    assert len({entry.name for number in range(4) for entry in images_in(part_of(storage, number))}) == 1
    with pytest.raises(UserError) as error:
        load_test(f"imagefolder:{path}", storage=storage)
    assert f"{path} has no test part" in one_sentence(error)


# ---- bad input


def bad_folder(change: Callable[[Path], object]) -> Callable[[Path], str]:
    def build(tmp_path: Path) -> str:
        path = write_folder(tmp_path / "f", {"train": make_items("train"), "test": make_items("test")})
        change(path)
        return f"imagefolder:{path}"

    return build


def bad_zip(change: Callable[[Path], object]) -> Callable[[Path], str]:
    def build(tmp_path: Path) -> str:
        path = write_zip(tmp_path / "images.zip", {"train": make_items("train")})
        change(path)
        return f"imagefolder:{path}"

    return build


def bad_parquet(change: Callable[[Path], object]) -> Callable[[Path], str]:
    def build(tmp_path: Path) -> str:
        path = write_shards(tmp_path / "p")
        change(path / "train-00001-of-00002.parquet")
        return f"parquet:{path}"

    return build


def truncate(path: Path, keep: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def damage_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[300:900] = bytes(600)
    path.write_bytes(content)


def with_labels(labels: list[int | None]) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        items = [(label, name, content) for label, (_, name, content) in zip(labels, make_items("train"), strict=False)]
        write_parquet(path, items)

    return change


def with_columns(**columns: list[object]) -> Callable[[Path], object]:
    return lambda path: pq.write_table(pa.table(columns), path)


def null_image(path: Path) -> None:
    write_parquet(path, [(0, "a", make_items("train")[0][2]), (0, "b", None)])  # type: ignore[list-item]


def bomb(side: int) -> tuple[Callable[[Path], object], str]:
    """A small file with many pixels: above our limit, where Pillow would warn, and where it would refuse."""
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    content = buffer.getvalue()
    return lambda p: (p / "train/one/1.jpeg").write_bytes(content), r"train/one/1\.jpeg has .*too many"


def float_image() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((12, 12), 0.5, np.float32)).save(buffer, "TIFF")
    return buffer.getvalue()


IMAGE = [{"bytes": b"", "path": "a"}]
SHARD = r"p/train-00001-of-00002\.parquet"
BAD_FOLDERS = {
    "other size": (
        lambda p: (p / "train/one/1.jpeg").write_bytes(encode(np.zeros((9, 7, 3), np.uint8))),
        r"train/one/1\.jpeg has 7 x 9 pixels but .*train/nil/0\.png has 12 x 12; set image_size",
    ),
    "no image": (lambda p: (p / "train/two/notes.txt").write_text("no"), r"train/two/notes\.txt does not decode"),
    "empty file": (lambda p: (p / "train/two/2.webp").write_bytes(b""), r"train/two/2\.webp is empty"),
    "truncated png": (lambda p: truncate(p / "train/nil/0.png"), r"train/nil/0\.png does not decode"),
    "truncated jpeg": (lambda p: truncate(p / "train/one/1.jpeg", 0.9), r"train/one/1\.jpeg does not decode"),
    "many pixels": bomb(8200),
    "more pixels": bomb(9500),
    "most pixels": bomb(14_000),
    "floats": (
        lambda p: (p / "train/one/1.jpeg").write_bytes(float_image()),
        r"1\.jpeg does not decode .*floating-point",
    ),
    "all empty": (lambda p: [each.unlink() for each in (p / "train").glob("*/*")], r"train holds no images"),
    "no parts": (lambda p: [(p / s).rename(p / f"old-{s}") for s in ("train", "test")], r"f must hold train/<class>/"),
    "no train": (lambda p: (p / "train").rename(p / "old"), r"f has no train part"),
}
BAD_ZIPS = {
    "no zip": (lambda p: p.write_bytes(b"PK, but no zip"), r"images\.zip cannot be read as a zip"),
    "truncated": (truncate, r"images\.zip cannot be read as a zip"),
    "damaged": (damage_middle, r"images\.zip/train/two/.* cannot be read from the zip"),
    "flat": (lambda p: zipfile.ZipFile(p, "w").writestr("train/a.png", b""), r"images\.zip must hold train/<class>/"),
}
BAD_SHARDS = {
    "no parquet": (lambda p: p.write_bytes(b"text"), rf"{SHARD} cannot be read as Parquet"),
    "truncated": (truncate, rf"{SHARD} cannot be read as Parquet"),
    "damaged": (damage_middle, rf"{SHARD} (cannot be read as Parquet|row \d+ does not decode)"),
    "no image column": (
        with_columns(label=[0], image=["a"]),
        rf"{SHARD} must have one image column .* image \(string\)",
    ),
    "two image columns": (with_columns(label=[0], a=IMAGE, b=IMAGE), rf"{SHARD} must have one image column .* has 2"),
    "no label column": (with_columns(img=IMAGE), rf"{SHARD} must have an integer column label"),
    "two integers": (with_columns(img=IMAGE, x=[1], y=[2]), rf"{SHARD} must have an .* x \(int64\), y \(int64\)"),
    "text label": (with_columns(img=IMAGE, label=["a"], n=[0]), rf"{SHARD} must have an .* label \(string\)"),
    "mislabelled": (with_labels([0, 3]), rf"{SHARD} has label 3 in row 1; with 3 classes it must be in 0\.\.2"),
    "negative": (with_labels([0, 1, -1]), rf"{SHARD} has label -1 in row 2"),
    "null label": (with_labels([0, None]), rf"{SHARD} has no label in row 1"),
    "null image": (null_image, rf"{SHARD} holds no image bytes in row 1"),
    "no rows": (lambda p: write_parquet(p, []), rf"{SHARD} has no rows"),
    "not an image": (lambda p: write_parquet(p, [(0, "a", b"text")]), rf"{SHARD} row 0 does not decode"),
    "other size": (lambda p: write_parquet(p, make_items("test", 1, (5, 6))), rf"{SHARD} row 0 has 5 x 6 pixels"),
    "no train": (lambda p: [f.unlink() for f in p.parent.glob("train*")], r"parquet:.*p has no train part"),
    "no parts": (lambda p: [f.unlink() for f in p.parent.iterdir()], r"parquet:.*p must hold train-\*\.parquet"),
}
BAD = {
    **{f"folder, {name}": (bad_folder(change), message) for name, (change, message) in BAD_FOLDERS.items()},
    **{f"zip, {name}": (bad_zip(change), message) for name, (change, message) in BAD_ZIPS.items()},
    **{f"parquet, {name}": (bad_parquet(change), message) for name, (change, message) in BAD_SHARDS.items()},
}


@pytest.mark.parametrize(("build", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_gets_one_sentence(
    tmp_path: Path, storage: Storage, build: Callable[[Path], str], message: str
) -> None:
    source = build(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load_train(source, storage=storage)
    one_sentence(error)
    assert images_in(storage) == []  # nothing is half-written


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"classes\.json must have class names in valid JSON"),
        ('{"colours": ["x"]}', r"classes\.json must be a list .* label or names"),
        ('["x", "y", "x"]', r"classes\.json must name every class once, got 'x' twice"),
        ('["x", "", "z"]', r"classes\.json must hold non-empty strings"),
        ('["x", 1, "z"]', r"classes\.json must hold non-empty strings"),
        ('["x", "y"]', r"parquet has label 2 in row 1; with 2 classes"),
    ],
)
def test_bad_class_names(tmp_path: Path, storage: Storage, content: str, message: str) -> None:
    path = write_shards(tmp_path / "p", names=None)
    (path / "classes.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_train(f"parquet:{path}", storage=storage)
    one_sentence(error)


def test_a_class_of_test_that_train_lacks(tmp_path: Path, storage: Storage) -> None:
    train = [item for item in make_items("train") if item[0] != 1]
    path = write_folder(tmp_path / "f", {"train": train, "test": make_items("test")})
    with pytest.raises(UserError, match=r"test/one must have a folder one in .*train") as error:
        load_test(f"imagefolder:{path}", storage=storage)
    one_sentence(error)


def test_a_zip_that_unpacks_to_too_much(tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip_images, "MAX_BYTES", 10_000)
    path = write_zip(tmp_path / "z.zip", {"train": [*make_items("train"), (0, "zeros.png", bytes(10_000))]})
    with pytest.raises(UserError, match=r"z\.zip unpacks to more than 10000 bytes, too many\.") as error:
        load_train(f"imagefolder:{path}", storage=storage)
    one_sentence(error)


def test_an_image_that_is_in_a_zip_twice(tmp_path: Path, storage: Storage) -> None:
    items = make_items("train")
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = write_zip(tmp_path / "z.zip", {"train": [*items, items[0]]})
    with pytest.raises(UserError, match=r"z\.zip/train/nil/0\.png is in the zip twice") as error:
        load_train(f"imagefolder:{path}", storage=storage)
    one_sentence(error)


def test_a_message_of_several_lines_becomes_one() -> None:
    assert one_line(ValueError("Cannot read:\n  page 3\tis short.\n")) == "Cannot read: page 3 is short"
    assert one_line(EOFError()) == "EOFError"


def test_a_long_thin_image_is_not_blown_up(tmp_path: Path, storage: Storage) -> None:
    thin = [(0, "thin.png", encode(np.zeros((1, 20_000, 3), np.uint8)))]
    path = write_folder(tmp_path / "f", {"train": thin})
    with pytest.raises(UserError, match=r"thin\.png has 20000 x 1 pixels, too many") as error:
        load_train(f"imagefolder:{path}", storage=storage, image_size=128)
    one_sentence(error)


def test_what_pillow_warns_about_is_still_read(tmp_path: Path, storage: Storage) -> None:
    image = Image.new("P", (12, 12), 1)
    image.putpalette(bytes(range(6)))
    image.info["transparency"] = b"\x00\x80"
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    path = write_folder(tmp_path / "f", {"train": [(0, "odd.png", buffer.getvalue())]})
    assert load_train(f"imagefolder:{path}", storage=storage).images[0, :, 0, 0].tolist() == [
        129,
        129,
        130,
    ]  # half on white


@pytest.mark.parametrize("source", ["", "imagenet", "digits:here", "cifar100:x", "parquet", "parquet:", "imagefolder"])
def test_an_unknown_source_is_told_the_four_kinds(source: str, storage: Storage) -> None:
    for use in (validate_source, lambda s: load_train(s, storage=storage)):
        with pytest.raises(UserError) as error:
            use(source)
        message = one_sentence(error)
        assert repr(source) in message
        assert all(kind in message for kind in ("digits", "cifar100", "parquet:PATH", "imagefolder:PATH"))


def test_validate_source(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", {"train": make_items("train")})
    zipped = write_zip(tmp_path / "a.zip", {"test": make_items("test")})
    shards = write_shards(tmp_path / "p")
    for good in ("digits", "cifar100", f"imagefolder:{folder}", f"imagefolder:{zipped}", f"parquet:{shards}"):
        validate_source(good)
    for bad in (f"imagefolder:{shards}", f"parquet:{folder}", "imagefolder:/no/such", "parquet:/no/such"):
        with pytest.raises(UserError) as error:
            validate_source(bad)
        assert bad in one_sentence(error)


def test_image_size_must_be_positive(storage: Storage) -> None:
    with pytest.raises(UserError, match="image_size must be at least 1 or none, got 0"):
        load_train("digits", storage=storage, image_size=0)


# ---- ImageSet


def test_the_digest_sees_shape_pixels_labels_and_names() -> None:
    images, labels, names = torch.arange(48, dtype=torch.uint8).view(2, 3, 2, 4), torch.tensor([0, 1]), ("a", "b")
    base = make_image_set(images, labels, names)
    assert len(base) == 2
    assert make_image_set(images.clone(), labels.clone(), list(names)).digest == base.digest
    others = [
        make_image_set(images.view(2, 3, 4, 2), labels, names),
        make_image_set(images.flip(3), labels, names),
        make_image_set(images, labels.flip(0), names),
        make_image_set(images, labels, ("a", "c")),
        make_image_set(images, labels, ("a", "b", "c")),
    ]
    assert len({base.digest, *(other.digest for other in others)}) == 6


def test_what_does_not_fit_together_is_refused() -> None:
    images, labels, names = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b")
    for arguments, message in [
        ((images.float(), labels, names), "images must be uint8"),
        ((images[0], labels, names), "images must be uint8"),
        ((images[:0], labels[:0], names), "at least one image"),
        ((images, labels[:1], names), r"labels must be int64 \[2\]"),
        ((images, labels.int(), names), r"labels must be int64"),
        ((images, labels - 1, names), r"labels must be in 0\.\.1"),
        ((images, labels + 1, names), r"labels must be in 0\.\.1"),
        ((images, labels, ("a", "a")), "every class once"),
        ((images, labels, ("a", " ")), "non-empty strings"),
        ((images, labels, ()), "at least one class"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            make_image_set(*arguments)
        one_sentence(error)
