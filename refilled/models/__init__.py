"""Models by name: families of the package's own, other libraries', or a factory of the user's.

A new family is one file with a `FAMILY` and one line in `_FAMILIES`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from refilled.config import Sources
from refilled.errors import UserError
from refilled.keyed import derive_seed
from refilled.methods import is_of_package, is_users
from refilled.models import convnet, foreign, mobilenet, wide_resnet
from refilled.models.adapted import Adapted, CannotTakeError
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

_FOREIGN_CLASSES = 10
_FAMILIES = (wide_resnet.FAMILY, mobilenet.FAMILY, convnet.FAMILY)


def build_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    dropout: float = 0.0,
    seed: int,
    embedding: str | None = None,
    features: Sequence[str] | None = None,
    sources: Sources = Sources(),  # noqa: B008  # frozen
) -> Model:
    """Build a model on the CPU with initial weights that depend on nothing but the arguments.

    Every layer's weights come from a generator of its own, seeded by `seed` and the layer's name: the global generator
    is left as it was, and models that differ in their number of classes start from the same embedding. A network of
    another library's, or one of the user's that is no `Model`, keeps the initial weights that its own code draws, but
    for the head's.

    Args:
        name: A name of one of the families; `torchvision:NAME` or `timm:NAME`; or `path/file.py:Name` or
            `package.module:name`, a function or class of the user's that is called with those of `num_classes`,
            `in_channels`, `image_size` and `dropout` that it takes, and returns a `Model` or any network with a last
            linear layer.
        num_classes: Outputs of the head, at least 1.
        in_channels: Channels of the images, at least 1.
        image_size: Height and width of the images in pixels.
        dropout: Dropout rate in [0, 1).
        seed: Seed of the initial weights.
        embedding: The module whose output is the embedding, of a network that is no `Model`; none: what goes into the
            last linear layer.
        features: The modules whose outputs are the maps, likewise; none: the last at every resolution.
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
            arguments = shape | {"image_size": image_size, "dropout": dropout}
            model = _foreign_or_users(name, sources, arguments, seed, embedding, features)
        else:
            model = _of_family(name, shape, image_size, dropout)
    if not isinstance(model, Adapted):
        if embedding is not None or features is not None:
            raise UserError(f"model {name} has an embedding and maps of its own; none can be named.")
        initialise(model, seed)
    else:
        initialise(model.head, derive_seed(seed, "head"))
    return model


def _of_family(name: str, shape: dict[str, int], image_size: int, dropout: float) -> Model:
    family, sizes = _find(name)
    if image_size < family.min_image_size:
        least = family.min_image_size
        raise UserError(f"image_size must be at least {least} for model {name}, not {image_size}.")
    sized = {"image_size": image_size} if family.knows_image_size else {}
    return family.build(*sizes, **shape, dropout=dropout, **sized)


def validate_model_name(name: str) -> None:
    """Check that a name has the form of a model's; whether a file of the user's is what it should be, is not looked at.

    Raises:
        UserError: It has not; the message lists the forms of names.
    """
    if foreign.is_foreign(name):
        foreign.validate_foreign_name(name)
    elif not is_users(name) and not is_of_package(name):
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
    forms = [*(family.form for family in _FAMILIES), "torchvision:NAME", "timm:NAME", "path/file.py:Name"]
    raise UserError(f"No model is called {name!r}; names have the form {', '.join(forms)} or package.module:name.")


def _foreign_or_users(
    name: str,
    sources: Sources,
    arguments: dict[str, Any],
    seed: int,
    embedding: str | None,
    features: Sequence[str] | None,
) -> Model:
    """A network that is not of a family, made a `Model` where it is none."""
    if foreign.is_foreign(name):
        # Some libraries draw the embedding's weights after the head's: a head of one size for all, which is replaced.
        built_for, known = _FOREIGN_CLASSES, {each: arguments[each] for each in ("image_size", "dropout")}
        network: nn.Module = _in_float64(lambda: foreign.build_foreign(name, num_classes=built_for, **known))
        # Their first layers have three channels; what they were trained on had, and the user's images may be grey.
        greys = [arguments["in_channels"] == 1]
    else:
        built_for = arguments["num_classes"]
        network = _users(name, sources, arguments)
        if isinstance(network, Model):
            return network
        torch.manual_seed(seed % 2**63)
        network = _in_float64(lambda: _users(name, sources, arguments))
        greys = [False, True] if arguments["in_channels"] == 1 else [False]
    size = arguments["image_size"]
    refused: list[str] = []
    for repeats_grey in greys:
        try:
            return Adapted(
                network,
                name=name,
                num_classes=arguments["num_classes"],
                built_for=built_for,
                image_shape=(arguments["in_channels"], size, size),
                embedding=embedding,
                features=features,
                repeats_grey=repeats_grey,
            ).train()
        except CannotTakeError as error:
            refused.append(str(error).rstrip("."))
    raise UserError(f"{'; and '.join(refused)}.")


def _in_float64(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network whose own code draws its weights, in float64, and round them; see `initialise`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        network = build()
    finally:
        torch.set_default_dtype(before)
    return network.float()


def _users(name: str, sources: Sources, arguments: dict[str, Any]) -> nn.Module:
    """What the user's factory returns.

    Raises:
        UserError: It raises an error, or returns no network.
    """
    factory = load_object(name, sources, "model")
    try:
        model = factory(**_taken(factory, arguments))
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise UserError(
            f"model {name!r} must be callable with {', '.join(arguments)}, or some of them, but raises "
            f"{type(error).__name__}: {error}."
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"model {name!r} must return a torch.nn.Module, got {type(model).__name__}.")
    head = getattr(model, "head", None)
    if isinstance(model, Model):
        wanted = (model.embedding_dim, arguments["num_classes"])
        if not isinstance(head, nn.Linear) or (head.in_features, head.out_features) != wanted:
            raise UserError(f"model {name!r} must have a head nn.Linear{wanted}, got {head}.")
    return model


def _taken(factory: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that a factory takes by name; all where it does not say."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return arguments
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return arguments
    names = {each.name for each in parameters if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)}
    return {name: value for name, value in arguments.items() if name in names}


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
