"""A run's networks, as its configuration names them, for the images that they see."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from refilled.config import RunConfig, Sources
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
    model = build_model(
        name,
        num_classes=2,
        in_channels=shape[0],
        image_size=shape[1],
        seed=0,
        embedding=embedding,
        features=features,
        sources=sources,
    ).eval()
    num_parameters = sum(each.numel() for each in model.parameters())
    return NetworkSize(num_parameters, multiply_adds(lambda: model(torch.zeros(1, *shape))), model.embedding_dim)


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
