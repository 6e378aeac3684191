"""Teachers of eight kinds are brought, each distilled into a small student, with and without an embedding cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from refilled.brought import with_stored_weights
from refilled.config import RunConfig
from refilled.execution import execute, run_folder
from refilled.models import build_model
from refilled.models.adapted import Adapted
from refilled.presets import smoke
from refilled.stages import complete, with_own_code
from refilled.storage import Storage
from refilled.storage.tensor_file import load_tensors
from refilled.tasks.classification import load_task
from refilled.training.compute import Compute

SIDE = 64
CPU = Compute(torch.device("cpu"), "float32")
FACTORY = '''
from torch import nn


def plain(num_classes):
    """What a user has: a network that knows nothing of anybody."""
    layers = nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.BatchNorm2d(32)
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes))


def backbone():
    """One that ends in its embedding."""
    return plain(2)[:-1]
'''
State = dict[str, Tensor]


def halves(state: State) -> State:
    return {name: each.half() if each.is_floating_point() else each for name, each in state.items()}


def prefixed(state: State) -> State:
    return {f"module.backbone.{name}": each for name, each in state.items()}


KINDS: dict[str, tuple[str, Callable[[State], State], str]] = {
    "timm, residual": ("timm:resnet10t", dict, "pt"),
    "timm, transformer": ("timm:vit_tiny_patch16_224", dict, "safetensors"),
    "timm, convnext": ("timm:convnext_atto", dict, "pt"),
    "torchvision": ("torchvision:resnet18", dict, "pt"),
    "a factory": ("nets.py:plain", dict, "pt"),
    "no head": ("nets.py:backbone", dict, "pt"),
    "prefixes": ("torchvision:resnet18", prefixed, "pt"),
    "float16": ("torchvision:mobilenet_v3_small", halves, "safetensors"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of 64 pixels in four classes, and the user's file."""
    root = tmp_path_factory.mktemp("kinds")
    random = np.random.default_rng(0)
    for label in range(4):
        (root / "train" / f"class{label}").mkdir(parents=True)
        for number in range(8):
            pixels = random.integers(0, 90, (SIDE, SIDE, 3))
            pixels[8 * label : 8 * label + 20, 10:40, label % 3] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(root / "train" / f"class{label}" / f"{number}.png")
    (root / "nets.py").write_text(FACTORY)
    return root


def run_with(folder: Path, name: str, weights: Path) -> RunConfig:
    run = dataclasses.replace(
        smoke().run,
        data=f"imagefolder:{folder}",
        teacher=name,
        teacher_weights=str(weights),
        teacher_image_size=SIDE,
        student="mobilenet-0.25",
        epochs=(1, 1),
        global_batch_size=14,
    )
    return complete(with_own_code(run))


def native(name: str, run: RunConfig) -> State:
    """The weights of a network that somebody trained, as its own code names them."""
    shape = {"num_classes": 7, "in_channels": 3, "image_size": SIDE, "seed": 5}
    model = build_model(name, **shape, sources=run.sources)
    assert isinstance(model, Adapted)
    if model.head_name is not None:
        model.network.set_submodule(model.head_name, model.head)
    return dict(model.network.state_dict())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_distilled_alike_with_and_without_a_cache(
    kind: str, dtype: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    name, change, ending = KINDS[kind]
    weights = tmp_path / f"teacher.{ending}"
    run = run_with(folder, name, weights)
    state = change(native(name, run))
    if ending == "pt":
        torch.save(state, weights)
    else:
        save_file({each: tensor.contiguous() for each, tensor in state.items()}, weights)
    found = []
    for mode in ("live", "cached"):
        settings = {"views.num_views": 2, "embedding_cache.mode": mode, "embedding_cache.dtype": dtype}
        storage = Storage.open(tmp_path / mode)
        asked = run.with_overrides(settings)
        asked = with_stored_weights(asked, load_task(asked, storage), storage)
        assert execute(asked, storage, CPU).finished
        done = run_folder(asked, storage)
        rows = [(row.train_loss, row.val_accuracy, row.gradient_norm) for row in done.rows()]
        found.append((rows, load_tensors(done.model_path)["weights"]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(each, found[1][1][each_name]) for each_name, each in found[0][1].items())
