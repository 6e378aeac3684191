"""Models by name: published sizes, initial weights, keyed dropout, precision, learning."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from refilled.errors import UserError
from refilled.keyed import keyed_permutation, keyed_uint64
from refilled.models import KeyedDropout, Model, Output, build_model, parameters_of_embedding, validate_model_name
from refilled.models.output import Family

torch.set_num_threads(1)


def build(name: str, *, num_classes: int = 10, dropout: float = 0.0, seed: int = 0, in_channels: int = 3) -> Model:
    return build_model(
        name, num_classes=num_classes, in_channels=in_channels, image_size=16, dropout=dropout, seed=seed
    )


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def images(count: int = 4, channels: int = 3, size: int = 16) -> torch.Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("name", "num_classes", "count"),
    [  # as published for CIFAR-100 with CRD (arXiv:1910.10699); 28-10 with Wide Residual Networks, where it is 36.5 M
        ("wrn-40-2", 100, 2_255_156),
        ("wrn-16-2", 100, 703_284),
        ("wrn-40-1", 100, 569_780),
        ("wrn-28-10", 10, 36_479_194),
        # 0.18 M in print; for 100 classes the head adds 90 x 65
        ("wrn-16-1", 10, 175_066),
        ("wrn-16-1", 100, 175_066 + 90 * 65),
    ],
)
def test_wide_resnets_have_the_published_sizes(name: str, num_classes: int, count: int) -> None:
    assert num_parameters(build(name, num_classes=num_classes)) == count


@pytest.mark.parametrize(("depth", "width"), [(10, 1), (16, 1), (16, 4), (22, 3), (28, 2), (28, 4), (40, 2)])
def test_every_wide_resnet_embeds(depth: int, width: int) -> None:
    model = build(f"wrn-{depth}-{width}").eval()
    num_convolutions = sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules())
    assert num_convolutions == depth - 3  # Depth counts the head and the two 1x1 shortcuts of group borders.
    with torch.no_grad():
        output = model(images())
    assert isinstance(output, Output)
    assert output.embedding.shape == (4, model.embedding_dim)
    assert model.embedding_dim == 64 * width
    assert output.logits.shape == (4, 10)
    assert [tuple(f.shape) for f in output.features] == [
        (4, 16 * width, 16, 16),
        (4, 32 * width, 8, 8),
        (4, 64 * width, 4, 4),
    ]


@pytest.mark.parametrize("name", ["wrn-10-1", "convnet-8"])
def test_head_on_embedding_gives_logits(name: str) -> None:
    model = build(name, num_classes=7)
    output = model(images())
    assert (model.num_classes, model.head.out_features, model.head.in_features) == (7, 7, model.embedding_dim)
    torch.testing.assert_close(model.head(output.embedding), output.logits)
    own = {id(p) for p in parameters_of_embedding(model)} | {id(p) for p in model.head.parameters()}
    assert own == {id(p) for p in model.parameters()}
    assert not {id(p) for p in parameters_of_embedding(model)} & {id(p) for p in model.head.parameters()}


@pytest.mark.parametrize(
    ("name", "channels"), [("wrn-10-1", (16, 32, 64)), ("wrn-16-2", (32, 64, 128)), ("convnet-8", (8, 16, 32))]
)
@pytest.mark.parametrize("training", [True, False])
def test_features_are_what_the_groups_give_before_an_activation(
    name: str, channels: tuple[int, ...], training: bool
) -> None:
    model = build(name).train(training)
    output = model(images())
    assert model.feature_channels == channels
    assert tuple(features.shape[1] for features in output.features) == channels
    for features in output.features:
        assert 0.2 < (features < 0).float().mean() < 0.8
    last = output.features[-1] if name.startswith("convnet") else model.bn(output.features[-1])
    assert torch.equal(F.relu(last).mean(dim=(2, 3)), output.embedding)


def test_pre_activation_block_by_hand() -> None:
    """The first block of a width-2 network, where the shortcut convolves the activated input."""
    model = build("wrn-10-2").double().eval()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.copy_(torch.rand(module.num_features, generator=generator))
    state = model.state_dict()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, var = state[f"groups.0.0.{name}.running_mean"], state[f"groups.0.0.{name}.running_var"]
        return F.relu((x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt())

    x = F.conv2d(images().double(), state["conv.weight"], padding=1)
    activated = norm(x, "bn1")
    hidden = norm(F.conv2d(activated, state["groups.0.0.conv1.weight"], padding=1), "bn2")
    expected = F.conv2d(hidden, state["groups.0.0.conv2.weight"], padding=1)
    expected = expected + F.conv2d(activated, state["groups.0.0.shortcut.weight"])
    torch.testing.assert_close(model(images().double()).features[0], expected)


def test_initial_weights_have_the_law_they_should() -> None:
    model = build("wrn-16-4")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None, name
            fan_out = module.out_channels * math.prod(module.kernel_size)
            deviation = math.sqrt(2 / fan_out)
            tolerance = 5 / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(deviation, rel=tolerance), name
            assert abs(module.weight.mean().item()) < 5 * deviation / math.sqrt(module.weight.numel()), name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
            assert module.momentum == 0.1
    assert (model.head.bias == 0).all()
    assert 0.9 / 16 < model.head.weight.abs().max() <= 1 / 16  # 1/sqrt(256)


def test_another_seed_gives_other_weights_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    first, other = build("wrn-10-1", seed=5), build("wrn-10-1", seed=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first.conv.weight, other.conv.weight)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "wrn",
        "wrn-40",
        "wrn-41-2",
        "wrn-4-2",
        "wrn-40-0",
        "wrn-040-2",
        "wrn-40-2 ",
        "WRN-40-2",
        "convnet-0",
        "resnet-18",
    ],
)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=re.escape(repr(name)) + r".*wrn-DEPTH-WIDTH.*convnet-WIDTH"):
        validate_model_name(name)
    with pytest.raises(UserError, match="wrn-DEPTH-WIDTH"):
        build(name)


@pytest.mark.parametrize("name", ["wrn-40-2", "wrn-10-1", "wrn-100-12", "convnet-1", "convnet-64"])
def test_known_names_are_accepted(name: str) -> None:
    validate_model_name(name)


def test_a_family_reads_its_sizes_itself() -> None:
    family = Family(
        form="half-WIDTH (half-0.5)",
        pattern=re.compile(r"half-([0-9.]+)"),
        is_valid=lambda width: width <= 1,
        build=Model,
        min_image_size=1,
        parse_sizes=lambda groups: (float(groups[0]),),
    )
    assert family.parse("half-0.5") == (0.5,)
    assert family.parse("half-1.5") is None
    assert family.parse("whole-0.5") is None


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="num_classes"):
        build("wrn-10-1", num_classes=0)
    with pytest.raises(UserError, match="in_channels"):
        build("wrn-10-1", in_channels=0)
    with pytest.raises(UserError, match="dropout"):
        build("wrn-10-1", dropout=1.0)
    with pytest.raises(UserError, match=r"image_size.*wrn-10-1"):
        build_model("wrn-10-1", num_classes=2, in_channels=1, image_size=3, seed=0)


def test_keyed_dropout_is_the_identity_where_nothing_is_dropped() -> None:
    x = images()
    assert KeyedDropout(0.5).eval()(x) is x
    assert KeyedDropout(0.0)(x) is x


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.75])
def test_keyed_dropout_drops_at_the_rate_and_keeps_the_expectation(rate: float) -> None:
    x = torch.ones(64, 16, 8, 8)
    dropped = KeyedDropout(rate)(x, keyed_uint64(0, torch.arange(64)))
    deviation = math.sqrt(rate * (1 - rate) / x.numel())
    assert abs((dropped == 0).float().mean().item() - rate) < 4 * deviation
    assert abs(dropped.mean().item() - 1) < 4 * deviation / (1 - rate)
    kept = dropped[dropped != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)), rtol=1e-4, atol=0)
    per_element = (dropped == 0).float().mean(dim=0)  # no element and no image is treated differently
    assert (per_element - rate).abs().max() < 5.5 * math.sqrt(rate * (1 - rate) / 64)


@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (6, 7)])
def test_masks_belong_to_image_epoch_and_layer(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    ids = torch.tensor([4, 9, 0, 31, 7, 2])
    keys = keyed_uint64(0, 1, ids)
    whole = KeyedDropout(0.5, layer=2)(x, keys)
    shares = [KeyedDropout(0.5, layer=2)(x[part], keys[part]) for part in (slice(0, 4), slice(4, 4), slice(4, 6))]
    assert torch.equal(torch.cat(shares), whole)
    assert torch.equal(KeyedDropout(0.5, layer=2)(x.flip(0), keys.flip(0)), whole.flip(0))
    assert not torch.equal(KeyedDropout(0.5, layer=3)(x, keys), whole)
    assert not torch.equal(KeyedDropout(0.5, layer=2)(x, keyed_uint64(0, 2, ids)), whole)
    assert whole.flatten(1).unique(dim=0).shape[0] == 6


def test_masks_depend_on_neither_memory_format_nor_precision() -> None:
    x, keys = images(6, 5, 3), keyed_uint64(0, torch.arange(6))
    layer = KeyedDropout(0.4)
    expected = layer(x, keys)
    dense = layer(x.to(memory_format=torch.channels_last), keys)
    assert torch.equal(dense, expected)
    assert dense.is_contiguous(memory_format=torch.channels_last)
    assert expected.is_contiguous()
    low = layer(x.bfloat16(), keys)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low == 0, expected == 0)


def test_dropout_without_keys_says_so() -> None:
    model = build("wrn-10-1", dropout=0.3)
    with pytest.raises(ValueError, match=r"dropout_keys.*none were given"):
        model(images())
    with pytest.raises(ValueError, match=r"shape \(4,\), not \(3,\)"):
        model(images(), torch.arange(3))
    model.eval()(images())
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        KeyedDropout(1.0)


@pytest.mark.parametrize(("name", "count"), [("wrn-16-1", 6), ("convnet-8", 1)])
def test_each_layer_drops_by_its_own_mask(name: str, count: int) -> None:
    model = build(name, dropout=0.3)
    layers = [m.layer for m in model.modules() if isinstance(m, KeyedDropout)]
    assert len(set(layers)) == len(layers) == count
    first, other = model(images(), torch.arange(4)), model(images(), torch.arange(4) + 4)
    assert not torch.allclose(first.embedding, other.embedding)


@pytest.mark.parametrize("name", ["wrn-16-2", "convnet-16"])
def test_bfloat16_channels_last_is_close_to_float32(name: str) -> None:
    model = build(name, dropout=0.3)
    keys = torch.arange(32)
    expected = model(images(32), keys)
    fast = build(name, dropout=0.3).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = fast(images(32).to(memory_format=torch.channels_last), keys)
    assert output.features[0].dtype == torch.bfloat16
    assert output.embedding.dtype == output.logits.dtype == torch.float32
    assert (output.embedding - expected.embedding).norm() < 0.02 * expected.embedding.norm()
    assert F.cosine_similarity(output.embedding, expected.embedding).min() > 0.999
    torch.testing.assert_close(output.logits, fast.head(output.embedding))  # the head is not rounded
    output.logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fast.parameters())


def test_convnet_learns_digits() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = keyed_permutation(len(digits.target), 0)
    pixels = (torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1)[order]
    labels = torch.tensor(digits.target)[order]
    model = build_model("convnet-8", num_classes=10, in_channels=1, image_size=8, dropout=0.1, seed=0)
    assert num_parameters(model) < 7000
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for epoch in range(10):
        for batch in keyed_permutation(1400, 1, epoch).split(50):
            loss = F.cross_entropy(model(pixels[batch], keyed_uint64(0, epoch, batch)).logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        accuracy = (model.eval()(pixels[1400:]).logits.argmax(dim=1) == labels[1400:]).float().mean()
    assert accuracy > 0.96
