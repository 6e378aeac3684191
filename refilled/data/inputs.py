"""Images that somebody asks a trained network about, made into pixels exactly as training images are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from refilled.data.colours import upright_rgb
from refilled.data.decode import MAX_FILE_BYTES, decode_images, resize_images
from refilled.data.text import one_line, shown
from refilled.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

Array: TypeAlias = "Tensor | npt.NDArray[Any]"
OneImage: TypeAlias = "str | Path | bytes | Image.Image | Array"
"""A file's path, the content of one, a Pillow image, or uint8 [H, W], [H, W, C] or [C, H, W]."""
Images: TypeAlias = "OneImage | Iterable[OneImage]"
"""One image, several, or a uint8 array [N, C, H, W] or [N, H, W, C]."""

Pixels = npt.NDArray[np.uint8]
Shape = tuple[int, int, int]
_LUMA = np.array([19595, 38470, 7471], dtype=np.uint32)  # ITU-R 601 in 16 bits, as Pillow rounds it


def batches(images: Images, shape: Shape, batch_size: int) -> Iterator[Pixels]:
    """The pixels of images, uint8 [N, C, H, W] with N at most `batch_size`, in order.

    Files are decoded by the rules of `decode_images`. What has another size is resized by the same rules (shorter side,
    bicubic with antialiasing, then the central square); where `shape` is not square, it is refused. Colour becomes
    grey, and grey colour, where `shape` asks for it.

    Args:
        images: See `Images`.
        shape: (C, H, W) of the images that the network was trained with.
        batch_size: The most images a batch.

    Raises:
        UserError: Naming the first image that cannot be read, or the array whose type or layout does not fit.
    """
    if _is_array(images) and images.ndim == 4:
        whole = _from_array(images, shape)
        for start in range(0, len(whole), batch_size):
            yield _fitted(whole[start : start + batch_size], shape, "images")
        return
    several = [images] if _is_array(images) or isinstance(images, (str, Path, bytes)) or _is_pillow(images) else images
    if not isinstance(several, Iterable):
        raise UserError(
            f"images must be paths, Pillow images or uint8 arrays, alone or as a list, got {_kind(images)}."
        )
    batch: list[Any] = []
    for each in several:
        batch.append(each)
        if len(batch) == batch_size:
            yield _pixels(batch, shape)
            batch = []
    if batch:
        yield _pixels(batch, shape)


def _pixels(images: Sequence[Any], shape: Shape) -> Pixels:
    """Of one batch of single images."""
    out: Pixels = np.empty((len(images), *shape), dtype=np.uint8)
    files = {index: each for index, each in enumerate(images) if isinstance(each, (str, Path, bytes))}
    if files:
        size = shape[1] if shape[1] == shape[2] else None
        encoded = (_encoded(each, index) for index, each in files.items())
        out[list(files)] = _fitted(decode_images(encoded, len(files), size), shape, _name(*next(iter(files.items()))))
    for index, each in enumerate(images):
        if index in files:
            continue
        if _is_pillow(each):
            pixels = _from_pillow(each, index)
        elif _is_array(each) and each.ndim in (2, 3):
            pixels = _from_array(each, shape)
        else:
            raise UserError(
                f"image {index} must be a path, a Pillow image or a uint8 array [H, W], [H, W, C] or [C, H, W], "
                f"got {_kind(each)}."
            )
        out[index] = _fitted(pixels, shape, f"image {index}")[0]
    return out


def _fitted(pixels: Pixels, shape: Shape, name: str) -> Pixels:
    """Pixels [N, C', H', W'] with the channels and size of `shape`."""
    num_channels, height, width = shape
    is_grey = {pixels.shape[1], num_channels} == {1, 3}
    if pixels.shape[1] != num_channels and not is_grey:
        raise UserError(f"{name} must have {num_channels} channels, as the training images had, got {pixels.shape[1]}.")
    if 0 in pixels.shape[2:]:
        raise UserError(f"{name} must have pixels, got {pixels.shape[3]} x {pixels.shape[2]}.")
    if pixels.shape[2:] != (height, width):
        if height != width or num_channels not in (1, 3):
            raise UserError(
                f"{name} must have {width} x {height} pixels, as the training images had, got "
                f"{pixels.shape[3]} x {pixels.shape[2]}."
            )
        pixels = resize_images(pixels, height)  # in colour, as files are
    if is_grey:
        return np.repeat(pixels, 3, axis=1) if num_channels == 3 else _grey(pixels)
    return pixels


def _grey(pixels: Pixels) -> Pixels:
    """Luminance [N, 1, H, W] of RGB [N, 3, H, W]; of grey that was made RGB, the grey."""
    weighted = pixels.astype(np.uint32) * _LUMA[:, None, None]
    grey: Pixels = ((weighted.sum(axis=1, keepdims=True, dtype=np.uint32) + 0x8000) >> 16).astype(np.uint8)
    return grey


def _encoded(image: str | Path | bytes, index: int) -> tuple[str, bytes]:
    """A name for messages and the content of a file."""
    name = _name(index, image)
    if isinstance(image, bytes):
        return name, image
    path = Path(image)
    try:
        if path.exists() and not path.is_file():  # a pipe or device would never end
            raise UserError(f"{name} must be a file with an image.")
        with path.open("rb") as file:
            return name, file.read(MAX_FILE_BYTES + 1)  # one too many is refused where it is decoded
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise UserError(f"{name} must be a file with an image, but cannot be read ({reason}).") from error


def _name(index: int, image: str | Path | bytes) -> str:
    return f"image {index}" if isinstance(image, bytes) else shown(image)


def _from_pillow(image: Image.Image, index: int) -> Pixels:
    """RGB [1, 3, H, W], as a file of the same image decodes."""
    try:
        rgb = np.asarray(upright_rgb(image))
    except (OSError, SyntaxError, ValueError) as error:  # it was opened, and is read only now
        raise UserError(f"image {index} does not decode ({one_line(error)}).") from error
    return rgb.transpose(2, 0, 1)[None]


def _from_array(array: Array, shape: Shape) -> Pixels:
    """An array of one of the documented layouts as [N, C, H, W]; a single [H, W] has one channel."""
    if array.dtype not in (np.uint8, torch.uint8):
        raise UserError(f"images must be uint8, as decoded, neither scaled nor normalised, got {_kind(array)}.")
    pixels: Pixels = array.cpu().numpy() if isinstance(array, Tensor) else array
    if pixels.ndim == 2:
        return pixels[None, None]
    num_channels, height, width = shape
    tail = pixels.shape[-3:]
    is_first, is_last = tail[0] == num_channels, tail[2] == num_channels
    if is_first and is_last:  # only the size can tell, if anything
        is_first, is_last = tail[1:] == (height, width), tail[:2] == (height, width)
    if is_first == is_last:
        unclear = ", which could be either" if tail[0] == tail[2] == num_channels else ""
        raise UserError(
            f"images must be uint8 [N, C, H, W] or [N, H, W, C], or one of them without N, with C = {num_channels}, "
            f"got {_kind(array)}{unclear}."
        )
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    return pixels if is_first else np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _is_array(value: object) -> TypeGuard[Array]:
    return isinstance(value, (Tensor, np.ndarray))


def _is_pillow(value: object) -> bool:
    from PIL import Image

    return isinstance(value, Image.Image)


def _kind(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, (Tensor, np.ndarray)) else type(value).__name__
