"""Decoded images on disk: decoded once per content and image size, memory-mapped by every process after that."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refilled.data.images import ImageSet, SourcePart
from refilled.data.pixels import Pixels, StoredPixels
from refilled.errors import UserError
from refilled.storage import Kind, Storage

IMAGES = Kind("images", is_local=True)
IMAGES_FILE = "images.npy"
FORMAT_VERSION = 3  # raise when the same source is to be decoded to other pixels, or entries get another layout
_log = logging.getLogger(__name__)


def load_cached(part: SourcePart, image_size: int | None, storage: Storage, max_bytes: int | None = None) -> ImageSet:
    """The decoded part: from the storage if it is there and whole, else decoded and put there.

    The images are backed by a private (copy-on-write) mapping of the file `images.npy` (uint8 [N, C, H, W]), so that
    processes share the memory; where it is larger than `max_bytes`, they stay in the file.

    Raises:
        UserError: The part cannot be read, or the storage cannot be written.
    """

    def build(folder: Path | None) -> Mapping[str, Any]:
        assert folder is not None, "every process decodes for itself"
        decoded = part.read(image_size, folder / IMAGES_FILE)
        if not (folder / IMAGES_FILE).exists():
            assert isinstance(decoded.images, torch.Tensor)
            np.save(folder / IMAGES_FILE, decoded.images.numpy())
        np.save(folder / "labels.npy", decoded.labels.numpy())
        _log.info("Decoded %d %s images into %s", len(decoded), part.name, folder)
        return {"class_names": decoded.class_names, "digest": decoded.digest}

    try:
        artifact = storage.artifacts.make(IMAGES, cache_key(part, image_size), build)
    except OSError as error:
        reason = error.strerror or error  # NumPy's own has no number
        raise UserError(
            f"Cache folder {storage.root} cannot be written ({reason}); name a folder with room and write access."
        ) from error
    assert artifact is not None, "it waits for whoever is making it"
    file = artifact.path / IMAGES_FILE
    images: Pixels
    if max_bytes is not None and file.stat().st_size > max_bytes:
        images = StoredPixels(file)
    else:
        images = torch.from_numpy(np.load(file, mmap_mode="c", allow_pickle=False))
    labels = np.load(artifact.path / "labels.npy", allow_pickle=False)
    return ImageSet(
        images=images,
        labels=torch.from_numpy(labels),
        class_names=tuple(artifact.about["class_names"]),
        digest=artifact.about["digest"],
    )


def cache_key(part: SourcePart, image_size: int | None) -> str:
    """32 hex digits naming the entry of a part at an image size."""
    identity = json.dumps([FORMAT_VERSION, part.name, part.fingerprint, image_size])
    return hashlib.sha256(identity.encode()).hexdigest()[:32]
