"""Photographs and drawings as people have them: each becomes what a person would see, or is refused by name."""

from __future__ import annotations

import io
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_files import make_items, write_folder
from PIL import Image, ImageCms

from refilled.data.colours import upright_rgb
from refilled.data.sources import load_test, load_train
from refilled.errors import UserError
from refilled.storage import Storage

SIDE = 16
Pixels = np.ndarray


def wedge() -> Pixels:
    """A picture that no turn and no mirror leaves as it is, [H, W, 3]."""
    pixels = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    pixels[:4, :8] = (200, 40, 40)
    pixels[12:, :4] = (40, 200, 40)
    pixels[6:10, 10:] = (40, 40, 200)
    return pixels


def written(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def turned(orientation: int, undo: Image.Transpose | None) -> bytes:
    """The picture as a camera stores it that was held otherwise."""
    image = Image.fromarray(wedge())
    if undo is not None:
        image = image.transpose(undo)
    exif = image.getexif()
    exif[0x0112] = orientation
    return written(image, exif=exif)


def with_alpha(mode: str) -> tuple[bytes, Pixels]:
    """Half of the picture fully transparent over red that is not meant to be seen."""
    alpha = np.full((SIDE, SIDE), 255, dtype=np.uint8)
    alpha[:, 8:] = 0
    expected = wedge()
    if mode == "LA":
        grey = np.asarray(Image.fromarray(wedge()).convert("L"))
        expected = np.repeat(grey[:, :, None], 3, axis=2)
        image = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    else:
        hidden = wedge()
        hidden[:, 8:] = (255, 0, 0)
        image = Image.fromarray(np.dstack([hidden, alpha]))
    expected = expected.copy()
    expected[:, 8:] = 255
    return written(image), expected


def palette(transparent: bool) -> tuple[bytes, Pixels]:
    image = Image.fromarray(wedge()).quantize(8)
    expected = np.asarray(image.convert("RGB")).copy()
    if not transparent:
        return written(image), expected
    index = int(np.asarray(image)[0, 0])
    expected[np.asarray(image) == index] = 255
    return written(image, transparency=index), expected


def deep_grey(file_format: str) -> tuple[bytes, Pixels]:
    levels = np.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)
    expected = np.repeat(np.round(levels / 257).astype(np.uint8)[:, :, None], 3, axis=2)
    return written(Image.fromarray(levels), file_format), expected


def one_bit() -> tuple[bytes, Pixels]:
    bits = np.asarray(Image.fromarray(wedge()).convert("1"))
    return written(Image.fromarray(bits)), np.repeat(bits[:, :, None].astype(np.uint8) * 255, 3, axis=2)


def animated() -> tuple[bytes, Pixels]:
    first, second = (Image.fromarray(each).quantize(8) for each in (wedge(), 255 - wedge()))
    content = written(first, "GIF", save_all=True, append_images=[second])
    return content, np.asarray(first.convert("RGB"))


EXACT: dict[str, Callable[[], tuple[bytes, Pixels]]] = {
    "as stored": lambda: (turned(1, None), wedge()),
    "mirrored": lambda: (turned(2, Image.Transpose.FLIP_LEFT_RIGHT), wedge()),
    "upside down": lambda: (turned(3, Image.Transpose.ROTATE_180), wedge()),
    "held left": lambda: (turned(6, Image.Transpose.ROTATE_90), wedge()),
    "held right": lambda: (turned(8, Image.Transpose.ROTATE_270), wedge()),
    "RGBA": lambda: with_alpha("RGBA"),
    "LA": lambda: with_alpha("LA"),
    "palette": lambda: palette(transparent=False),
    "palette with a transparent colour": lambda: palette(transparent=True),
    "16 bits, PNG": lambda: deep_grey("PNG"),
    "16 bits, TIFF": lambda: deep_grey("TIFF"),
    "1 bit": one_bit,
    "animation": animated,
}


