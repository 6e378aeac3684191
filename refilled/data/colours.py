"""Any image that Pillow opens as upright RGB of 8 bits: one function, which what is given away says again.

`tune/tracking/served_student.py` runs where this package is not installed, and a test holds both to the same pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

_LEVELS = 257  # of 16 bits a level of 8 bits stands for


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened image as people see it, in RGB.

    Turned as its EXIF orientation says. Transparent parts show white. Grey of 16 bits is scaled to 8; colour of 16 bits
    Pillow itself reads as 8. Of an animation the first frame.

    Raises:
        ValueError: Its numbers have no known range: floats, or integers beyond 16 bits.
    """
    from PIL import Image, ImageOps

    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I"):
        levels = np.asarray(turned).astype(np.int64)
        if levels.min() < 0 or levels.max() > 0xFFFF:
            raise ValueError("integers beyond 16 bits")
        return Image.fromarray(((levels + _LEVELS // 2) // _LEVELS).astype(np.uint8)).convert("RGB")
    if turned.mode == "F":
        raise ValueError("floating-point pixels")
    if turned.has_transparency_data:
        seen = turned.convert("RGBA")
        white = Image.new("RGBA", seen.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, seen).convert("RGB")
    return turned.convert("RGB")
