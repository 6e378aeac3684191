"""Image folders and zips as people have them: what lies beside the images, and how names are written."""

from __future__ import annotations

import shutil
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from image_files import CLASSES, make_items, write_folder, write_zip

from refilled.data.label_space import listed_classes, order_classes
from refilled.data.sources import load_test, load_train
from refilled.errors import UserError
from refilled.storage import Storage

PARTS = {part: make_items(part) for part in ("train", "test")}
LITTER = (
    *("Thumbs.db", "thumbs.db", "THUMBS.DB", "ehthumbs.db", "desktop.ini", "Desktop.ini", "Icon\r", ".DS_Store"),
    *("._0.png", "~$0.png", ".nfs000012"),
)
LITTER_FOLDERS = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", ".git")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "storage")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "data", PARTS)


def zipped(folder: Path, path: Path, separator: str = "/") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(each for each in folder.rglob("*") if each.is_file()):
            archive.writestr(file.relative_to(folder).as_posix().replace("/", separator), file.read_bytes())
    return path


def digests(path: Path, storage: Storage) -> tuple[str, str]:
    source = f"imagefolder:{path}"
    return load_train(source, storage=storage).digest, load_test(source, storage=storage).digest


def with_litter(folder: Path) -> None:
    for place in (folder, folder / "train", folder / "train" / CLASSES[0], folder / "test" / CLASSES[1]):
        for name in LITTER:
            (place / name).write_bytes(b"litter")
        for name in LITTER_FOLDERS:
            (place / name).mkdir()
            (place / name / "0.png").write_bytes(b"litter")


def with_text_beside(folder: Path) -> None:
    for place in (folder, folder / "train"):
        (place / "README.md").write_text("read me")
        (place / "licence.txt").write_text("yours")


def in_one_folder(folder: Path) -> None:
    inner = folder.with_name("inner")
    folder.rename(inner)
    folder.mkdir()
    shutil.move(inner, folder / "my data")


def in_one_folder_beside_text(folder: Path) -> None:
    in_one_folder(folder)
    (folder / "README.md").write_text("read me")
    (folder / "papers").mkdir()
    with_litter_beside(folder)


def with_litter_beside(folder: Path) -> None:
    (folder / "__MACOSX" / "my data" / "train").mkdir(parents=True)
    (folder / "desktop.ini").write_text("litter")


@pytest.mark.parametrize("change", [with_litter, with_text_beside, in_one_folder, in_one_folder_beside_text])
@pytest.mark.parametrize("is_zip", [False, True])
def test_what_lies_beside_the_images_changes_nothing(
    tmp_path: Path, folder: Path, storage: Storage, change: Callable[[Path], None], is_zip: bool
) -> None:
    expected = digests(folder, storage)
    change(folder)
    path = zipped(folder, tmp_path / "data.zip") if is_zip else folder
    assert digests(path, Storage(tmp_path / "other")) == expected


def test_two_data_sets_in_one_folder_are_told(tmp_path: Path, folder: Path, storage: Storage) -> None:
    in_one_folder(folder)
    shutil.copytree(folder / "my data", folder / "your data")
    for path in (folder, zipped(folder, tmp_path / "data.zip")):
        with pytest.raises(UserError, match=r"one data set, but .*my data and .*your data are two; name one"):
            load_train(f"imagefolder:{path}", storage=storage)


def test_names_in_a_zip_with_the_separator_of_windows(tmp_path: Path, folder: Path, storage: Storage) -> None:
    expected = digests(folder, storage)
    assert digests(zipped(folder, tmp_path / "data.zip", "\\"), Storage(tmp_path / "other")) == expected


@pytest.mark.parametrize("is_zip", [False, True])
def test_an_empty_file_is_called_empty(tmp_path: Path, storage: Storage, is_zip: bool) -> None:
    parts = {**PARTS, "train": [*PARTS["train"], (0, "z.png", b"")]}
    path = write_zip(tmp_path / "d.zip", parts) if is_zip else write_folder(tmp_path / "d", parts)
    with pytest.raises(UserError, match=r"train/nil/z\.png is empty; remove it, or put its image there again\."):
        load_train(f"imagefolder:{path}", storage=storage)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("listed", ["NFC", "NFD"])
def test_lists_of_classes_with_marks_and_in_either_form(
    tmp_path: Path, folder: Path, storage: Storage, form: str, listed: str
) -> None:
    name = unicodedata.normalize(form, "crème brûlée")
    for part in PARTS:
        (folder / part / CLASSES[0]).rename(folder / part / name)
    classes = load_train(f"imagefolder:{folder}", storage=storage).class_names
    order = tmp_path / "order.txt"
    lines = [CLASSES[2], unicodedata.normalize(listed, name), CLASSES[1]]
    order.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    assert order_classes(str(order), classes) == (CLASSES[2], unicodedata.normalize("NFC", name), CLASSES[1])
    assert listed_classes("\n".join(lines), "teacher_classes", "teacher.txt", None)[1] == classes[0]
