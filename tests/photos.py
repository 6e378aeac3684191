"""A data set of photographs of different sizes, cut from the two that scikit-learn brings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

CLASSES = ("flower", "sky", "temple")
FORMATS = ("JPEG", "PNG", "WEBP")
_BOXES = {"sky": (0, 0, 640, 130), "temple": (0, 140, 640, 427), "flower": (120, 20, 560, 410)}  # left, top, right, low


def write_photos(root: Path, *, per_class: int = 24) -> Path:
    """`train/CLASS/*` and `test/CLASS/*`: parts of random size and place, in three formats, some grey."""
    china, flower = load_sample_images().images
    draws = np.random.default_rng(0)
    for name in CLASSES:
        left, top, right, low = _BOXES[name]
        photo = Image.fromarray(flower if name == "flower" else china).crop((left, top, right, low))
        for number in range(per_class):
            width, height = (int(draws.integers(24, side + 1)) for side in (min(photo.width, 200), photo.height))
            x, y = (int(draws.integers(0, most + 1)) for most in (photo.width - width, photo.height - height))
            part = photo.crop((x, y, x + width, y + height))
            if number % 8 == 3:
                part = part.convert("L")
            if number % 8 == 4:
                part = part.quantize(64)
            folder = root / ("test" if number % 3 == 0 else "train") / name
            folder.mkdir(parents=True, exist_ok=True)
            kind = "PNG" if part.mode == "P" else FORMATS[number % len(FORMATS)]
            part.save(folder / f"{number}.{kind.lower()}", kind)
    return root
