"""Models by name: families of the package's own, or a factory in a file of the user's.

A new family is one file with a `FAMILY` and one line in `_FAMILIES`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from refilled.config import Sources
from refilled.errors import UserError
from refilled.keyed import derive_seed
from refilled.methods import is_users
from refilled.models import convnet, wide_resnet
from refilled.models.dropout import KeyedDropout
from refilled.models.output import Family, Model, Output
from refilled.user_code import load_object

__all__ = [
    "KeyedDropout",
    "Model",
    "Output",
    "build_model",
    "initialise",
    "parameters_of_embedding",
    "validate_model_name",
]

_FAMILIES = (wide_resnet.FAMILY, convnet.FAMILY)


def build_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    dropout: float = 0.0,
    seed: int,
    sources: Sources = Sources(),  # noqa: B008  # frozen
) -> Model:
    """Build a model on the CPU with initial weights that depend on nothing but the arguments.

    Every layer's weights come from a generator of its own, seeded by `seed` and the layer's name: the global generator
    is left as it was, and models that differ in their number of classes start from the same embedding.

    Args:
        name: A name of one of the families; or `path/file.py:Name`, a function or class of the user's that is called
            with `num_classes`, `in_channels`, `image_size` and `dropout` and returns a `Model`.
        num_classes: Outputs of the head, at least 1.
        in_channels: Channels of the images, at least 1.
        image_size: Height and width of the images in pixels.
        dropout: Dropout rate in [0, 1).
        seed: Seed of the initial weights.
        sources: Hold the file that the name names, if it is the user's.

    Returns:
        Model in training mode.

    Raises:
        UserError: The name is unknown, the images are too small for it, or a number is out of range.
    """
    for argument, number in (("num_classes", num_classes), ("in_channels", in_channels)):
        if number < 1:
            raise UserError(f"{argument} must be at least 1, not {number}.")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout must be in [0, 1), not {dropout}.")
    shape = {"num_classes": num_classes, "in_channels": in_channels}
    with torch.random.fork_rng(devices=[]):  # torch's layers draw weights when constructed, most of them thrown away
        torch.manual_seed(seed % 2**63)
        if ":" in name:
            model = _users(name, sources, shape | {"image_size": image_size, "dropout": dropout})
        else:
            family, sizes = _find(name)
            if image_size < family.min_image_size:
                least = family.min_image_size
                raise UserError(f"image_size must be at least {least} for model {name}, not {image_size}.")
            model = family.build(*sizes, **shape, dropout=dropout)
    initialise(model, seed)
    return model


def validate_model_name(name: str) -> None:
    """Check that a name has the form of a model's; whether a file of the user's is what it should be, is not looked at.

    Raises:
        UserError: It has not; the message lists the forms of names.
    """
    if not is_users(name):
        _find(name)


def parameters_of_embedding(model: Model) -> list[nn.Parameter]:
    """The parameters of phi: all but the head's."""
    head = {id(parameter) for parameter in model.head.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in head]


def _find(name: str) -> tuple[Family, tuple[int, ...]]:
    for family in _FAMILIES:
        sizes = family.parse(name)
        if sizes is not None:
            return family, sizes
    forms = " or ".join([*(family.form for family in _FAMILIES), "path/file.py:Name"])
    raise UserError(f"No model is called {name!r}; names have the form {forms}.")


def _users(name: str, sources: Sources, arguments: dict[str, Any]) -> Model:
    """What the user's factory returns.

    Raises:
        UserError: It raises an error, or returns no `Model`.
    """
    factory = load_object(name, sources, "model")
    try:
        model = factory(**arguments)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise UserError(
            f"model {name!r} must be callable with {', '.join(arguments)}, but raises {type(error).__name__}: {error}."
        ) from error
    if not isinstance(model, Model):
        raise UserError(f"model {name!r} must return a refilled.models.Model, got {type(model).__name__}.")
    head, wanted = getattr(model, "head", None), (model.embedding_dim, arguments["num_classes"])
    if not isinstance(head, nn.Linear) or (head.in_features, head.out_features) != wanted:
        raise UserError(f"model {name!r} must have a head nn.Linear{wanted}, got {head}.")
    return model


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """He initialisation by fan-out for convolutions, uniform within 1/sqrt(d) for linear layers, and no biases.

    Every layer draws from a generator of its own, seeded by `seed` and the layer's name. Other parameters stay as they
    were constructed.

    Drawn in float64 and rounded: torch draws float32 normals with vector instructions where the processor has them,
    whose last bits differ from those drawn without.
    """
    for name, module in model.named_modules():
        generator = torch.Generator().manual_seed(derive_seed(seed, "initial weights", name))
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            draws = torch.empty(module.weight.shape, dtype=torch.float64)
            module.weight.copy_(draws.normal_(0.0, math.sqrt(2.0 / fan_out), generator=generator))
        elif isinstance(module, nn.Linear):
            bound = 1.0 / math.sqrt(module.in_features)
            draws = torch.empty(module.weight.shape, dtype=torch.float64)
            module.weight.copy_(draws.uniform_(-bound, bound, generator=generator))
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            module.bias.zero_()
