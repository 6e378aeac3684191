"""Source `cifar100`: downloaded once into the storage by torchvision, under torchvision's checksums."""

from __future__ import annotations

import http.client
import tarfile

import torch

from refilled.data.decode import resize_images
from refilled.data.images import ImageSet, PartName, SourcePart, make_image_set
from refilled.data.text import one_line
from refilled.errors import UserError
from refilled.storage import Storage
from refilled.storage.artifact_folder import locked

# The MD5 by which torchvision accepts the archive. It stands here too so that decoded images are found in the cache
# without importing torchvision.
ARCHIVE_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"


def find_part(name: PartName, storage: Storage) -> SourcePart:
    """The training or test part; downloads only where the decoded images are not there yet."""
    return SourcePart(
        name=name, fingerprint=f"cifar-100-python {ARCHIVE_MD5}", read=lambda size, _: _read(name, storage, size)
    )


def _read(name: PartName, storage: Storage, image_size: int | None) -> ImageSet:
    import numpy as np
    from torchvision.datasets import CIFAR100

    try:
        folder = storage.root / "cache" / "downloads"
        with locked(folder / "cifar100", wait=True):  # the other part may be downloading too
            upstream = CIFAR100(str(folder), train=name == "train", download=True)
    except (OSError, RuntimeError, EOFError, tarfile.TarError, http.client.HTTPException) as error:
        raise UserError(
            f"Source cifar100 could not be downloaded ({one_line(error)}); "
            "without internet access name a copy on disk, such as parquet:PATH or imagefolder:PATH."
        ) from error
    pixels = np.ascontiguousarray(upstream.data.transpose(0, 3, 1, 2))  # torchvision holds [N, H, W, C]
    labels = torch.tensor(upstream.targets, dtype=torch.int64)
    return make_image_set(torch.from_numpy(resize_images(pixels, image_size)), labels, upstream.classes)
