"""A user's network is what its state makes it: kept, loaded or brought, it says what it said; else it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from refilled.errors import UserError
from refilled.models import build_model
from refilled.models.weights import fitted_weights, read_weights
from refilled.networks import _require_kept_whole
from refilled.user_code import read_source

FACTORIES = """
import numpy
import torch
from torch import nn

class Base(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(in_channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(8, num_classes)
        self.prepare()
    def prepare(self):
        pass
    def forward(self, images):
        return self.fc(self.change(self.body(images)))
    def change(self, embedding):
        return embedding

class Plain(Base):
    pass

class Buffer(Base):
    def prepare(self):
        self.register_buffer("factor", torch.randn(8))
    def change(self, embedding):
        return embedding * self.factor

class Attribute(Buffer):
    def prepare(self):
        self.factor = torch.randn(8, dtype=torch.float32)

class Unkept(Buffer):
    def prepare(self):
        self.register_buffer("factor", torch.randn(8), persistent=False)

class Numpy(Buffer):
    def prepare(self):
        self.factor = torch.from_numpy(numpy.random.randn(8)).float()

class Counting(Base):
    def prepare(self):
        self.count = 0
    def change(self, embedding):
        self.count += 1
        return embedding * self.count

class Dropping(Base):
    def change(self, embedding):
        return nn.functional.dropout(embedding, 0.5)

class Twice(Base):
    def __init__(self, num_classes, in_channels):
        super().__init__(8, in_channels)
    def forward(self, images):
        return self.fc(self.fc(self.body(images)))

class Reading(Base):
    def change(self, embedding):
        return embedding.to(self.fc.weight.dtype)

class Headless(Base):
    def forward(self, images):
        return self.change(self.body(images))

class HeadlessDropping(Headless):
    def change(self, embedding):
        return nn.functional.dropout(embedding, 0.5)

class MoreInTraining(Base):
    def forward(self, images):
        scores = super().forward(images)
        return (scores, scores) if self.training else scores

class Pair(Base):
    def forward(self, images):
        return super().forward(images), images
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("factories") / "factories.py"
    path.write_text(FACTORIES)
    return path


def look_at(file: Path, factory: str, channels: int = 3) -> None:
    name = f"{file}:{factory}"
    _require_kept_whole(name, (channels, 8, 8), None, None, read_source(name, "student"))


@pytest.mark.parametrize("factory", ["Plain", "Buffer", "Headless"])
def test_what_the_state_makes_whole_is_taken(file: Path, factory: str) -> None:
    look_at(file, factory)


@pytest.mark.parametrize(
    ("factory", "sentence"),
    [
        ("Attribute", "must keep in its state_dict all that it draws"),
        ("Unkept", "must keep in its state_dict all that it draws"),
        ("Numpy", "must keep in its state_dict all that it draws"),
        ("Counting", "return the same for the same images in evaluation"),
        ("Dropping", "return the same for the same images in evaluation"),
        ("HeadlessDropping", "must say the same of the same images in evaluation"),
        ("Twice", "must use its last linear layer once, at its end"),
        ("Reading", "must use its last linear layer once, at its end"),
    ],
)
def test_what_would_be_another_network_later_is_refused(file: Path, factory: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        look_at(file, factory)


def test_a_network_that_returns_more_in_training_is_told(file: Path) -> None:
    name = f"{file}:MoreInTraining"
    model = build_model(name, num_classes=2, in_channels=3, image_size=8, seed=0, sources=read_source(name, "student"))
    model.eval()(torch.zeros(2, 3, 8, 8))
    with pytest.raises(UserError, match="must return one tensor in training as in evaluation, got tuple"):
        model.train()(torch.zeros(2, 3, 8, 8))


def test_for_grey_images_the_sentence_is_of_what_is_wrong(file: Path) -> None:
    with pytest.raises(UserError, match=r"must return a tensor of class scores .*, got tuple\.$"):
        look_at(file, "Pair", channels=1)


STATE = {
    "body.weight": torch.ones(4, 3),
    "bn.running_var": torch.ones(4),
    "bn.num_batches_tracked": torch.tensor(0),
    "fc.weight": torch.ones(2, 4),
    "fc.bias": torch.zeros(2),
}


def with_head(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    found = STATE | {"fc.weight": torch.ones(10, 4), "fc.bias": torch.zeros(10)}
    for name, tensor in changes.items():
        key = name.replace("__", ".")
        if tensor is None:
            del found[key]
        else:
            found[key] = tensor
    return found


def test_a_head_of_any_number_of_scores_or_none(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    assert len(fitted_weights(path, with_head(), STATE, "fc")["fc.weight"]) == 10
    headless = with_head(fc__weight=None, fc__bias=None)
    assert "fc.weight" not in fitted_weights(path, headless, STATE, "fc")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"fc__bias": None}, r"lacks 'fc\.bias'"),
        ({"fc__weight": None}, r"lacks 'fc\.weight'"),
        ({"fc__bias": torch.zeros(1)}, r"'fc\.bias' is \[1\], not \[10\]"),
        ({"fc__weight": torch.ones(10, 1)}, r"'fc\.weight' is \[10, 1\], not \[10, 4\]"),
        ({"fc__weight": torch.ones(10, 8)}, r"'fc\.weight' is \[10, 8\], not \[10, 4\]"),
        ({"fc__scale": torch.ones(10)}, r"has 'fc\.scale' too"),
        ({"body__weight": torch.ones(4, 3, dtype=torch.int8)}, r"'body\.weight' is of torch\.int8"),
        ({"body__weight": torch.ones(4, 3, dtype=torch.bool)}, r"'body\.weight' is of torch\.bool"),
        ({"body__weight": torch.ones(4, 3, dtype=torch.complex64)}, r"'body\.weight' is of torch\.complex64"),
        ({"body__weight": torch.full((4, 3), 1e300, dtype=torch.float64)}, r"finite numbers, but 'body\.weight'"),
        ({"bn__running_var": -torch.ones(4)}, r"variances of at least 0, but 'bn\.running_var'"),
    ],
)
def test_weights_that_a_network_cannot_take_as_they_are(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        fitted_weights(tmp_path / "weights.pt", with_head(**changes), STATE, "fc")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda path: torch.save(torch.nn.Linear(2, 2), path), "it holds other objects than tensors, such as a whole"),
        (lambda path: path.write_bytes(b"hello"), "it is damaged, or no such file"),
        (lambda path: path.write_bytes(b""), "it is damaged, or no such file"),
    ],
)
def test_a_file_that_is_no_weights_says_why_in_words(
    tmp_path: Path, content: Callable[[Path], object], reason: str
) -> None:
    path = tmp_path / "weights.pt"
    content(path)
    with pytest.raises(UserError) as error:
        read_weights(path)
    assert f"cannot be read ({reason}" in str(error.value)
    assert str(error.value).isprintable()  # no colours of a terminal


def test_names_that_a_student_of_this_package_has_too(tmp_path: Path) -> None:
    """A network of `self.network` and `self.head` is itself, and not taken for a student that was kept."""
    own = {"network.weight": torch.ones(4, 3), "head.weight": torch.ones(2, 4), "head.bias": torch.zeros(2)}
    assert fitted_weights(tmp_path / "weights.pt", own, own, "head").keys() == own.keys()
    student = {"network.body.weight": torch.ones(4, 3), "head.weight": torch.ones(5, 4), "head.bias": torch.zeros(5)}
    wanted = {name: STATE[name] for name in ("body.weight", "fc.weight", "fc.bias")}
    assert fitted_weights(tmp_path / "weights.pt", student, wanted, "fc").keys() == wanted.keys()


def test_seeds_draw_and_two_builds_agree(file: Path) -> None:
    """What the check rests on: another seed draws other weights, the same seed the same."""
    name = f"{file}:Plain"
    sources = read_source(name, "student")
    first, same, other = (
        build_model(name, num_classes=2, in_channels=3, image_size=8, seed=seed, sources=sources).head.weight
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
