"""Networks of other libraries and of the user's as models: embedding, head, maps, and what several workers refuse."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from refilled.config import Sources
from refilled.errors import UserError
from refilled.models import Model, build_model
from refilled.models.adapted import Adapted, as_map, is_channels_last
from refilled.models.exact import require_exact, why_not_exact
from refilled.models.foreign import InputConfig, build_foreign, input_config
from refilled.testing import ModelContract
from refilled.user_code import forget_modules, read_source

torch.set_num_threads(1)


def build(name: str, **changes: object) -> Model:
    shape = {"num_classes": 5, "in_channels": 3, "image_size": 64, "seed": 1}
    return build_model(name, **{**shape, **changes})  # type: ignore[arg-type]


class TestMobileNet(ModelContract):
    model = "mobilenet-0.25"
    image_sizes = (16, 20)


class TestTorchvision(ModelContract):
    """Behind the last activation, as the library's modules return them, maps have no negative entries."""

    model = "torchvision:resnet18"
    image_sizes = (32, 40)
    test_features_are_taken_before_the_last_activation = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("width", "parameters"), [("1", 3_309_476), ("0.75", 1_893_460), ("0.5", 869_892), ("0.25", 238_772)]
)
def test_mobilenets_have_the_published_sizes(width: str, parameters: int) -> None:
    """As `njulus/GKD` and others build them, for 100 classes; the stem's stride changes none."""
    for name in (f"mobilenet-{width}", f"mobilenet-{width}-stem2"):
        model = build(name, num_classes=100)
        assert sum(each.numel() for each in model.parameters()) == parameters
        assert model.embedding_dim == int(1024 * float(width))


def test_the_stem_of_a_mobilenet_follows_from_the_images_or_the_name() -> None:
    sides = {
        (name, size): build(name, image_size=size).eval()(torch.zeros(1, 3, size, size)).features[-1].shape[-1]
        for name in ("mobilenet-0.25", "mobilenet-0.25-stem1", "mobilenet-0.25-stem2")
        for size in (64, 96)
    }
    assert [sides[name, 64] for name in ("mobilenet-0.25", "mobilenet-0.25-stem1", "mobilenet-0.25-stem2")] == [4, 4, 2]
    assert [sides[name, 96] for name in ("mobilenet-0.25", "mobilenet-0.25-stem1", "mobilenet-0.25-stem2")] == [3, 6, 3]


@pytest.mark.parametrize(
    ("name", "dim", "maps"),
    [
        ("torchvision:resnet18", 512, [(64, 16), (128, 8), (256, 4), (512, 2)]),
        ("torchvision:mobilenet_v3_small", 1024, [(16, 16), (24, 8), (48, 4), (576, 2)]),
        ("torchvision:vit_b_32", 768, [(768, 2)]),
        ("torchvision:swin_t", 768, [(96, 16), (192, 8), (384, 4), (768, 2)]),
        ("timm:resnet10t", 512, [(64, 16), (128, 8), (256, 4), (512, 2)]),
        ("timm:vit_tiny_patch16_224", 192, [(192, 4)]),
        ("timm:mobilenetv3_small_050", 1024, [(8, 16), (16, 8), (24, 4), (288, 2)]),
    ],
)
def test_the_embedding_is_what_goes_into_the_last_linear_layer(
    name: str, dim: int, maps: list[tuple[int, int]]
) -> None:
    model = build(name).eval()
    images = torch.randn(2, 3, 64, 64)
    output = model(images)
    assert output.embedding.shape == (2, dim)
    assert [(each.shape[1], each.shape[2]) for each in output.features] == maps
    assert isinstance(model, Adapted)
    whole = copy.deepcopy(model.network)
    assert model.head_name is not None
    whole.set_submodule(model.head_name, model.head)
    assert torch.allclose(whole(images), output.logits, atol=1e-5)


def test_timm_calls_the_same_its_embedding() -> None:
    model = build("timm:mobilenetv3_small_050").eval()
    assert isinstance(model, Adapted)
    images = torch.randn(2, 3, 64, 64)
    own = model.network
    expected = own.forward_head(own.forward_features(images), pre_logits=True)  # type: ignore[operator]
    assert torch.allclose(model(images).embedding, expected, atol=1e-6)


