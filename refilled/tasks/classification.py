"""The learning task of one run: the student's images, what is held out, and how pixels are scaled."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from refilled.config import RunConfig
from refilled.data.images import ImageSet
from refilled.data.label_space import LabelSpaces, hold_out, label_spaces, order_classes, select_classes
from refilled.data.sources import load_test, load_train
from refilled.storage import Storage


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation of the pixels in [0, 1], both float64 [C]."""

    mean: Tensor
    std: Tensor

    def apply(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Scale uint8 [B, C, H, W] to zero mean and unit variance a channel, in the memory format it has."""
        mean = (self.mean * 255).to(images.device, dtype)[:, None, None]
        scale = (1 / (self.std * 255)).to(images.device, dtype)[:, None, None]
        return images.to(dtype, copy=True).sub_(mean).mul_(scale)  # in place: half the memory traffic


@dataclass(frozen=True)
class Task:
    """What a run learns from.

    Attributes:
        spaces: The two explicit class lists.
        train: Images of the student's classes to learn from; labels are positions in `spaces.student`.
        validation: Held-out images of the same classes; none where the configuration holds nothing out.
        normalization: Mean and deviation over the training images of all classes, the same for teachers and students.
        data_digest: The digest of all training images of all classes, before any selection.
    """

    spaces: LabelSpaces
    train: ImageSet
    validation: ImageSet | None
    normalization: Normalization
    data_digest: str


def load_task(config: RunConfig, storage: Storage) -> Task:
    """Read the training part of the data and select the student's classes from it; the test part is not touched.

    Within a process the last few tasks are kept, since the trials of a cell share theirs.
    """
    spaces = spaces_of(config, storage)
    return _load_task(config.data, config.image_size, spaces, config.val_fraction, config.split_seed, storage)


def spaces_of(config: RunConfig, storage: Storage) -> LabelSpaces:
    """The explicit class lists of a configuration."""
    image_set, _ = _load_all(config.data, config.image_size, storage)
    ordered = order_classes(config.class_order, image_set.class_names)
    return label_spaces(
        ordered,
        overlap=config.overlap,
        num_teacher=config.num_teacher_classes,
        num_student=config.num_student_classes,
    )


def load_test_images(config: RunConfig, storage: Storage, classes: tuple[str, ...]) -> ImageSet:
    """The test images of some classes. Only a refit reads them, after selection (invariant 1)."""
    image_set = load_test(config.data, storage=storage, image_size=config.image_size)
    return select_classes(image_set, torch.arange(len(image_set.labels)), classes)


@functools.lru_cache(maxsize=2)
def _load_all(source: str, image_size: int | None, storage: Storage) -> tuple[ImageSet, Normalization]:
    image_set = load_train(source, storage=storage, image_size=image_size)
    return image_set, _measure(image_set.images)


@functools.lru_cache(maxsize=8)
def _load_task(
    source: str, image_size: int | None, spaces: LabelSpaces, val_fraction: float, split_seed: int, storage: Storage
) -> Task:
    image_set, normalization = _load_all(source, image_size, storage)
    split = hold_out(image_set, fraction=val_fraction, seed=split_seed)
    validation = select_classes(image_set, split.validation, spaces.student) if len(split.validation) else None
    return Task(
        spaces=spaces,
        train=select_classes(image_set, split.train, spaces.student),
        validation=validation,
        normalization=normalization,
        data_digest=image_set.digest,
    )


def _measure(images: Tensor) -> Normalization:
    """Exact mean and standard deviation a channel from a histogram of the 256 levels."""
    num_channels = images.shape[1]
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = torch.empty(num_channels, dtype=torch.float64), torch.empty(num_channels, dtype=torch.float64)
    for channel in range(num_channels):
        histogram = torch.zeros(256, dtype=torch.float64)
        for part in torch.split(images[:, channel], 4096):  # bincount counts in int64, eight times the pixels' size
            histogram += torch.bincount(part.flatten(), minlength=256)
        share = histogram / histogram.sum()
        mean[channel] = (share * levels).sum()
        std[channel] = (share * (levels - mean[channel]) ** 2).sum().sqrt()
    return Normalization(mean=mean, std=std.clamp_min(1e-3))  # a channel of one level has nothing to scale


def verify_test_images(config: RunConfig, storage: Storage, classes: tuple[str, ...]) -> None:
    """Prove that the test part can be read and has images of these classes, and give nothing of it back.

    A search calls it before any training starts, so that a damaged test file is not found out at the very end.
    """
    load_test_images(config, storage, classes)
