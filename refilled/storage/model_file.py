"""`model.pt`: a trained network with what is needed to build and use it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from refilled.config import Sources
from refilled.errors import UserError
from refilled.models import Model, build_model
from refilled.storage.tensor_file import load_tensors


def model_state(
    model: Model,
    *,
    architecture: str,
    embedding: str | None,
    features: Sequence[str] | None,
    sources: Sources,
    classes: Sequence[str],
    image_shape: Sequence[int],
    dropout: float,
    mean: Tensor,
    std: Tensor,
) -> dict[str, object]:
    """What the file holds.

    Args:
        model: The network.
        architecture: Its name.
        embedding: The module whose output is its embedding, where the run names one.
        features: The modules whose outputs are its maps, likewise.
        sources: Holds the file that the name names, if it is the user's.
        classes: A label is the position in this list.
        image_shape: (channels, height, width).
        dropout: Its dropout rate in training.
        mean: Float64 [channels], of the pixels in [0, 1].
        std: Float64 [channels], likewise.
    """
    return {
        "architecture": architecture,
        "embedding": embedding,
        "features": None if features is None else list(features),
        "sources": sources.to_dict(),
        "classes": list(classes),
        "image_shape": list(image_shape),
        "dropout": dropout,
        "mean": mean,
        "std": std,
        "weights": {name: tensor.cpu() for name, tensor in model.state_dict().items()},
    }


def load_model(path: Path) -> Model:
    """Build the network that `model_state` described, on the CPU.

    Raises:
        UserError: The file is missing, damaged, or does not hold such a network.
    """
    state = load_tensors(path)
    try:
        channels, height, _ = state["image_shape"]
        model = build_model(
            state["architecture"],
            num_classes=len(state["classes"]),
            in_channels=channels,
            image_size=height,
            dropout=state["dropout"],
            seed=0,
            embedding=state.get("embedding"),  # files of 0.1.0 have neither
            features=state.get("features"),
            sources=Sources.from_dict(state["sources"]),
        )
        model.load_state_dict(state["weights"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} must hold a model that this version wrote, but does not.") from error
    return model