def test_initial_weights_are_the_librarys_and_the_same_for_a_seed() -> None:
    first, again, other = (build("torchvision:resnet18", seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["network.conv1.weight"], other["network.conv1.weight"])
    scale = first["network.conv1.weight"].std().item()
    assert scale == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)  # as torchvision draws it
    few, many = (build("torchvision:resnet18", num_classes=number).state_dict() for number in (2, 9))
    assert torch.equal(few["network.layer4.1.conv2.weight"], many["network.layer4.1.conv2.weight"])


def test_grey_images_become_three_equal_channels() -> None:
    model = build("torchvision:resnet18", in_channels=1).eval()
    grey = torch.randn(2, 1, 64, 64)
    colour = build("torchvision:resnet18").eval()
    assert torch.equal(model(grey).embedding, colour(grey.expand(-1, 3, -1, -1)).embedding)


def test_modules_can_be_named() -> None:
    model = build("torchvision:resnet18", embedding="layer3", features=["layer1", "layer3"]).eval()
    output = model(torch.randn(2, 3, 64, 64))
    assert torch.equal(output.embedding, output.features[1].mean(dim=(2, 3)))
    assert model.feature_channels == (64, 256)
    assert output.logits.shape == (2, 5)


TEXT = """
import torch
from torch import nn


class Plain(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.last = nn.Linear(8, num_classes, bias=False)

    def forward(self, images):
        return self.last(self.body(images).flatten(1))


def fixed():
    return Plain(1000)


def headless():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def convolutional(num_classes):
    return nn.Sequential(nn.Conv2d(3, num_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def dropping(num_classes):
    body = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*body, nn.Dropout(0.5), nn.Linear(8, num_classes))


class Normalising(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, num_classes)

    def forward(self, images):
        pooled = self.conv(images).mean((2, 3))
        if self.training:
            pooled = pooled - pooled.mean(0)
        return self.last(pooled)


class Two(Plain):
    def forward(self, images):
        return {"logits": super().forward(images)}
"""


def users(name: str, **changes: object) -> Model:
    return build(f"nets.py:{name}", sources=Sources((("nets.py", TEXT),)), **changes)


def test_a_users_network_needs_nothing_of_this_package() -> None:
    model = users("Plain").eval()
    images = torch.randn(2, 3, 64, 64)
    output = model(images)
    assert (model.embedding_dim, output.logits.shape) == (8, (2, 5))
    assert torch.equal(model.head.bias, torch.zeros(5))
    assert torch.allclose(output.embedding @ model.head.weight.T, output.logits, atol=1e-6)


@pytest.mark.parametrize(("name", "had_head"), [("fixed", True), ("headless", False)])
def test_a_head_of_another_size_or_none_becomes_one_of_the_students_classes(name: str, had_head: bool) -> None:
    model = users(name)
    assert isinstance(model, Adapted)
    assert (model.had_head, model.embedding_dim, model.head.out_features) == (had_head, 8, 5)


@pytest.mark.parametrize(
    ("build_it", "sentence"),
    [
        (lambda: users("convolutional"), "must end in a linear layer"),
        (lambda: users("Two"), "must return a tensor of class scores"),
        (lambda: users("Plain", embedding="nowhere"), "has no module 'nowhere' that runs; it has body.0, body.1"),
        (lambda: users("Plain", in_channels=2), "must take images of 2 x 64 x 64, but raises"),
        (
            lambda: build("torchvision:resnet"),
            "torchvision has no model 'resnet' that classifies images; near ones are",
        ),
        (lambda: build("torchvision:vit_b_32", image_size=60), "cannot be built for images of 60 pixels"),
        (lambda: build("timm:deit_tiny_distilled_patch16_224"), "must end in a linear layer"),
        (lambda: build("wrn-10-1", embedding="conv"), "has an embedding and maps of its own"),
        (lambda: build("no.such.package:net"), "raises ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_a_model_is_refused(build_it: Callable[[], Model], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build_it()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("dropping", r"draws at random \(Dropout\)"),
        ("Normalising", "makes an image's output depend on the others"),
        ("Plain", None),
    ],
)
def test_what_several_workers_would_change_is_seen(name: str, why: str | None) -> None:
    model = users(name)
    before = {key: each.clone() for key, each in model.state_dict().items()}
    shape = (3, 64, 64)
    if why is None:
        assert why_not_exact(model, shape) is None
        require_exact(model, f"nets.py:{name}", shape, 2)
    else:
        with pytest.raises(UserError, match=f"must be trained on one worker, got 2: it {why}"):
            require_exact(model, f"nets.py:{name}", shape, 2)
    assert all(torch.equal(each, before[key]) for key, each in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("torchvision:efficientnet_b0", "StochasticDepth"),
        ("timm:efficientnet_lite0", "other than nn.BatchNorm1d"),
        ("torchvision:mobilenet_v2", None),
        ("wrn-10-1", None),
    ],
)
def test_of_other_libraries_too(name: str, why: str | None) -> None:
    found = why_not_exact(build(name, image_size=32), (3, 32, 32))
    assert found is None if why is None else (found is not None and why in found)


