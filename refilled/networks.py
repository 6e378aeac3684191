"""A run's networks, as its configuration names them, for the images that they see."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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
    return _size(
        getattr(config, role),
        image_shape(role, task),
        getattr(config, f"{role}_embedding"),
        getattr(config, f"{role}_features"),
        config.sources,
    )


@functools.lru_cache(maxsize=64)
def _size(
    name: str, shape: tuple[int, int, int], embedding: str | None, features: tuple[str, ...] | None, sources: Sources
) -> NetworkSize:
    def build(seed: int) -> Model:
        channels, size, _ = shape
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

    model = build(0)
    if ":" in name:
        _require_state_is_all(name, model, build(1), shape)
    num_parameters = sum(each.numel() for each in model.parameters())
    return NetworkSize(num_parameters, multiply_adds(lambda: model(torch.zeros(1, *shape))), model.embedding_dim)


@torch.no_grad()
def _require_state_is_all(name: str, model: Model, other: Model, shape: tuple[int, int, int]) -> None:
    """Refuse a network that its `state_dict` does not make what it is: kept and loaded, it would be another.

    Args:
        name: Its name.
        model: In evaluation.
        other: The same architecture with other initial weights; it gets those of `model`.
        shape: Of images.

    Raises:
        UserError: With the same weights the two, or one of them twice, say different things of the same images.
    """
    images = torch.linspace(-1, 1, 2 * math.prod(shape)).reshape(2, *shape)
    said = model(images)
    other.load_state_dict(model.state_dict())
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
