"""Exported students give the scores of the student, for every family of networks."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from refilled.config import RunConfig
from refilled.errors import UserError
from refilled.execution import refit, run_folder
from refilled.export import FORMATS, TOLERANCE, ExportError, open_file, require_packages, size_of, write
from refilled.model_card import Origin
from refilled.models import _FAMILIES, build_model
from refilled.presets import smoke
from refilled.stages import with_own_code
from refilled.storage import Storage
from refilled.storage.run_folder import RunFolder
from refilled.student import Student
from refilled.student_files import digest_of_files, export_path, metrics_of, read_record, write_student_files
from refilled.tasks.classification import load_task, load_test_images
from refilled.training.compute import Compute

# An example of every family that there is, the smallest first, and a network of the user's.
EXAMPLES = [re.findall(r"\(([^)]+)\)", family.form)[-1] for family in _FAMILIES]
OTHERS = ["own/net.py:Tiny", "torchvision:resnet18", "timm:mobilenetv3_small_050"]
STUDENTS = list(dict.fromkeys(["convnet-8", "wrn-16-1", *EXAMPLES, *OTHERS]))
# Which way it goes depends on the pixels, which no exported program can follow.
BRANCHES = """
from refilled.models.convnet import ConvNet

class Branchy(ConvNet):
    def __init__(self, *, image_size, **shape):
        super().__init__(4, **shape)

    def forward(self, images, dropout_keys=None):
        return super().forward(images if images.sum() > 0 else -images, dropout_keys)
