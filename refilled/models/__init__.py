"""Models by name. A new family is one file with a `FAMILY` and one line in `_FAMILIES`."""

from __future__ import annotations

import math

import torch
from torch import nn

from refilled.errors import UserError
from refilled.keyed import derive_seed
from refilled.models import convnet, wide_resnet
from refilled.models.dropout import KeyedDropout
from refilled.models.output import Family, Model, Output

__all__ = [
    "KeyedDropout",
    "Model",
    "Output",
    "build_model",
    "parameters_of_embedding",
    "validate_model_name",
]

_FAMILIES = (wide_resnet.FAMILY, convnet.FAMILY)


def build_model(
    name: str, *, num_classes: int, in_channels: int, image_size: int, dropout: float = 0.0, seed: int
) -> Model:
    """Build a model on the CPU with initial weights that depend on nothing but the arguments.

    Every layer's weights come from a generator of its own, seeded by `seed` and the layer's name: the global generator
    is left as it was, and models that differ in their number of classes start from the same embedding.

    Args:
        name: A name that `validate_model_name` accepts.
        num_classes: Outputs of the head, at least 1.
        in_channels: Channels of the images, at least 1.
        image_size: Height and width of the images in pixels.
        dropout: Dropout rate in [0, 1).
        seed: Seed of the initial weights.

    Returns:
        Model in training mode.

    Raises:
        UserError: The name is unknown, the images are too small for it, or a number is out of range.
    """
    family, sizes = _find(name)
    for argument, number in (("num_classes", num_classes), ("in_channels", in_channels)):
        if number < 1:
            raise UserError(f"{argument} must be at least 1, not {number}.")
    if image_size < family.min_image_size:
        raise UserError(f"image_size must be at least {family.min_image_size} for model {name}, not {image_size}.")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout must be in [0, 1), not {dropout}.")
    with torch.random.fork_rng(devices=[]):  # torch's layers draw weights when constructed, which are thrown away here
        model = family.build(*sizes, num_classes=num_classes, in_channels=in_channels, dropout=dropout)
    _initialise(model, seed)
    return model


def validate_model_name(name: str) -> None:
    """Check that a model of this name can be built.

    Raises:
        UserError: It cannot; the message lists the forms of names.
    """
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
    forms = " or ".join(family.form for family in _FAMILIES)
    raise UserError(f"No model is called {name!r}; names have the form {forms}.")


@torch.no_grad()
def _initialise(model: Model, seed: int) -> None:
    """He initialisation by fan-out for convolutions, uniform within 1/sqrt(d) and no bias for the head.

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
            module.bias.zero_()
