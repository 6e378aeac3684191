"""A student as an MLflow model: MLflow copies this file into the model, and it runs there without this package.

So it imports what the model's requirements name and nothing of ours, and says again what `refilled.data.decode` and
`refilled.data.inputs` say; a test holds the two to the same pixels and scores. Normalisation is part of the network's
program.

Input: a column `image` of paths or of encoded images (bytes), of a frame whose index has a 0, since MLflow looks there;
or a uint8 array [N, C, H, W] of the size of the training images. Output: a row an image with `class_name`, its
`probability`, and `probabilities`, of all classes in their order.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow.models
import mlflow.pyfunc
import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MAX_PIXELS = 64 * 2**20
_BATCH_SIZE = 500


class ServedStudent(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # MLflow has no types
    """Decodes images as in training and asks the network."""

    def load_context(self, context: Any) -> None:
        """Read the program and what is known of its images and classes."""
        about = json.loads(Path(context.artifacts["about"]).read_text(encoding="utf-8"))
        self._classes: list[str] = about["classes"]
        self._shape: tuple[int, int, int] = tuple(about["image_shape"])
        self._program = torch.export.load(context.artifacts["program"]).module()

    def predict(self, context: Any, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """The class of every image, in order.

        Raises:
            ValueError: Naming the image that cannot be read, or the array that does not fit.
        """
        # By the signature MLflow gives {"image": array}; of hints that say so it warns, of this one it does not.
        images = np.asarray(model_input["image"] if isinstance(model_input, (dict, pd.DataFrame)) else model_input)
        names: list[str] = []
        rows: list[list[float]] = []
        for start in range(0, len(images), _BATCH_SIZE):
            pixels = self._pixels(images[start : start + _BATCH_SIZE], start)
            with torch.no_grad():
                logits = self._program(torch.from_numpy(pixels))
            names += [self._classes[label] for label in logits.argmax(dim=1).tolist()]
            rows += logits.double().softmax(dim=1).tolist()
        return pd.DataFrame(
            {
                "class_name": pd.Series(names, dtype=object),
                "probability": pd.Series([max(row) for row in rows], dtype=float),
                "probabilities": pd.Series(rows, dtype=object),
            }
        )

    def _pixels(self, images: np.ndarray[Any, Any], first: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Uint8 [N, C, H, W] of an array of images, or of N paths or encoded images."""
        if images.ndim == 1:
            return np.stack([self._decoded(each, first + index) for index, each in enumerate(images)])
        levels = images.astype(np.uint8)
        if levels.shape[1:] != self._shape or not (levels == images).all():
            channels, height, width = self._shape
            raise ValueError(
                f"an array must be uint8 [N, {channels}, {height}, {width}], got {images.dtype} {list(images.shape)}"
            )
        return levels

    def _decoded(self, image: str | bytes, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Uint8 [C, H, W] of a path or an encoded image."""
        channels, height, width = self._shape
        if not isinstance(image, (str, bytes)):
            raise ValueError(f"image {index} must be a path or an encoded image, got {type(image).__name__}")
        name = f"image {index}" if isinstance(image, bytes) else image
        content = image if isinstance(image, bytes) else Path(image).read_bytes()
        try:
            with Image.open(io.BytesIO(content), formats=_FORMATS) as opened:
                if opened.width * opened.height > _MAX_PIXELS:
                    raise ValueError(f"{opened.width} x {opened.height} pixels, too many")
                square = _upright_rgb(opened)
        except Exception as error:  # Pillow's plug-ins raise whatever their parser trips over
            raise ValueError(f"{name} does not decode as an image ({error})") from error
        if height == width:
            square = _central_square(square, height)
        if square.size != (width, height):
            raise ValueError(f"{name} must have {width} x {height} pixels, got {square.width} x {square.height}")
        if channels == 1:
            return np.asarray(square.convert("L"))[None]
        return np.asarray(square).transpose(2, 0, 1)


def _upright_rgb(image: Image.Image) -> Image.Image:
    """As `refilled.data.colours.upright_rgb`."""
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I"):
        levels = np.asarray(turned).astype(np.int64)
        if levels.min() < 0 or levels.max() > 0xFFFF:
            raise ValueError("integers beyond 16 bits")
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if turned.mode == "F":
        raise ValueError("floating-point pixels")
    if turned.has_transparency_data:
        seen = turned.convert("RGBA")
        white = Image.new("RGBA", seen.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, seen).convert("RGB")
    return turned.convert("RGB")


def _central_square(image: Image.Image, size: int) -> Image.Image:
    """The shorter side resized, bicubic with antialiasing, then the central square."""
    short = min(image.size)
    if short != size:
        width, height = (max(size, round(side * size / short)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


mlflow.models.set_model(ServedStudent())
