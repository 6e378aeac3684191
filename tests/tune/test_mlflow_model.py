"""The student as an MLflow model decodes and predicts as the package does, without it."""

from __future__ import annotations

import dataclasses
import importlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from photos import CLASSES, write_photos
from PIL import Image

from refilled.execution import refit, run_folder
from refilled.presets import smoke
from refilled.storage import Storage
from refilled.storage.run_folder import RunFolder
from refilled.student import Student
from refilled.tasks.classification import load_task, load_test_images
from refilled.training.compute import Compute
from tune.tracking.mlflow_model import write_mlflow_model

METADATA = {"classes": list(CLASSES), "run_key": "abc-0"}


def loaded(folder: Path) -> Any:
    with warnings.catch_warnings():  # of MLflow's own type hints, when it is imported
        warnings.filterwarnings("ignore", message=".*Any type hint is inferred as AnyType", category=UserWarning)
        pyfunc = importlib.import_module("mlflow.pyfunc")
    return pyfunc.load_model(str(folder / "model"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, list[Path], torch.Tensor]:
    """A refit on photographs of different sizes, in bfloat16; the files of its test part, and their pixels."""
    root, storage = write_photos(tmp_path_factory.mktemp("photos")), Storage.open(tmp_path_factory.mktemp("storage"))
    run = smoke().run.with_overrides(
        {
            **{"data": f"imagefolder:{root}", "image_size": 20, "num_teacher_classes": 3, "num_student_classes": 3},
            **{"method": "student", "epochs": (0, 3), "val_fraction": 0.0, "global_batch_size": 16},
            "precision": "bfloat16",
        }
    )
    refit(run, storage, Compute(torch.device("cpu"), "bfloat16"))
    folder = run_folder(run, storage)
    write_mlflow_model(folder, METADATA)
    paths = [path for name in CLASSES for path in sorted((root / "test" / name).iterdir(), key=lambda path: path.name)]
    return folder, paths, load_test_images(run, storage, CLASSES).images


def test_photos_are_named_as_by_the_student(photos: tuple[RunFolder, list[Path], torch.Tensor]) -> None:
    folder, paths, pixels = photos
    student, served = Student.open(folder.model_path), loaded(folder.path)
    expected, probabilities = student.predict(paths), student.probabilities(paths)
    assert len({each.class_name for each in expected}) > 1
    inputs = {
        "paths": pd.DataFrame({"image": [str(path) for path in paths]}),
        "bytes": pd.DataFrame({"image": [path.read_bytes() for path in paths]}),
        "array": pixels.numpy(),
        "named array": {"image": pixels.numpy()},
    }
    for name, given in inputs.items():
        found = served.predict(given)
        assert list(found.columns) == ["class_name", "probability", "probabilities"], name
        assert list(found["class_name"]) == [each.class_name for each in expected], name
        # The same scores to the last bit; their softmax is in float64 here.
        np.testing.assert_allclose(np.array(found["probabilities"].tolist()), probabilities.numpy(), atol=1e-6)
        np.testing.assert_allclose(found["probability"], [each.probability for each in expected], atol=1e-6)


def test_the_model_says_what_it_is(photos: tuple[RunFolder, list[Path], torch.Tensor]) -> None:
    folder, _, _ = photos
    served = loaded(folder.path)
    about = served.metadata
    assert about.metadata == METADATA
    assert [each.name for each in about.signature.inputs] == ["image"]
    assert [each.name for each in about.signature.outputs] == ["class_name", "probability", "probabilities"]
    names = [line.partition("==")[0] for line in (folder.path / "model" / "requirements.txt").read_text().split()]
    assert names == ["mlflow", "torch", "numpy", "pillow", "pandas"]
    assert "+" not in (folder.path / "model" / "requirements.txt").read_text()  # no index has a build's own version
    assert len(served.predict(served.input_example)) == 1


def test_it_is_written_once_and_anew_with_other_weights(photos: tuple[RunFolder, list[Path], torch.Tensor]) -> None:
    folder, _, _ = photos
    last = folder.path / "model" / "MLmodel"
    written_ns = last.stat().st_mtime_ns
    write_mlflow_model(folder, METADATA)
    assert last.stat().st_mtime_ns == written_ns
    write_mlflow_model(folder, METADATA | {"model_sha256": "other"})
    assert last.stat().st_mtime_ns > written_ns
    write_mlflow_model(folder, METADATA)


def test_a_grey_student_sees_colours_as_the_package_shows_them(storage: Storage, tmp_path: Path) -> None:
    run = dataclasses.replace(smoke().run, method="student", epochs=(0, 1), val_fraction=0.0)
    refit(run, storage, Compute(torch.device("cpu"), "float32"))
    folder = run_folder(run, storage)
    write_mlflow_model(folder, {"classes": list(load_task(run, storage).spaces.student)})
    draws = np.random.default_rng(0)
    paths = []
    for index, (height, width) in enumerate([(8, 8), (9, 30), (64, 17)]):
        paths.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(draws.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    found = loaded(folder.path).predict(pd.DataFrame({"image": paths}))
    expected = Student.open(folder.model_path).probabilities(paths)
    np.testing.assert_allclose(np.array(found["probabilities"].tolist()), expected.numpy(), atol=1e-6)


def odd_images() -> dict[str, bytes]:
    """What people have beside plain RGB: one of each thing that decoding minds."""
    draws = np.random.default_rng(1)
    colour = Image.fromarray(draws.integers(0, 256, (24, 30, 3), dtype=np.uint8))
    alpha = Image.fromarray(draws.integers(0, 256, (24, 30), dtype=np.uint8))
    turned = colour.getexif()
    turned[0x0112] = 6
    images: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "turned": (colour, "PNG", {"exif": turned}),
        "RGBA": (Image.merge("RGBA", [*colour.split(), alpha]), "PNG", {}),
        "LA": (Image.merge("LA", [alpha, alpha]), "PNG", {}),
        "palette": (colour.quantize(16), "PNG", {"transparency": 3}),
        "16 bits": (Image.fromarray(draws.integers(0, 2**16, (24, 30)).astype(np.uint16)), "PNG", {}),
        "CMYK": (colour.convert("CMYK"), "JPEG", {}),
        "1 bit": (colour.convert("1"), "PNG", {}),
    }
    found = {}
    for name, (image, file_format, options) in images.items():
        buffer = io.BytesIO()
        image.save(buffer, file_format, **options)
        found[name] = buffer.getvalue()
    return found


def test_odd_images_are_decoded_as_by_the_student(photos: tuple[RunFolder, list[Path], torch.Tensor]) -> None:
    folder, _, _ = photos
    encoded = odd_images()
    found = loaded(folder.path).predict(pd.DataFrame({"image": list(encoded.values())}))
    expected = Student.open(folder.model_path).probabilities(list(encoded.values()))
    for name, one, other in zip(encoded, found["probabilities"], expected.tolist(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6, err_msg=name)


def test_what_is_no_image_is_named(photos: tuple[RunFolder, list[Path], torch.Tensor], tmp_path: Path) -> None:
    folder, paths, pixels = photos
    served = loaded(folder.path)
    (tmp_path / "text.png").write_text("no image")
    for given, message in (
        (pd.DataFrame({"image": [str(tmp_path / "text.png")]}), "text.png does not decode as an image"),
        (pd.DataFrame({"image": [paths[0].read_bytes(), b"nothing"]}), "image 1 does not decode"),
        (pixels.numpy()[:, :, :5], r"must be uint8 \[N, 3, 20, 20\], got uint8"),
        (pixels.numpy() / 255, r"must be uint8 \[N, 3, 20, 20\], got float64"),
    ):
        with pytest.raises(ValueError, match=message):
            served.predict(given)