@pytest.mark.parametrize("kind", EXACT)
def test_it_is_what_a_person_sees(kind: str, tmp_path: Path, storage: Storage) -> None:
    content, expected = EXACT[kind]()
    path = write_folder(tmp_path / "photos", {"train": [(0, "PHOTO.BIN", content)]})
    found = load_train(f"imagefolder:{path}", storage=storage).images[0].permute(1, 2, 0).numpy()
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("kind", ["CMYK", "progressive", "profile"])
def test_lossy_kinds_are_close(kind: str, tmp_path: Path, storage: Storage) -> None:
    image = Image.fromarray(wedge()).resize((64, 64), Image.Resampling.NEAREST)
    options: dict[str, object] = {"quality": 95, "progressive": kind == "progressive"}
    if kind == "profile":
        options["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    stored = image.convert("CMYK") if kind == "CMYK" else image
    content = written(stored, "JPEG", **options)
    path = write_folder(tmp_path / "photos", {"train": [(0, "A.JPG", content)]})
    found = load_train(f"imagefolder:{path}", storage=storage).images[0].permute(1, 2, 0).numpy()
    assert np.abs(found.astype(int) - np.asarray(image).astype(int)).mean() < 6


def test_beyond_16_bits_there_is_no_range() -> None:
    with pytest.raises(ValueError, match="integers beyond 16 bits"):
        upright_rgb(Image.fromarray(np.full((4, 4), 70_000, dtype=np.int32)))


def test_folders_inside_a_class_and_litter(tmp_path: Path, storage: Storage) -> None:
    flat = write_folder(tmp_path / "flat", {"train": make_items("train")})
    nested = write_folder(tmp_path / "nested", {"train": make_items("train")})
    for folder in list((nested / "train").iterdir()):
        files = sorted(folder.iterdir())
        (folder / "0 first").mkdir()
        files[0].rename(folder / "0 first" / files[0].name)
        for litter in ("Thumbs.db", "._1.png", ".DS_Store"):
            (folder / litter).write_bytes(b"litter")
        (folder / "__MACOSX").mkdir()
        (folder / "__MACOSX" / "1.png").write_bytes(b"litter")
    digests = {load_train(f"imagefolder:{path}", storage=storage).digest for path in (flat, nested)}
    assert len(digests) == 1


def test_a_link_to_a_folder_is_refused(tmp_path: Path, storage: Storage) -> None:
    path = write_folder(tmp_path / "photos", {"train": make_items("train")})
    (path / "train" / "one" / "again").symlink_to(path / "train")
    with pytest.raises(UserError, match="again must not be a link to a folder"):
        load_train(f"imagefolder:{path}", storage=storage)


def test_names_of_both_spellings_are_one_class(tmp_path: Path, storage: Storage) -> None:
    """A Mac writes é as e and an accent."""
    (_, _, content), *_ = make_items("train")
    composed, taken_apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    root = tmp_path / "photos"
    for part, name in (("train", taken_apart), ("train", "tea"), ("test", composed), ("test", "tea")):
        (root / part / name).mkdir(parents=True)
        (root / part / name / "ä.png").write_bytes(content)
    train, test = load_train(f"imagefolder:{root}", storage=storage), load_test(f"imagefolder:{root}", storage=storage)
    assert train.class_names == test.class_names == (composed, "tea")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for file in sorted(root.rglob("*.png")):
            archive.write(file, file.relative_to(root).as_posix())
    assert load_train(f"imagefolder:{tmp_path / 'photos.zip'}", storage=storage).digest == train.digest
    (root / "train" / composed).mkdir()
    with pytest.raises(UserError, match="is there twice, in two spellings"):
        load_train(f"imagefolder:{root}", storage=storage)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("labels.csv", b"file,label\n", r"labels\.csv does not decode as an image \(unknown format\)"),
        ("empty.jpg", b"", r"empty\.jpg is empty"),
        ("cut.jpg", written(Image.fromarray(wedge()).resize((64, 64)), "JPEG")[:400], r"cut\.jpg does not decode"),
        ("float.tiff", written(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "floating-point pixels"),
        ("large.png", written(Image.new("RGB", (20, 30))), r"large\.png has 20 x 30 pixels but .*set image_size"),
    ],
)
def test_the_rest_is_refused_by_name(
    name: str, content: bytes, sentence: str, tmp_path: Path, storage: Storage
) -> None:
    path = write_folder(tmp_path / "photos", {"train": [*make_items("train"), (2, name, content)]})
    with pytest.raises(UserError, match=sentence):
        load_train(f"imagefolder:{path}", storage=storage)
