"""Networks, teachers and label spaces that do not fit: one sentence, exit code 2, nothing trained or kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import mobilenet_v2, resnet18

from tune import search as search_module

SIDE = 32
CLASSES = ("ant", "bee", "cat", "dog")
CODE = """
import torch
from torch import nn


def body(channels=3):
    return nn.Conv2d(channels, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()


def plain(num_classes):
    return nn.Sequential(*body(), nn.Linear(8, num_classes))


def dropping(num_classes):
    return nn.Sequential(*body(), nn.Dropout(0.5), nn.Linear(8, num_classes))


def two_channels(num_classes):
    return nn.Sequential(*body(2), nn.Linear(8, num_classes))


def failing(num_classes):
    raise RuntimeError("no such network")


def nothing(num_classes):
    return None


def flat(num_classes):
    return nn.Sequential(nn.Conv2d(3, num_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Table(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.net = plain(num_classes)

    def forward(self, images):
        return {"logits": self.net(images)}


class Tokens(Table):
    def forward(self, images):
        return torch.stack([self.net(images)] * 3, 1)


def needs_more(num_classes, vocabulary):
    return plain(num_classes)


NUMBER = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of four classes, weights and lists, right and wrong ones."""
    root = tmp_path_factory.mktemp("wrong")
    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 2)):
        for name in CLASSES:
            (root / "photos" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "photos" / part / name / f"{number}.png")
    torch.manual_seed(0)
    state = resnet18(num_classes=3).state_dict()
    torch.save(state, root / "teacher.pt")
    torch.save({name: each for name, each in state.items() if not name.startswith("fc.")}, root / "headless.pt")
    torch.save(resnet18(num_classes=3), root / "whole.pt")
    torch.save(mobilenet_v2(num_classes=3).state_dict(), root / "other.pt")
    torch.save({name: each for name, each in state.items() if name != "layer1.0.conv1.weight"}, root / "lacking.pt")
    torch.save(state | {"layer5.weight": torch.ones(2)}, root / "more.pt")
    torch.save(state | {"conv1.weight": torch.ones(32, 3, 7, 7)}, root / "narrow.pt")
    torch.save(state | {"fc.weight": torch.full((3, 512), torch.inf)}, root / "infinite.pt")
    torch.save({"epoch": 3, "lr": 0.1}, root / "numbers.pt")
    torch.save([1, 2], root / "list.pt")
    (root / "empty.pt").write_bytes(b"")
    (root / "text.pt").write_text("these are no weights")
    (root / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n")
    save_file(state, root / "whole.safetensors")
    (root / "cut.safetensors").write_bytes((root / "whole.safetensors").read_bytes()[:5000])
    torch.save(mobilenet_v2(num_classes=4).state_dict(), root / "student.pt")
    for name, lines in {
        "three": ("ant", "bee", "fox"),
        "two": ("ant", "bee"),
        "nobody": ("elk", "fox", "gnu"),
        "doubled": ("ant", "ant", "bee"),
        "one": ("ant",),
        "none": (),
        "unknown": ("ant", "elk"),
    }.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    (root / "nets.py").write_text(CODE)
    (root / "broken.py").write_text("def net(:\n")
    (root / "raising.py").write_text("raise OSError('not today')\n")
    return root


OF = "--teachers torchvision:resnet18 --teacher-image-size 32 --teacher-weights"
BRING = f"--method refilled {OF}"
NET = "--method student --students"
WRONG: Mapping[str, tuple[str, tuple[str, ...]]] = {
    # weights
    "no file": (
        f"{BRING} nowhere.pt",
        ("teacher_weights: nowhere.pt must be a weights file, but there is no such file",),
    ),
    "a folder": (f"{BRING} photos", ("teacher_weights: photos must be a weights file, but there is no such file",)),
    "empty": (f"{BRING} empty.pt", ("empty.pt must be a weights file, safetensors or what torch.save",)),
    "text": (f"{BRING} text.pt", ("text.pt must be a weights file, safetensors or what torch.save",)),
    "a pointer": (f"{BRING} pointer.safetensors", ("pointer.safetensors must be a weights file",)),
    "cut off": (f"{BRING} cut.safetensors", ("cut.safetensors must be a weights file",)),
    "a whole model": (f"{BRING} whole.pt", ("whole.pt must be a weights file", "torch.save(model.state_dict(), path)")),
    "numbers": (f"{BRING} numbers.pt", ("numbers.pt must hold named tensors",)),
    "a list": (f"{BRING} list.pt", ("list.pt must hold named tensors",)),
    "other architecture": (f"{BRING} other.pt", ("other.pt must hold the weights of this network, but lacks",)),
    "a key less": (f"{BRING} lacking.pt", ("but lacks 'layer1.0.conv1.weight' and 0 more of",)),
    "a key more": (f"{BRING} more.pt", ("must hold the weights of this network alone, but has 'layer5.weight' too",)),
    "other widths": (f"{BRING} narrow.pt", ("'conv1.weight' is [32, 3, 7, 7], not [64, 3, 7, 7]",)),
    "not finite": (f"{BRING} infinite.pt", ("must hold finite numbers, but 'fc.weight' does not",)),
    "student's file": (
        "--method student --students torchvision:mobilenet_v2 --student-weights teacher.pt",
        ("student_weights: teacher.pt must hold the weights of this network, but lacks",),
    ),
    "two teachers": (
        "--method refilled --teachers torchvision:resnet18 convnet-8 --teacher-weights teacher.pt",
        ("teachers must be one architecture",),
    ),
    "two students": (
        "--method student --student-classes two.txt --student-weights student.pt --students wrn-10-1 wrn-16-1",
        ("students must be one architecture with student_weights",),
    ),
    # what a brought teacher is told
    "names for others": (
        f"{BRING} teacher.pt --teacher-classes two.txt",
        ("of the teacher's 3 scores, one a line, got 2",),
    ),
    "names twice": (
        f"{BRING} teacher.pt --teacher-classes doubled.txt",
        ("must name every class once, but names 'ant'",),
    ),
    "one name": (f"{BRING} teacher.pt --teacher-classes one.txt", ("teacher_classes 'one.txt' must name at least 2",)),
    "no name": (f"{BRING} teacher.pt --teacher-classes none.txt", ("must name at least 2 classes, one a line, got 0",)),
    "names nowhere": (f"{BRING} teacher.pt --teacher-classes nowhere.txt", ("teacher_classes must name a text file",)),
    "binary names": (f"{BRING} teacher.pt --teacher-classes binary.txt", ("teacher_classes must name a text file",)),
    "mean alone": (
        f"{BRING} teacher.pt --teacher-mean 0.5 0.5 0.5",
        ("teacher_std must be given where teacher_mean is",),
    ),
    "two means": (
        f"{BRING} teacher.pt --teacher-mean 0.5 0.5 --teacher-std 0.5 0.5",
        ("teacher_mean must be 1 or 3 numbers, as many as teacher_std",),
    ),
    "negative deviation": (
        f"{BRING} teacher.pt --teacher-mean 0.5 0.5 0.5 --teacher-std 0.5 0 0.5",
        ("teacher_std must be numbers above 0",),
    ),
    "no size": (
        "--teacher-weights teacher.pt --teacher-image-size 0",
        ("teacher_image_size must be at least 4 or none, got 0",),
    ),
    "size without weights": ("--teacher-image-size 64", ("teacher_image_size must be none without teacher_weights",)),
    "mean without weights": (
        "--teacher-mean 0.5 0.5 0.5 --teacher-std 0.5 0.5 0.5",
        ("teacher_mean must be none without teacher_weights",),
    ),
    "a size that is refused": (
        "--method refilled --teachers torchvision:vit_b_32 --teacher-image-size 60 --teacher-weights teacher.pt",
        ("model 'torchvision:vit_b_32' cannot be built for images of 60 pixels",),
    ),
    "scores of no head": (
        f"{BRING} headless.pt --classifier.instance-weight own_head",
        ("teacher_weights must have a last linear layer for methods that ask the teacher for class scores",),
    ),
    "kd without names": (f"{OF} teacher.pt --method kd", ("for method kd", "Eq. 2")),
    "kd of others": (f"{OF} teacher.pt --method kd --teacher-classes three.txt", ("for method kd", "Eq. 2")),
    "embedding nowhere": (
        f"{BRING} teacher.pt --teacher-embedding trunk",
        ("has no module 'trunk' that runs; it has",),
    ),
    "maps nowhere": (
        f"{OF} teacher.pt --methods fitnet --teacher-features layer1 layer9",
        ("has no module 'layer9' that runs",),
    ),
    "an own network's modules": (
        f"{NET} convnet-8 --student-embedding conv1",
        ("has an embedding and maps of its own",),
    ),
    # label spaces
    "overlaps": (
        f"{BRING} teacher.pt --overlaps 0 0.5",
        ("overlaps must not be given where the teacher is brought or classes are given", "got 0, 0.5"),
    ),
    "windows": (
        f"{BRING} teacher.pt --num-student-classes 2",
        ("num_student_classes must be none where the teacher is brought",),
    ),
    "classes unknown": (
        "--student-classes unknown.txt",
        ("student_classes 'unknown.txt' must name classes of the data",),
    ),
    "classes of nobody": (
        "--student-classes nobody.txt",
        ("which has no 'elk' and 2 more of them; it has ant, bee, cat",),
    ),
    "classes twice": ("--student-classes doubled.txt", ("must name every class once, but names 'ant' twice",)),
    "a single class": ("--student-classes one.txt", ("must name at least 2 classes",)),
    "teacher's unknown": (
        "--teacher-classes unknown.txt",
        ("teacher_classes 'unknown.txt' must name classes of the data",),
    ),
    "two teachers' data": (
        f"{BRING} teacher.pt --teacher-data digits",
        ("teacher_data must be none with teacher_weights",),
    ),
    "teacher's data nowhere": ("--teacher-data imagefolder:nowhere", ("imagefolder:nowhere must be a path",)),
    "teacher's data unknown": ("--teacher-data mnist", ("data must be one of digits, cifar100",)),
    "teacher's data grey": (
        "--teacher-data digits --image-size 16",
        ("teacher_data must have images with 3 channels, as many as data has, got 1",),
    ),
    # images a class
    "no images": ("--images-per-class 0", ("images_per_class must be",)),
    "one image": ("--images-per-class 1", ("images_per_class must be",)),
    "half an image": ("--images-per-class 3.5", ("--images-per-class must be a whole number, got 3.5",)),
    "a word": ("--images-per-class many", ("images-per-class",)),
    "the same twice": ("--images-per-class 4 4", ("images_per_class must be different values",)),
    "more than there are": (
        "--images-per-class 7",
        ("images_per_class must be at most 6, as many as class '",),
    ),
    "none to learn from": ("--images-per-class 2 --val-fraction 0.9", ("val_fraction must leave images of class",)),
    # names of networks
    "torchvision's": (f"{NET} torchvision:resnet19", ("torchvision has no model 'resnet19'", "near ones are resnet")),
    "for boxes": (
        f"{NET} torchvision:fasterrcnn_resnet50_fpn",
        ("torchvision has no model 'fasterrcnn_resnet50_fpn'",),
    ),
    "timm's": (f"{NET} timm:vit_teeny", ("timm has no model 'vit_teeny' that classifies images; near ones are",)),
    "two heads": (f"{NET} timm:deit_tiny_distilled_patch16_224", ("must end in a linear layer",)),
    "a comma": (f"{NET} mobilenet-0,5", ("No model is called 'mobilenet-0,5'", "mobilenet-WIDTH")),
    "no width": (f"{NET} mobilenet-0", ("No model is called 'mobilenet-0'",)),
    "half a number": (f"{NET} mobilenet-1.", ("No model is called 'mobilenet-1.'",)),
    "a depth": (f"{NET} wrn-17-1", ("No model is called 'wrn-17-1'",)),
    "nothing behind the colon": (f"{NET} torchvision:", ("students", "torchvision")),
    "no package": (f"{NET} nowhere.nets:small", ("student must name a module that Python can import", "nowhere")),
    "no module": (f"{NET} json.nets:small", ("json.nets",)),
    # the user's own
    "no python file": (f"{NET} nowhere.py:net", ("student must name a Python file that can be read",)),
    "no such function": (f"{NET} nets.py:missing", ("must name something in 'nets.py', which has no 'missing'",)),
    "a syntax error": (f"{NET} broken.py:net", ("must name a Python file that can be run", "SyntaxError")),
    "a file that raises": (f"{NET} raising.py:net", ("must name a Python file that can be run", "not today")),
    "raises": (f"{NET} nets.py:failing", ("raises RuntimeError: no such network",)),
    "returns nothing": (f"{NET} nets.py:nothing", ("must return a torch.nn.Module, got NoneType",)),
    "no function": (f"{NET} nets.py:NUMBER", ("must be callable",)),
    "asks for more": (f"{NET} nets.py:needs_more", ("must be callable with", "vocabulary")),
    "no linear layer": (f"{NET} nets.py:flat", ("must end in a linear layer",)),
    "a dictionary": (f"{NET} nets.py:Table", ("must return a tensor of class scores [B, C] or embeddings [B, D]",)),
    "tokens": (
        f"{NET} nets.py:Tokens",
        ("must return a tensor of class scores [B, C] or embeddings [B, D], got (2, 3,",),
    ),
    "other channels": (f"{NET} nets.py:two_channels", ("must take images of 3 x 32 x 32, but raises",)),
    # several workers
    "dropout": (
        f"{NET} nets.py:dropping --overlaps 0 --workers-per-trial 2",
        ("must be trained on one worker, got 2", "(Dropout)"),
    ),
    "stochastic depth": (
        f"{NET} torchvision:efficientnet_b0 --overlaps 0 --workers-per-trial 2",
        ("must be trained on one worker, got 2", "(StochasticDepth)"),
    ),
    "another batch norm": (
        f"{NET} timm:mobilenetv3_small_050 --overlaps 0 --workers-per-trial 2",
        ("must be trained on one worker, got 2", "other than nn.BatchNorm1d and 2d"),
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_it_is_refused_in_one_sentence_and_nothing_is_kept(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(folder)
    words, parts = WRONG[kind]
    data = [] if "--data" in words else ["--data", "imagefolder:photos", "--val-fraction", "0.34"]
    given = words.split()
    if "--val-fraction" in given:
        data = data[:2]
    storage = tmp_path / "storage"
    code = search_module.command([*data, *given, "--storage", str(storage)])
    output = capsys.readouterr()
    assert code == 2
    assert output.out == ""
    assert output.err.startswith("search: ")
    assert output.err.endswith(".\n")
    assert output.err.count("\n") == 1
    for part in parts:
        assert part in output.err
    left = {path.name for path in storage.iterdir()} if storage.is_dir() else set()
    assert not left & {"runs", "teachers", "mlflow.db", "studies.db", "summary.json", "artifacts", "searches"}
    weights = storage / "cache" / "weights"
    assert "weights" not in kind or not weights.exists()


def test_there_are_many_of_them() -> None:
    assert len(WRONG) >= 60
