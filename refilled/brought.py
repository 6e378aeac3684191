"""Weights that the user brings: put into the storage once, by their content, and into networks wherever a run is.

A run names them by content (`refilled.config.weights`), so it is the same run wherever the file lies, and a worker on
another machine needs no copy of the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refilled.config import RunConfig
from refilled.config.weights import digest_in, is_reference, name_in, weights_reference
from refilled.errors import UserError
from refilled.models import Model
from refilled.models.adapted import Adapted
from refilled.models.weights import State, digest_of_weights, fitted_weights, read_weights
from refilled.networks import build_network
from refilled.storage import Kind, Storage
from refilled.tasks.classification import Task

WEIGHTS = Kind("weights")
_FILE = "weights.safetensors"


def with_stored_weights(config: RunConfig, task: Task, storage: Storage) -> RunConfig:
    """The run with its weights files in the storage, named by their content; each is tried in its network.

    Args:
        config: Names files, or content that the storage has already.
        task: The run's images, which say how large its networks' inputs are.
        storage: Where they are put.

    Raises:
        UserError: A file cannot be read, or does not fit its network.
    """
    teacher, student = config.teacher_weights, config.student_weights
    if teacher is not None and not is_reference(teacher):
        network = build_network(config, "teacher", task, num_classes=2)
        config = dataclasses.replace(config, teacher_weights=_store(network, teacher, "teacher_weights", storage))
    if student is not None and not is_reference(student):
        network = build_network(config, "student", task, num_classes=2)
        config = dataclasses.replace(config, student_weights=_store(network, student, "student_weights", storage))
    return config


def brought_teacher(config: RunConfig, task: Task, storage: Storage) -> Model:
    """The teacher that a run brings, with its weights, on the CPU.

    Raises:
        UserError: The storage does not have its weights any more, or its class names are not as many as its scores.
    """
    assert config.teacher_weights is not None
    state = _stored(config.teacher_weights, "teacher_weights", storage)
    trial = build_network(config, "teacher", task, num_classes=2)
    scores = state.get(f"{_head_of(trial)}.weight")
    names = task.spaces.teacher
    if scores is not None and _ends_in_scores(trial) and names and len(names) != len(scores):
        raise UserError(
            f"teacher_classes must name the classes of the teacher's {len(scores)} scores, one a line, got "
            f"{len(names)}."
        )
    model = trial if scores is None else build_network(config, "teacher", task, num_classes=len(scores))
    _load(model, state)
    model.has_scores = scores is not None and _ends_in_scores(trial)
    return model


def start_from_weights(student: Model, config: RunConfig, storage: Storage) -> None:
    """Give a new student the weights that its run starts from; its head stays as it is."""
    assert config.student_weights is not None
    state = _stored(config.student_weights, "student_weights", storage)
    head = f"{_head_of(student)}."
    _load(student, {name: each for name, each in state.items() if not name.startswith(head)})


def _ends_in_scores(model: Model) -> bool:
    """Whether what the network ends in are scores of its embedding."""
    return model.had_head if isinstance(model, Adapted) else True


def describe_teacher(config: RunConfig, task: Task) -> str:
    """What is taken for granted of a teacher that is brought, for people."""
    assert config.teacher_weights is not None
    seen = task.as_teacher_sees
    normalization, (channels, height, width) = seen.normalization, seen.shape
    mean, std = (", ".join(f"{each:.3f}" for each in part.tolist()) for part in (normalization.mean, normalization.std))
    return (
        f"Teacher {config.teacher} with {name_in(config.teacher_weights)} sees {channels} x {height} x {width}, "
        f"normalised by mean {mean} and deviation {std}."
    )


def _head_of(model: Model) -> str:
    """Name of the last linear layer in the network's own state; a network without one has an empty name there."""
    return (model.head_name or "") if isinstance(model, Adapted) else "head"


def _native_state(model: Model) -> dict[str, Tensor]:
    """The network's `state_dict` as its own code has it, the head under its own name."""
    if not isinstance(model, Adapted):
        return model.state_dict()
    state = dict(model.network.state_dict())
    if model.head_name is not None:
        state |= {f"{model.head_name}.{name}": each for name, each in model.head.state_dict().items()}
    return state


def _load(model: Model, state: State) -> None:
    """Put weights under their own names into a network; counters of batch normalisation that are missing stay."""
    if not isinstance(model, Adapted):
        model.load_state_dict(state, strict=False)
        return
    head = f"{model.head_name}." if model.head_name is not None else None
    rest = {name: each for name, each in state.items() if head is None or not name.startswith(head)}
    model.network.load_state_dict(rest, strict=False)
    if head is not None and model.had_head:
        own = {name.removeprefix(head): each for name, each in state.items() if name.startswith(head)}
        with torch.no_grad():
            for name, each in own.items():
                model.head.get_parameter(name).copy_(each)


def _store(model: Model, file: str, field_name: str, storage: Storage) -> str:
    """Put a file's weights, under the names of the network that is to have them, into the storage."""
    path = Path(file).expanduser()
    try:
        state = fitted_weights(path, read_weights(path), _native_state(model), _head_of(model) or None)
    except UserError as error:
        raise UserError(f"{field_name}: {error}") from error
    digest = digest_of_weights(state)

    def build(folder: Path | None) -> Mapping[str, Any]:
        from safetensors.torch import save_file

        if folder is not None:
            save_file({name: each.contiguous().clone() for name, each in state.items()}, folder / _FILE)
        return {"file": path.name, "num_tensors": len(state)}

    artifact = storage.artifacts.make(WEIGHTS, digest, build)
    assert artifact is not None, "it waits for whoever is making it"
    return weights_reference(path.name, digest)


def _stored(reference: str, field_name: str, storage: Storage) -> State:
    from safetensors.torch import load_file

    artifact = storage.artifacts.open(WEIGHTS, digest_in(reference))
    if artifact is None:
        raise UserError(
            f"{field_name} {name_in(reference)!r} is no longer in {storage.location}: start the command with the file "
            "again, which puts it there."
        )
    return load_file(artifact.path / _FILE)
