"""A trained student in a user's hands says of every test image what its test accuracy counted."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import CLASSES, write_photos
from PIL import Image
from torch import Tensor

import refilled
from refilled.config import RunConfig
from refilled.data.images import ImageSet
from refilled.errors import UserError
from refilled.execution import refit, run_folder
from refilled.presets import smoke
from refilled.storage import Storage
from refilled.storage.run_folder import RunFolder
from refilled.student import Student
from refilled.tasks.classification import load_task, load_test_images
from refilled.training.compute import Compute


@dataclasses.dataclass(frozen=True)
class Refit:
    """A tested student, where it lies, and the images on which it was tested."""

    run: RunConfig
    folder: RunFolder
    test: ImageSet
    test_accuracy: float

    @property
    def truth(self) -> list[str]:
        return [self.test.class_names[label] for label in self.test.labels.tolist()]

    def share_right(self, names: list[str]) -> float:
        return sum(a == b for a, b in zip(names, self.truth, strict=True)) / len(self.test)


def refitted(run: RunConfig, storage: Storage) -> Refit:
    value = refit(run, storage, Compute(torch.device("cpu"), run.precision))
    test = load_test_images(run, storage, load_task(run, storage).spaces.student)
    return Refit(run, run_folder(run, storage), test, value)


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


def names(student: Student, images: object) -> list[str]:
    return [each.class_name for each in student.predict(images)]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Refit:
    run = dataclasses.replace(smoke().run, method="student", overlap=0.4, epochs=(0, 3), val_fraction=0.0)
    return refitted(run, Storage.open(tmp_path_factory.mktemp("digits")))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Refit, Path]:
    root = write_photos(tmp_path_factory.mktemp("photos"))
    run = dataclasses.replace(
        smoke().run,
        data=f"imagefolder:{root}",
        image_size=20,
        num_teacher_classes=3,
        num_student_classes=3,
        overlap=1.0,
        method="student",
        epochs=(0, 3),
        val_fraction=0.0,
        global_batch_size=16,
    )
    return refitted(run, Storage.open(tmp_path_factory.mktemp("storage"))), root


def test_the_package_alone_loads_no_torch() -> None:
    code = "import sys, refilled; assert 'torch' not in sys.modules; refilled.load; assert 'mlflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = refilled.nothing


def test_digits_are_named_as_the_test_counted_them(digits: Refit, tmp_path: Path) -> None:
    student = refilled.load(digits.folder.path)
    assert student.classes == digits.test.class_names
    assert 0.3 < digits.test_accuracy < 1.0  # equality below says something only where some are wrong
    found = names(student, digits.test.images)
    assert digits.share_right(found) == digits.test_accuracy
    paths = []
    for index, pixels in enumerate(digits.test.images):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(pixels[0].numpy()).save(paths[-1])
    assert names(student, paths) == found
    assert names(student, [str(path) for path in paths]) == found
    assert names(student, (opened(path) for path in paths)) == found
    assert names(student, [path.read_bytes() for path in paths]) == found
    assert names(student, [opened(path).convert("RGB") for path in paths]) == found


def test_photos_of_different_sizes_are_named_as_the_test_counted_them(photos: tuple[Refit, Path]) -> None:
    refit, root = photos
    student = refilled.load(str(refit.folder.model_path))
    paths = [path for name in CLASSES for path in sorted((root / "test" / name).iterdir(), key=lambda path: path.name)]
    assert len({opened(path).size for path in paths}) > len(paths) // 2
    assert {opened(path).mode for path in paths} == {"RGB", "L", "P"}
    assert 0.4 < refit.test_accuracy < 1.0
    found = names(student, paths)
    assert refit.share_right(found) == refit.test_accuracy
    assert names(student, refit.test.images) == found
    logits = student.logits(paths)
    assert torch.equal(logits, student.logits([opened(path) for path in paths]))
    assert torch.equal(logits, student.logits(np.ascontiguousarray(refit.test.images.permute(0, 2, 3, 1))))


@pytest.mark.parametrize("precision", ["bfloat16", "float64"])
def test_the_precision_is_that_of_the_test(precision: str, tmp_path: Path) -> None:
    run = smoke().run.with_overrides({"method": "student", "epochs": (0, 2), "val_fraction": 0.0})
    refit = refitted(dataclasses.replace(run, precision=precision), Storage.open(tmp_path))  # type: ignore[arg-type]
    student = refilled.load(refit.folder.path)
    assert student.compute.precision == precision
    assert refit.share_right(names(student, refit.test.images)) == refit.test_accuracy
    alone = tmp_path / "alone.pt"
    shutil.copy(refit.folder.model_path, alone)
    assert refilled.load(alone).compute.precision == "float32"
    assert not torch.equal(refilled.load(alone).logits(refit.test.images), student.logits(refit.test.images))


def test_predictions_are_the_networks_own(digits: Refit) -> None:
    student = refilled.load(digits.folder.path, batch_size=7)
    images = digits.test.images[:20]
    probabilities = student.probabilities(images)
    assert probabilities.shape == (20, 5)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(20))
    for each, row in zip(student.predict(images), probabilities, strict=True):
        assert each.class_name == student.classes[int(row.argmax())]
        assert each.probability == pytest.approx(float(row.max()), abs=1e-6)
    normalised = student.normalization.apply(images, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(student.model(normalised).logits, student.logits(images), rtol=1e-5, atol=1e-5)
    assert not student.model.training
    assert student.predict([]) == []
    assert student.probabilities(images[:0]).shape == (0, 5)


def test_one_image_in_every_layout(photos: tuple[Refit, Path]) -> None:
    refit, _ = photos
    student = refilled.load(refit.folder.path)
    image = refit.test.images[1]
    expected = student.logits(image[None])
    last = image.permute(1, 2, 0)
    layouts: list[Tensor] = [image, last, last[None]]
    for each in layouts:
        assert torch.equal(student.logits(each), expected)
        assert torch.equal(student.logits(each.numpy()), expected)
    torch.testing.assert_close(student.logits([image, last.numpy()]), expected.expand(2, -1))
    grey = image[0]
    assert torch.equal(student.logits(grey), student.logits(grey.expand(3, -1, -1)))
    other_size = Image.fromarray(last.numpy()).resize((31, 50))
    assert torch.equal(student.logits(other_size), student.logits(np.asarray(other_size)))


def test_colour_becomes_grey_as_pillow_makes_it(digits: Refit) -> None:
    student = refilled.load(digits.folder.path)
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(colours)
    assert torch.equal(student.logits(image), student.logits(np.asarray(image.convert("L"))))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_a_picture_of_another_size_is_the_same_from_pillow_and_from_its_file(
    digits: Refit, tmp_path: Path, mode: str
) -> None:
    """Colour is resized before it becomes grey, as where files are decoded."""
    student = Student.open(digits.folder.model_path)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).convert(mode)
    picture.save(tmp_path / "picture.png")
    assert torch.equal(student.logits(picture), student.logits(tmp_path / "picture.png"))


def test_arrays_as_numpy_slices_them(digits: Refit) -> None:
    student = Student.open(digits.folder.model_path)
    images = digits.test.images[:5].numpy()
    expected = student.logits(images)
    assert torch.equal(student.logits(images[::-1]), expected.flip(0))
    mirrored = images[:, :, :, ::-1]
    assert torch.equal(student.logits(mirrored), student.logits(np.ascontiguousarray(mirrored)))
    kept = images.copy()
    kept.setflags(write=False)
    assert torch.equal(student.logits(kept), expected)


def test_arrays_without_pixels_are_refused(digits: Refit) -> None:
    student = Student.open(digits.folder.model_path)
    for shape in ((0, 0), (1, 0, 8), (2, 1, 0, 8)):
        with pytest.raises(UserError, match="must have pixels, got"):
            student.predict(np.zeros(shape, dtype=np.uint8))


def test_a_precision_that_there_is_not(digits: Refit) -> None:
    with pytest.raises(UserError, match=r"precision must be .*float32.* or none, got 'float8'"):
        refilled.load(digits.folder.path, precision="float8")  # type: ignore[arg-type]


def test_what_is_no_image_is_one_sentence(digits: Refit, photos: tuple[Refit, Path], tmp_path: Path) -> None:
    student = refilled.load(photos[0].folder.path)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    wrong = {
        "missing.png must be a file with an image, but cannot be read": "missing.png",
        f"{broken} does not decode": broken,
        "image 0 does not decode": b"nothing",
        f"{tmp_path} must be a file": tmp_path,
        "uint8, as decoded, neither scaled nor normalised, got torch.float32": torch.zeros(1, 3, 20, 20),
        r"with C = 3, got uint8 \[4, 20, 20\]\.": np.zeros((4, 20, 20), np.uint8),
        r"with C = 3, got torch.uint8 \[5, 3, 9, 3\], which could be either": torch.zeros(
            5, 3, 9, 3, dtype=torch.uint8
        ),
        "image 1 must be a path": [photos[0].test.images[0], 5],
        r"does not decode \(floating-point pixels\)": Image.new("F", (20, 20)),
        "images must be paths, Pillow images or uint8 arrays, alone or as a list, got int": 5,
        r"image 0 must be .*, got uint8 \[1, 20, 20, 3\]": [np.zeros((1, 20, 20, 3), np.uint8)],
    }
    for message, images in wrong.items():
        with pytest.raises(UserError, match=message):
            student.predict(images)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"batch_size must be at least 1, got 0\."):
        refilled.load(digits.folder.path, batch_size=0)
    for device in ("nowhere", "cuda:99"):
        with pytest.raises(UserError, match=f"device must be one that torch can use here, got '{device}'"):
            refilled.load(digits.folder.path, device=device)


def test_a_picture_that_is_not_square_must_have_the_size_of_training(digits: Refit) -> None:
    student = refilled.load(digits.folder.path)
    oblong = Student(
        student.model,
        classes=student.classes,
        image_shape=(1, 8, 10),
        normalization=student.normalization,
        compute=student.compute,
    )
    assert len(oblong.predict(np.zeros((3, 1, 8, 10), np.uint8))) == 3
    with pytest.raises(UserError, match=r"images must have 10 x 8 pixels, as the training images had, got 8 x 8\."):
        oblong.predict(np.zeros((3, 1, 8, 8), np.uint8))


def summary_row(folder: str, method: str, val_accuracy: float, overlap: float = 0.4) -> dict[str, object]:
    where = {"overlap": overlap, "teacher": "convnet-32", "student": "convnet-8"}
    return where | {"method": method, "val_accuracy": val_accuracy, "run_keys": [f"0123456789abcdef-{folder}"]}


def test_a_storage_gives_its_best_student_or_names_the_folders(digits: Refit, tmp_path: Path) -> None:
    storage, name = digits.folder.storage.root, digits.folder.path.name
    assert torch.equal(
        refilled.load(storage).logits(digits.test.images), refilled.load(digits.folder.path).logits(digits.test.images)
    )  # the only tested one
    other = shutil.copytree(storage / "runs" / name, tmp_path / "runs" / "other-0")
    shutil.copytree(storage / "runs" / name, tmp_path / "runs" / name)
    with pytest.raises(UserError, match=rf"has 2 tested students; name one of their folders: .*{name}, .*other-0\."):
        refilled.load(tmp_path)
    rows = [summary_row("gone-0", "student", 0.8), summary_row("other-0", "rkd", 0.9), summary_row(name, "at", 0.7)]
    (tmp_path / "summary.json").write_text(json.dumps(rows))
    assert refilled.loading.model_file(tmp_path) == other / "model.pt"
    rows.append(summary_row(name, "at", 0.7, overlap=1.0))
    (tmp_path / "summary.json").write_text(json.dumps(rows))
    said = rf"students of 2 cells; .*: overlap 0\.4 convnet-32>convnet-8: {other}, overlap 1 .*: .*{name}\.$"
    with pytest.raises(UserError, match=said):
        refilled.load(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps([rows[0], rows[1] | {"images_per_class": 25}]))
    with pytest.raises(
        UserError, match=rf"students of 2 cells; .*>convnet-8: .*gone-0, .*>convnet-8 25 a class: {other}"
    ):
        refilled.load(tmp_path)
    (other / "model.pt").unlink()
    (tmp_path / "summary.json").write_text(json.dumps(rows[:3]))
    with pytest.raises(UserError, match=r"other-0, which must have a model\.pt, but has not"):
        refilled.load(tmp_path)
    with pytest.raises(UserError, match=r"folder of a finished run, but has no model\.pt yet"):
        refilled.load(other)
    for text, message in (("[]", "has no student"), ("{}", "has no student"), ('["x"]', "must be a search's summary")):
        (tmp_path / "summary.json").write_text(text)
        with pytest.raises(UserError, match=message):
            refilled.load(tmp_path)
    with pytest.raises(UserError, match="there is no student there"):
        refilled.load(tmp_path / "nowhere")
    (tmp_path / "model.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"model\.pt must be a whole file"):
        refilled.load(tmp_path / "model.pt")
