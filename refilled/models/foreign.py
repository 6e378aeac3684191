"""Networks of other libraries by name, `torchvision:NAME` and `timm:NAME`, and what these say of their input."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from refilled.errors import UserError

LIBRARIES = ("torchvision", "timm")
_AUXILIARY = (
    "googlenet",
    "inception_v3",
)  # of torchvision: they have further heads, which only training on ImageNet asks


@dataclass(frozen=True)
class InputConfig:
    """What a network wants its images to be; none: what they are.

    Attributes:
        size: Height and width in pixels.
        mean: Of each channel, pixels in [0, 1].
        std: Likewise, the standard deviation.
    """

    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def is_foreign(name: str) -> bool:
    """Whether a name is one of another library's."""
    return name.partition(":")[0] in LIBRARIES and ":" in name


def validate_foreign_name(name: str) -> None:
    """Check that the library is there and has such a network.

    Raises:
        UserError: It is not, or has none; the message names near ones.
    """
    library, _, model = name.partition(":")
    known = _timm_names() if library == "timm" else _torchvision_names()
    if model.partition(".")[0] not in known:
        near = ", ".join(difflib.get_close_matches(model, sorted(known), n=3)) or ", ".join(sorted(known)[:3])
        raise UserError(f"{library} has no model {model!r} that classifies images; near ones are {near}.")


def input_config(name: str) -> InputConfig:
    """What a library says that a published network of this name was trained on; of other names nothing."""
    library, _, model = name.partition(":")
    if library == "timm":
        import timm

        found = timm.get_pretrained_cfg(model)
        return InputConfig(found.input_size[-1], tuple(found.mean), tuple(found.std)) if found else InputConfig()
    if library == "torchvision":
        from torchvision import models

        weights = list(models.get_model_weights(model))
        if not weights:
            return InputConfig()
        transforms = models.get_model_weights(model).DEFAULT.transforms()
        return InputConfig(int(transforms.crop_size[0]), tuple(transforms.mean), tuple(transforms.std))
    return InputConfig()


def build_foreign(name: str, *, num_classes: int, image_size: int, dropout: float) -> nn.Module:
    """The network as its library builds it, with three input channels and the library's initial weights.

    Raises:
        UserError: The library refuses the image size, or has no such network.
    """
    validate_foreign_name(name)
    library, _, model = name.partition(":")
    build = _build_timm if library == "timm" else _build_torchvision
    try:
        return build(model, num_classes, image_size, dropout)
    except (ValueError, AssertionError, RuntimeError, TypeError, ZeroDivisionError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"model {name!r} cannot be built for images of {image_size} pixels: {said.rstrip('.')}."
        ) from error


def _build_timm(model: str, num_classes: int, image_size: int, dropout: float) -> nn.Module:
    import timm

    config = timm.get_pretrained_cfg(model)
    # Transformers have a size that is fixed when they are built; others take any, and refuse the argument.
    sized: dict[str, Any] = {"img_size": image_size} if config is not None and config.fixed_input_size else {}
    made: nn.Module = timm.create_model(model, pretrained=False, num_classes=num_classes, drop_rate=dropout, **sized)
    return made


def _build_torchvision(model: str, num_classes: int, image_size: int, dropout: float) -> nn.Module:
    from torchvision import models

    arguments: dict[str, Any] = {"weights": None, "num_classes": num_classes}
    if model.startswith("vit_"):
        arguments["image_size"] = image_size
    if model.startswith("maxvit"):
        arguments["input_size"] = (image_size, image_size)
    if model in _AUXILIARY:
        arguments |= {"aux_logits": False, "init_weights": True}
    return _without_dropout_if_refused(functools.partial(models.get_model, model, **arguments), dropout)


def _without_dropout_if_refused(build: Callable[..., nn.Module], dropout: float) -> nn.Module:
    """Residual networks and others without any dropout do not take a rate."""
    try:
        return build(dropout=dropout)
    except TypeError as error:
        if "'dropout'" not in str(error):
            raise
    return build()


def _torchvision_names() -> list[str]:
    from torchvision import models

    return [str(name) for name in models.list_models(module=models)]


def _timm_names() -> list[str]:
    try:
        import timm
    except ImportError as error:
        raise UserError("timm must be installed for models named timm:NAME: pip install 'refilled[timm]'.") from error
    return [str(name) for name in timm.list_models()]
