"""A run's networks, as its configuration names them, for the images that they see."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from refilled.config import RunConfig, Sources
from refilled.errors import UserError
from refilled.models import Model, build_model
from refilled.tasks.classification import Task

Role = Literal["teacher", "student"]


def build_network(
    config: RunConfig, role: Role, task: Task, *, num_classes: int, seed: int = 0, dropout: float = 0.0
) -> Model:
    """The architecture of a run's teacher or student with initial weights, on the CPU; see `build_model`."""
    channels, size, _ = image_shape(role, task)
    return build_model(
        getattr(config, role),
        num_classes=num_classes,
        in_channels=channels,
        image_size=size,
        dropout=dropout,
        seed=seed,
        embedding=getattr(config, f"{role}_embedding"),
        features=getattr(config, f"{role}_features"),
        sources=config.sources,
    )


@dataclass(frozen=True)
class NetworkSize:
    """What a network costs and gives.

    Attributes:
        num_parameters: Its parameters, those of a head for two classes included.
        multiply_adds: Of the forward pass of one image.
        embedding_dim: Width of its embedding.
    """

    num_parameters: int
    multiply_adds: int
    embedding_dim: int


def size_of(config: RunConfig, role: Role, task: Task) -> NetworkSize:
    """The size of a run's teacher or student for the images that it sees."""
    return _size(*_architecture(config, role, task))


def require_kept_whole(config: RunConfig, role: Role, task: Task) -> None:
    """Refuse a network that its `state_dict` does not make what it is: kept and loaded, it would be another.

    The package's families are proven to be kept whole, by their contract, and are not tried again.

    Raises:
        UserError: With the same weights it says other things of the same images, made again or even as it is.
    """
    if ":" in getattr(config, role):
        _require_kept_whole(*_architecture(config, role, task))


def _architecture(config: RunConfig, role: Role, task: Task) -> _Architecture:
    of_role = (getattr(config, f"{role}_{name}") for name in ("embedding", "features"))
    return getattr(config, role), image_shape(role, task), *of_role, config.sources


_Architecture = tuple[str, tuple[int, int, int], str | None, tuple[str, ...] | None, Sources]
"""Name, shape of images, embedding, features and sources: what `build_model` makes a network of."""


def _build(architecture: _Architecture, seed: int) -> Model:
    """With two classes, in evaluation."""
    name, (channels, size, _), embedding, features, sources = architecture
    return build_model(
        name,
        num_classes=2,
        in_channels=channels,
        image_size=size,
        seed=seed,
        embedding=embedding,
        features=features,
        sources=sources,
    ).eval()


@functools.lru_cache(maxsize=64)
def _size(*architecture: Any) -> NetworkSize:
    model, shape = _build(architecture, 0), architecture[1]
    num_parameters = sum(each.numel() for each in model.parameters())
    return NetworkSize(num_parameters, multiply_adds(lambda: model(torch.zeros(1, *shape))), model.embedding_dim)


@functools.lru_cache(maxsize=64)
@torch.no_grad()
def _require_kept_whole(*architecture: Any) -> None:
    name, shape = architecture[:2]
    model, other = _build(architecture, 0), _build(architecture, 1)
    other.load_state_dict(model.state_dict())
    images = torch.linspace(-1, 1, 2 * math.prod(shape)).reshape(2, *shape)
    said = model(images)
    for again, why in (
        (model(images), "say the same of the same images in evaluation, but does not"),
        (other(images), "keep in its state_dict all that it draws, but says other things with the same weights"),
    ):
        pairs = [(said.embedding, again.embedding), (said.logits, again.logits)]
        if not all(torch.allclose(one, two, rtol=1e-3, atol=1e-4, equal_nan=True) for one, two in pairs):
            raise UserError(f"model {name!r} must {why}; what is drawn once can be a buffer.")


@torch.no_grad()
def multiply_adds(forward: Callable[[], object]) -> int:
    """Of the convolutions and products of matrices in a forward pass."""
    with FlopCounterMode(display=False) as counter:
        forward()
    return int(counter.get_total_flops()) // 2


def image_shape(role: Role, task: Task) -> tuple[int, int, int]:
    """(channels, height, width) of what the teacher or the student sees."""
    if role == "teacher":
        return task.as_teacher_sees.shape
    channels, height, width = task.train.images.shape[1:]
    return channels, height, width