"""


def refitted(name: str, storage: Storage, **changes: object) -> tuple[RunConfig, RunFolder]:
    run = dataclasses.replace(smoke().run, student=name, method="student", epochs=(0, 1), val_fraction=0.0)
    run = with_own_code(dataclasses.replace(run, **changes))  # type: ignore[arg-type]
    refit(run, storage, Compute(torch.device("cpu"), run.precision))
    return run, run_folder(run, storage)


def origin(run: RunConfig, folder: RunFolder, **changes: object) -> Origin:
    value = folder.test_accuracy()
    assert value is not None
    made = Origin(
        run=run,
        run_key=folder.path.name,
        teacher="none",
        teacher_classes=("0", "1"),
        data_digest="d1635",
        val_accuracy=0.875,
        seeds=[run.seed, 7],
        test_accuracy=[value, 0.25],
        search_key="5ea4c4",
        experiment="exports",
        code_version="0.1.0+abc",
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", STUDENTS)
def test_files_agree_with_the_student_on_all_test_images(
    name: str, storage: Storage, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own.parent)
    name = name.replace("own/", f"{own.name}/")
    run, folder = refitted(name, storage)
    classes = load_task(run, storage).spaces.student
    record = write_student_files(folder, origin(run, folder), classes, FORMATS, num_threads=1)
    test, student = load_test_images(run, storage, classes), Student.open(folder.model_path)
    expected = student.logits(test.images)
    tolerance = TOLERANCE * max(1.0, float(expected.abs().max()) / 100)  # after an epoch some say thousands
    for form in FORMATS:
        said, path = record["export"][form], export_path(folder, form)
        assert said["max_logit_difference"] < tolerance
        assert said["test_accuracy"] == folder.test_accuracy()
        run_file = open_file(form, path, 1)
        for images in (test.images, test.images[:1], test.images[:33]):  # any number of images
            assert float((run_file(images) - expected[: len(images)]).abs().max()) < tolerance
        assert said["file_bytes"] == path.stat().st_size > 4 * record["parameters"]
        assert list(said["latency"]) == ["1", "32"]
        for each in said["latency"].values():
            assert 0 < each["p50_ms"] <= each["p95_ms"]
            assert each["num_rounds"] >= 20
    assert record["parameters"] == sum(each.numel() for each in student.model.parameters())


def test_multiply_adds_are_counted_as_by_hand(storage: Storage) -> None:
    model = build_model("convnet-8", num_classes=5, in_channels=1, image_size=8, seed=0)
    normalization = load_task(smoke().run, storage).normalization
    student = Student(
        model,
        classes=tuple("abcde"),
        image_shape=(1, 8, 8),
        normalization=normalization,
        compute=Compute(torch.device("cpu"), "float32"),
    )
    by_hand = 64 * 9 * 1 * 8 + 16 * 9 * 8 * 16 + 16 * 9 * 16 * 32 + 32 * 5
    assert size_of(student) == {"parameters": 72 + 1152 + 4608 + 2 * (8 + 16 + 32) + 165, "multiply_adds": by_hand}


@pytest.mark.parametrize("precision", ["bfloat16", "float64"])
def test_a_program_is_as_precise_as_the_run_and_onnx_is_float32(precision: str, storage: Storage) -> None:
    run, folder = refitted("convnet-8", storage, precision=precision)
    classes = load_task(run, storage).spaces.student
    record = write_student_files(folder, origin(run, folder), classes, FORMATS, num_threads=1)["export"]
    assert (record["torch"]["precision"], record["onnx"]["precision"]) == (precision, "float32")
    assert record["torch"]["max_logit_difference"] == 0
    assert record["torch"]["test_accuracy"] == folder.test_accuracy()
    assert record["onnx"]["max_logit_difference"] < TOLERANCE


def test_the_cards_code_for_the_weights_alone_runs_for_a_users_own_network(
    tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from torch import nn\n\n"
        "def tiny(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, 9), nn.ReLU(), nn.Linear(9, num_classes))\n"
    )
    run, folder = refitted(f"{file}:tiny", storage)
    write_student_files(folder, origin(run, folder), load_task(run, storage).spaces.student, (), num_threads=1)
    card = (folder.path / "README.md").read_text()
    code = card.partition("weights alone")[2].partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(folder.path)
    found: dict[str, Any] = {}
    exec(code, found)
    kept = Student.open(folder.model_path).model.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in found["model"].state_dict().items())


def test_weights_and_card_say_what_the_student_is(storage: Storage) -> None:
    run, folder = refitted("convnet-8", storage, seed=3)
    classes = load_task(run, storage).spaces.student
    write_student_files(folder, origin(run, folder), classes, (), num_threads=1)
    student = Student.open(folder.model_path)
    rebuilt = build_model("convnet-8", num_classes=5, in_channels=1, image_size=8, seed=0)
    rebuilt.load_state_dict(load_file(folder.path / "student.safetensors"))
    for name, tensor in student.model.state_dict().items():
        assert torch.equal(rebuilt.state_dict()[name], tensor)
    with safe_open(folder.path / "student.safetensors", "pt") as file:
        about = {name: json.loads(value) for name, value in file.metadata().items()}
    assert tuple(about["classes"]) == student.classes
    assert (about["architecture"], about["image_shape"]) == ("convnet-8", [1, 8, 8])
    assert about["mean"] == student.normalization.mean.tolist()
    card = (folder.path / "README.md").read_text()
    value = folder.test_accuracy()
    assert value is not None
    half_width = 12.7062 * abs(value - 0.25) / 2  # t(0.975, 1) times half the distance of two values
    for words in (
        f"{100 * value:.2f} % (seed 3)",
        f"{50 * (value + 0.25):.2f} ± {100 * half_width:.2f} %",
        *("`digits`, digest `d1635`", "87.50 %", "6,109 parameters, 96,928 multiply-adds", "refilled 0.1.0+abc"),
        *(folder.path.name, "`5ea4c4` of experiment `exports`", "the method asks no teacher", "refilled.load("),
        "0: 0, 1: 1, 2: 2, 3: 3, 4: 4.",
        "| `optimizer.weight_decay` | `0.0005` |",
    ):
        assert words in card, words


def test_what_is_there_is_left_alone_and_follows_the_weights(storage: Storage) -> None:
    run, folder = refitted("convnet-8", storage, seed=4)
    classes = load_task(run, storage).spaces.student
    first = write_student_files(folder, origin(run, folder), classes, ("torch",), num_threads=1)
    digest, written_ns = digest_of_files(folder), export_path(folder, "torch").stat().st_mtime_ns
    later = origin(run, folder, code_version="0.2.0")  # says nothing of files that are there
    assert write_student_files(folder, later, classes, ("torch",), num_threads=2) == first == read_record(folder)
    assert (digest_of_files(folder), export_path(folder, "torch").stat().st_mtime_ns) == (digest, written_ns)
    both = write_student_files(folder, later, classes, FORMATS, num_threads=2)
    assert both["export"]["torch"] == first["export"]["torch"]
    assert both["export"]["onnx"]["num_threads"] == 2
    assert digest_of_files(folder) != digest
    metrics = metrics_of(both)
    assert metrics["student/parameters"] == 6109
    assert metrics["export/onnx/p95_ms_batch_32"] == both["export"]["onnx"]["latency"]["32"]["p95_ms"]
    assert metrics["export/torch/test_accuracy"] == folder.test_accuracy()
    state = torch.load(folder.model_path, weights_only=True)
    state["weights"]["head.bias"] += 1
    torch.save(state, folder.model_path)
    anew = write_student_files(folder, later, classes, (), num_threads=1)
    assert anew["export"] == {}
    assert anew["code_version"] == "0.2.0"
    assert torch.equal(load_file(folder.path / "student.safetensors")["head.bias"], state["weights"]["head.bias"])
    (folder.path / "student.json").write_text("[]")
    assert read_record(folder) == {}


def test_a_network_that_cannot_be_exported_is_one_sentence(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(BRANCHES)
    run, folder = refitted("net.py:Branchy", storage)
    classes = load_task(run, storage).spaces.student
    record = write_student_files(folder, origin(run, folder), classes, FORMATS, num_threads=1)
    for form in FORMATS:
        assert re.fullmatch(rf"The network cannot be exported to {form} \(.+\)\.", record["export"][form]["error"])
        assert "\n" not in record["export"][form]["error"]
        assert not export_path(folder, form).exists()
    assert (folder.path / "student.safetensors").exists()
    assert not any(name.startswith("export/") for name in metrics_of(record))
    with pytest.raises(ExportError, match="cannot be exported to torch"):
        write("torch", Student.open(folder.model_path), tmp_path / "student.pt2")


def test_what_onnx_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_packages(FORMATS)
    monkeypatch.setattr("refilled.export.find_spec", lambda name: None if name == "onnxscript" else name)
    require_packages(("torch",))
    with pytest.raises(UserError, match=r"export: onnx needs onnxscript; pip install 'refilled\[onnx\]' brings"):
        require_packages(FORMATS)
