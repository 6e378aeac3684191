"""Encoded images to pixels, in a bounded pool of threads.

Threads pay off for photographs. Images of 32 x 32 pixels gain nothing: at 0.1 ms each the interpreter lock dominates.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import shutil
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from refilled.data.colours import upright_rgb
from refilled.data.pixels import free_bytes
from refilled.data.text import one_line
from refilled.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

# Larger than any photograph worth resizing to a training size; a file of some kilobytes can claim far more.
MAX_PIXELS = 64 * 2**20
MAX_FILE_BYTES = 4 * MAX_PIXELS + 2**20  # of one encoded image: the most pixels uncompressed, and a header
# What data sets are made of. Pillow knows more formats, one of which (EPS) starts another program to decode.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_CHUNK = 64  # images a task: small ones decode in 0.1 ms, which handing over a task would double

Pixels = npt.NDArray[np.uint8]


def decode_images(
    encoded: Iterable[tuple[str, bytes]], count: int, image_size: int | None, file: Path | None = None
) -> Pixels:
    """Decode images to RGB, as stored or resized (shorter side, bicubic with antialiasing, then the central square).

    Images are made upright RGB by `refilled.data.colours`: EXIF orientation, transparency on white, 16 bits to 8. The
    checksums of a PNG are compared. Other formats have none: damage that still decodes gives other pixels, and so
    another digest.

    Args:
        encoded: The images in order; each a name for messages and the content of the file.
        count: Number of images, at least 1.
        image_size: Side of the result; none: every image must have the size of the first.
        file: Where the pixels are put, as NumPy's `.npy`, if they would take more than half of what memory is free;
            none: they are refused then.

    Returns:
        Uint8 [count, 3, H, W], in memory or mapped from the file.

    Raises:
        UserError: Naming the first image that does not decode, is too large, or has another size than the first.
    """
    from PIL import Image

    Image.init()  # loads all plug-ins now, not in several threads at once
    num_threads = os.cpu_count() or 1
    numbered = zip(range(count), encoded, strict=True)
    with _quiet_pillow():
        _, (first_name, first_content) = next(numbered)
        first = _decode(first_name, first_content, image_size)
        out = _allocate(count, first.shape, first_name, file)
        out[0] = first
        pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        pending: deque[Future[None]] = deque()
        try:
            while chunk := list(itertools.islice(numbered, _CHUNK)):
                pending.append(pool.submit(_decode_chunk, chunk, image_size, out, first_name))
                if len(pending) > 4 * num_threads:  # bounds the encoded images in memory
                    pending.popleft().result()
            while pending:  # in order, so that the error raised is that of the first wrong image
                pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
    return out


def resize_images(images: Pixels, image_size: int | None) -> Pixels:
    """Resize decoded images [N, C, H, W], C 1 or 3, by the same rule as `decode_images`; none: as they are."""
    from PIL import Image

    if image_size is None or images.shape[2:] == (image_size, image_size):
        return images
    num_channels = images.shape[1]
    out: Pixels = np.empty((len(images), num_channels, image_size, image_size), dtype=np.uint8)
    for index, pixels in enumerate(images):
        image = Image.fromarray(pixels[0] if num_channels == 1 else np.moveaxis(pixels, 0, 2).copy())
        out[index] = _channels_first(_central_square(image, image_size))
    return out


def _decode_chunk(
    chunk: list[tuple[int, tuple[str, bytes]]], image_size: int | None, out: Pixels, first_name: str
) -> None:
    for index, (name, content) in chunk:
        pixels = _decode(name, content, image_size)
        if pixels.shape != out.shape[1:]:
            raise UserError(
                f"{name} has {_size(pixels.shape)} pixels but {first_name} has {_size(out.shape[1:])}; "
                "set image_size to make all images equal."
            )
        out[index] = pixels


def _decode(name: str, content: bytes, image_size: int | None) -> Pixels:
    """One image as uint8 [3, H, W]."""
    from PIL import Image, UnidentifiedImageError

    if not content:
        raise UserError(f"{name} is empty; remove it, or put its image there again.")
    if len(content) > MAX_FILE_BYTES:
        raise UserError(f"{name} has {len(content)} bytes, too many for an image; at most {MAX_FILE_BYTES} are read.")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_header(name, image, image_size)
            if image.format == "PNG":
                _verify_checksums(content)
            rgb = upright_rgb(image)
        return _channels_first(rgb if image_size is None else _central_square(rgb, image_size))
    except (UserError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} has far too many pixels; at most {MAX_PIXELS} are decoded.") from error
    except Exception as error:  # plug-ins raise whatever their parser trips over: struct.error, SyntaxError, KeyError
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise UserError(f"{name} does not decode as an image ({reason}); {', '.join(FORMATS)} are read.") from error


def _check_header(name: str, image: Image.Image, image_size: int | None) -> None:
    width, height = image.size
    short, long = sorted((width, height))
    resized = 0 if image_size is None else image_size * image_size * long // max(short, 1)
    if max(width * height, resized) > MAX_PIXELS:
        raise UserError(f"{name} has {width} x {height} pixels, too many; at most {MAX_PIXELS} are decoded.")


def _verify_checksums(content: bytes) -> None:
    """Compare a PNG's checksums, which Pillow skips where it decodes; it must open the file anew for that."""
    from PIL import Image

    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        image.verify()


def _central_square(image: Image.Image, image_size: int) -> Image.Image:
    from PIL import Image

    short = min(image.size)
    if short != image_size:
        width, height = (max(image_size, round(side * image_size / short)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))


def _channels_first(image: Image.Image) -> Pixels:
    pixels: Pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _allocate(count: int, shape: tuple[int, ...], first_name: str, file: Path | None) -> Pixels:
    num_bytes = count * math.prod(shape)
    if num_bytes <= free_bytes() // 2:
        return np.empty((count, *shape), dtype=np.uint8)
    if file is None or num_bytes > shutil.disk_usage(file.parent).free:
        raise UserError(
            f"{count} images of {_size(shape)} pixels, the size of {first_name}, take {num_bytes / 2**30:.1f} GiB, for "
            "which there is no room; set a smaller image_size, or name a storage with more."
        )
    # Its blocks are taken now: a disk that is full when a mapped page is written ends the process.
    mapped: Pixels = np.lib.format.open_memmap(file, "w+", np.uint8, (count, *shape))
    with file.open("r+b") as opened:
        os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    return mapped


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[2]} x {shape[1]}"


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings around the pool; filters are global, so this cannot be done inside its threads."""
    from PIL import Image

    with warnings.catch_warnings():
        # Ours is the stricter limit, and it is an error.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        # Corrupt EXIF, odd palettes, malformed multi-picture files: the pixels decode, which is all that is wanted.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        yield
