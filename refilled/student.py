"""A trained student, ready to be asked: its network, its classes, and what was done to images before it saw them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from refilled.config import Precision
from refilled.data.inputs import Images, batches
from refilled.errors import UserError
from refilled.models import Model
from refilled.storage.files import read_json
from refilled.storage.model_file import load_model
from refilled.storage.tensor_file import load_tensors
from refilled.tasks.normalization import Normalization
from refilled.training.compute import Compute
from refilled.training.evaluation import EVALUATION_BATCH_SIZE


class Prediction(NamedTuple):
    """What a student says of one image."""

    class_name: str
    """The class with the largest score; of equal ones the first."""
    probability: float
    """Its probability by the student's own softmax, in [0, 1]; it is not calibrated."""


class Student:
    """A trained network that is only asked, in the precision in which it was tested.

    Args:
        model: The network, as it was trained.
        classes: A label is the position in it.
        image_shape: (channels, height, width) of the training images.
        normalization: Mean and deviation of the pixels.
        compute: Device and precision.
        batch_size: The most images that are decoded and asked about at a time.

    Attributes:
        classes, image_shape, normalization, compute, batch_size: The same.
    """

    def __init__(
        self,
        model: Model,
        *,
        classes: tuple[str, ...],
        image_shape: tuple[int, int, int],
        normalization: Normalization,
        compute: Compute,
        batch_size: int = EVALUATION_BATCH_SIZE,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}.")
        self._model = compute.place_model(model.requires_grad_(False).eval())
        self.classes = classes
        self.image_shape = image_shape
        self.normalization = normalization
        self.compute = compute
        self.batch_size = batch_size

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        device: str | torch.device = "cpu",
        precision: Precision | None = None,
        batch_size: int = EVALUATION_BATCH_SIZE,
    ) -> Student:
        """The student in a `model.pt`.

        Args:
            path: The file.
            device: Where to compute.
            precision: How precisely; none: as the run that `config.json` beside the file describes, as which the
                student was tested; float32 where there is no such file.
            batch_size: See `Student`.

        Raises:
            UserError: The file or the device cannot be used.
        """
        if precision not in (None, *get_args(Precision)):
            raise UserError(f"precision must be {', '.join(get_args(Precision))} or none, got {precision!r}.")
        model, state = load_model(path), load_tensors(path)
        channels, height, width = state["image_shape"]
        try:
            compute = Compute(device=torch.device(device), precision=precision or _precision_of(path))
            return cls(
                model,
                classes=tuple(state["classes"]),
                image_shape=(channels, height, width),
                normalization=Normalization(mean=state["mean"], std=state["std"]),
                compute=compute,
                batch_size=batch_size,
            )
        except (RuntimeError, AssertionError) as error:  # torch's, of a device that is unknown or not there
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"device must be one that torch can use here, got {str(device)!r} ({reason}).") from error

    @property
    def model(self) -> Model:
        """The network in evaluation mode: normalised float images [N, C, H, W] to a `refilled.models.Output`."""
        return self._model

    def predict(self, images: Images) -> list[Prediction]:
        """The class of every image, in order.

        Args:
            images: A file's path, the content of one (bytes), a Pillow image, or uint8 [H, W], [H, W, C] or [C, H, W];
                several of them; or a uint8 array or tensor [N, C, H, W] or [N, H, W, C]. What has another size than the
                training images is resized as they were (shorter side, bicubic with antialiasing, central square), and
                a photograph is turned as its EXIF orientation says, as in training.

        Raises:
            UserError: Naming the image that cannot be read, or the array whose type or layout does not fit.
        """
        found = []
        for logits in self._logits(images):
            labels = logits.argmax(dim=1)
            chosen = logits.softmax(dim=1).gather(1, labels[:, None])[:, 0]
            found += [Prediction(self.classes[i], p) for i, p in zip(labels.tolist(), chosen.tolist(), strict=True)]
        return found

    def probabilities(self, images: Images) -> Tensor:
        """Softmax of the scores, [N, number of classes] in the order of `classes`, on the CPU; see `predict`."""
        return self.logits(images).softmax(dim=1)

    def logits(self, images: Images) -> Tensor:
        """The scores themselves, [N, number of classes], on the CPU; see `predict`."""
        found = [logits.cpu() for logits in self._logits(images)]
        return torch.cat(found) if found else torch.empty(0, len(self.classes), dtype=self.compute.dtype)

    def logits_of(self, pixels: Tensor) -> Tensor:
        """The scores [N, number of classes] of uint8 [N, C, H, W] of the training images' size: all but decoding."""
        return self.compute.forward(self._model, self.compute.place_images(pixels, self.normalization)).logits

    def _logits(self, images: Images) -> Iterator[Tensor]:
        for pixels in batches(images, self.image_shape, self.batch_size):
            with torch.no_grad():  # not around the yield: the caller would run under it too
                logits = self.logits_of(torch.from_numpy(np.array(pixels, order="C")))  # torch takes no others
            yield logits

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.image_shape))
        return (
            f"Student({len(self.classes)} classes, images {shape}, {self.compute.precision} on {self.compute.device})"
        )


def _precision_of(path: Path) -> Precision:
    """Of the run in whose folder a `model.pt` lies."""
    config = path.with_name("config.json")
    if not config.exists():
        return "float32"
    content = read_json(config)
    try:
        precision = content["config"]["precision"]
    except (KeyError, TypeError):
        precision = None
    if precision not in get_args(Precision):
        raise UserError(f"{config} must name the run's precision, one of {', '.join(get_args(Precision))}.")
    found: Precision = precision
    return found
