"""Source `digits`: 1,797 handwritten digits of 8x8 pixels that come with scikit-learn, so nothing is downloaded."""

from __future__ import annotations

from importlib.metadata import version

import torch

from refilled.data.decode import resize_images
from refilled.data.images import ImageSet, PartName, SourcePart, make_image_set

# Upstream has no test part. A fixed quarter of every class is one, for everybody and for ever: it depends on no seed
# of a run, since a test part that changes with the run is no test part.
TEST_SHARE = 0.25
SPLIT_SEED = 20_231
CLASS_NAMES = tuple(str(digit) for digit in range(10))


def find_part(name: PartName) -> SourcePart:
    """The training or test part; scikit-learn is imported only where it must be read."""
    fingerprint = f"digits of scikit-learn {version('scikit-learn')}, {TEST_SHARE} test, split seed {SPLIT_SEED}"
    return SourcePart(name=name, fingerprint=fingerprint, read=lambda image_size, _: _read(name, image_size))


def _read(name: PartName, image_size: int | None) -> ImageSet:
    import numpy as np
    from sklearn.datasets import load_digits

    upstream = load_digits()
    pixels = np.round(upstream.images * 255 / 16).astype(np.uint8)[:, None]  # gray levels 0..16, [N, 1, 8, 8]
    labels = upstream.target.astype(np.int64)
    # RandomState's streams are frozen by NumPy's compatibility policy; default_rng's are not.
    random = np.random.RandomState(SPLIT_SEED)
    is_test = np.zeros(len(labels), dtype=bool)
    for digit in range(len(CLASS_NAMES)):
        members = random.permutation(np.flatnonzero(labels == digit))
        is_test[members[: round(TEST_SHARE * len(members))]] = True
    chosen = is_test if name == "test" else ~is_test
    images = resize_images(pixels[chosen], image_size)
    return make_image_set(torch.from_numpy(images), torch.from_numpy(labels[chosen]), CLASS_NAMES)