def test_channels_last_maps_and_tokens_become_maps() -> None:
    rows = torch.arange(2 * 4 * 4 * 7.0).reshape(2, 4, 4, 7)
    assert is_channels_last(rows)
    assert not is_channels_last(rows.movedim(3, 1))
    assert torch.equal(as_map(rows, True), rows.permute(0, 3, 1, 2))
    tokens: Tensor = torch.cat([torch.zeros(2, 1, 7), rows.flatten(1, 2)], dim=1)
    assert torch.equal(as_map(tokens, False), rows.permute(0, 3, 1, 2))


def test_maps_of_images_that_are_not_square_stay_as_they_are() -> None:
    """Eight channels and eight rows are not told from channels that come last by their numbers."""
    model = users("Plain", features=["body.0"]).eval()
    (maps,) = model(torch.randn(2, 3, 17, 33)).features
    assert maps.shape == (2, 8, 8, 16)


def test_what_libraries_say_of_their_input() -> None:
    timm = input_config("timm:vit_tiny_patch16_224")
    torchvision = input_config("torchvision:inception_v3")
    assert (timm.size, timm.mean) == (224, (0.5, 0.5, 0.5))
    assert (torchvision.size, torchvision.mean) == (299, (0.485, 0.456, 0.406))
    assert input_config("wrn-10-1") == InputConfig()


def test_a_dropout_rate_reaches_networks_that_take_one() -> None:
    network = build_foreign("torchvision:mobilenet_v2", num_classes=3, image_size=32, dropout=0.3)
    assert [each.p for each in network.modules() if isinstance(each, nn.Dropout)] == [0.3]


def test_a_package_that_the_process_has_imported_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook, whose own objects are of the classes that it has."""
    (tmp_path / "ownnets.py").write_text(
        "from torch import nn\n\n\ndef small(num_classes):\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = importlib.import_module("ownnets")
    try:
        sources = read_source("ownnets:small", "student")
        assert build("ownnets:small", sources=sources).embedding_dim == 3
        assert sys.modules["ownnets"] is own
    finally:
        forget_modules()
        sys.modules.pop("ownnets", None)


def test_a_package_travels_as_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "mynets"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "blocks.py").write_text("WIDTH = 8\n")
    (package / "nets.py").write_text(
        "from torch import nn\nfrom mynets.blocks import WIDTH\n\n\ndef small(num_classes):\n"
        "    body = nn.Conv2d(3, WIDTH, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()\n"
        "    return nn.Sequential(*body, nn.Linear(WIDTH, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    sources = read_source("mynets.nets:small", "student")
    assert [path for path, _ in sources.files] == [
        f"package:mynets/{name}.py" for name in ("__init__", "blocks", "nets")
    ]
    monkeypatch.chdir("/")  # as a worker elsewhere, which has no file
    try:
        assert build("mynets.nets:small", sources=sources).embedding_dim == 8
        wider = Sources(tuple((path, text.replace("= 8", "= 16")) for path, text in sources.files))
        assert build("mynets.nets:small", sources=wider).embedding_dim == 16
        assert build("mynets.nets:small", sources=sources).embedding_dim == 8
    finally:
        forget_modules()
    with pytest.raises(UserError, match="ModuleNotFoundError"):
        build("mynets.nets:small")
