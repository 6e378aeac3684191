"""The learning task of one run: the student's images, what is held out, and how pixels are scaled."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch

from refilled.config import RunConfig
from refilled.config.embedding_cache import GIB
from refilled.data.images import ImageSet
from refilled.data.label_space import (
    LabelSpaces,
    empty_classes,
    hold_out,
    label_spaces,
    listed_classes,
    order_classes,
    select_classes,
)
from refilled.data.pixels import free_bytes
from refilled.data.sources import load_test, load_train
from refilled.data.text import shown
from refilled.errors import DataChangedError, UserError
from refilled.models.foreign import InputConfig, input_config
from refilled.storage import Storage
from refilled.tasks.normalization import Normalization, measure


def _teacher_input(config: RunConfig, storage: Storage) -> InputConfig | None:
    """What the teacher sees, where that is not simply what the student does.

    Of a brought teacher it is what the run says, else what its library says; of one that is pre-trained on other data
    the size and statistics of these.
    """
    if config.teacher_data not in (None, config.data):
        assert config.teacher_data is not None
        own, normalization = _images_of(config, storage, of_teacher=True)
        channels = _images_of(config, storage)[0].images.shape[1]
        if own.images.shape[1] < channels:
            raise UserError(
                f"teacher_data must have images with {channels} channels, as many as data has, got "
                f"{own.images.shape[1]}."
            )
        return InputConfig(own.images.shape[2], tuple(normalization.mean.tolist()), tuple(normalization.std.tolist()))
    if config.teacher_weights is None:
        return None
    said = input_config(config.teacher)
    if config.teacher_image_size is not None:
        said = dataclasses.replace(said, size=config.teacher_image_size)
    if config.teacher_mean is not None:
        said = dataclasses.replace(said, mean=config.teacher_mean, std=config.teacher_std)
    return said


@dataclass(frozen=True)
class TeacherImages:
    """The student's images as a teacher sees them that has an input of its own.

    Attributes:
        train: The training images, in the student's order, decoded at the teacher's size where more can be decoded.
        normalization: The teacher's.
    """

    train: ImageSet
    normalization: Normalization

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what the network gets."""
        channels, height, width = self.train.images.shape[1:]
        size = self.normalization.size
        return max(channels, len(self.normalization.mean)), size or height, size or width


@dataclass(frozen=True)
class Task:
    """What a run learns from.

    Attributes:
        spaces: The two explicit class lists.
        train: Images of the student's classes to learn from; labels are positions in `spaces.student`.
        validation: Held-out images of the same classes; none where the configuration holds nothing out.
        normalization: Mean and deviation over the training images of all classes, the same for teachers and students.
        data_digest: The digest of all training images of all classes, before any selection.
        for_teacher: The training images as the teacher sees them; none: as the student does.
    """

    spaces: LabelSpaces
    train: ImageSet
    validation: ImageSet | None
    normalization: Normalization
    data_digest: str
    for_teacher: TeacherImages | None = None

    @property
    def as_teacher_sees(self) -> TeacherImages:
        """The training images as the teacher sees them."""
        return self.for_teacher or TeacherImages(self.train, self.normalization)


def load_task(config: RunConfig, storage: Storage) -> Task:
    """Read the training part of the data and select the student's classes from it; the test part is not touched.

    Within a process the last few tasks are kept, since the trials of a cell share theirs.
    """
    spaces = spaces_of(config, storage)
    return _load_task(
        config.data,
        config.image_size,
        spaces,
        config.val_fraction,
        config.split_seed,
        storage,
        images_per_class=config.images_per_class,
        teacher_input=_teacher_input(config, storage),
        max_bytes=max_bytes_of(config),
    )


def max_bytes_of(config: RunConfig) -> int:
    """What a run's images may take of memory: what it says, else half of what was free when first asked."""
    return _half_of_free() if config.max_image_gib is None else int(config.max_image_gib * GIB)


@functools.cache
def _half_of_free() -> int:
    return free_bytes() // 2


def spaces_of(config: RunConfig, storage: Storage) -> LabelSpaces:
    """The explicit class lists of a configuration: the sliding windows, or those that are given.

    Classes that the data declares and has no training image of are left out.
    """
    image_set, _ = _images_of(config, storage)
    ordered = all_classes(config, storage)
    if not config.is_explicit:
        return label_spaces(
            ordered,
            overlap=config.overlap,
            num_teacher=config.num_teacher_classes,
            num_student=config.num_student_classes,
        )
    student = _listed(config, "student_classes", image_set) or ordered
    if config.teacher_weights is not None:
        return LabelSpaces(teacher=_listed(config, "teacher_classes", None) or (), student=student)
    if config.teacher_data in (None, config.data):
        return LabelSpaces(teacher=_listed(config, "teacher_classes", image_set) or ordered, student=student)
    assert config.teacher_data is not None
    of_teacher, _ = _images_of(config, storage, of_teacher=True)
    teacher = _listed(config, "teacher_classes", of_teacher) or _filled("alphabetical", of_teacher)
    return LabelSpaces(teacher=teacher, student=student, teacher_digest=of_teacher.digest)


def _listed(config: RunConfig, field_name: str, image_set: ImageSet | None) -> tuple[str, ...] | None:
    """The classes that a file names, whose text the run carries; none where there is no file."""
    path = getattr(config, field_name)
    if path is None:
        return None
    text = config.sources.text_of(path)
    if text is None:
        raise UserError(f"{field_name} {path!r} must come with its text in `sources`, which lacks it.")
    return listed_classes(text, field_name, path, image_set)


def _filled(order: str, image_set: ImageSet) -> tuple[str, ...]:
    """The classes with training images in their order."""
    empty = empty_classes(image_set)
    return tuple(name for name in order_classes(order, image_set.class_names) if name not in empty)


def all_classes(config: RunConfig, storage: Storage) -> tuple[str, ...]:
    """The classes of a run's data with training images, in the order over which the windows slide."""
    return _filled(config.class_order, _images_of(config, storage)[0])


def left_out(config: RunConfig, storage: Storage) -> tuple[str, ...]:
    """Classes that a run's data sets declare and have no training image of."""
    sources = dict.fromkeys([config.data, config.teacher_data or config.data])
    of_each = (_load_all(each, config.image_size, storage, max_bytes_of(config))[0] for each in sources)
    return tuple(name for image_set in of_each for name in empty_classes(image_set))


def load_test_images(config: RunConfig, storage: Storage, classes: tuple[str, ...]) -> ImageSet:
    """The test images of some classes. Only a refit reads them, after selection (invariant 1)."""
    max_bytes = max_bytes_of(config)
    image_set = load_test(config.data, storage=storage, image_size=config.image_size, max_bytes=max_bytes)
    return select_classes(image_set, torch.arange(len(image_set.labels)), classes, max_bytes)


def _images_of(config: RunConfig, storage: Storage, *, of_teacher: bool = False) -> tuple[ImageSet, Normalization]:
    """All training images, which must be those that the configuration knows, if it does."""
    source = config.teacher_data if of_teacher else config.data
    wanted = config.teacher_data_digest if of_teacher else config.data_digest
    assert source is not None
    found = _load_all(source, config.image_size, storage, max_bytes_of(config))
    if wanted not in (None, found[0].digest):
        name = "teacher_data" if of_teacher else "data"
        raise DataChangedError(
            f"The training images of {name} {shown(source)} have changed: their digest is {found[0].digest}, not "
            f"{wanted}; put back what was there, or start a search of its own on what is there now."
        )
    return found


@functools.lru_cache(maxsize=4)  # the student's images and the teacher's, of one overlap after the other
def _load_all(source: str, image_size: int | None, storage: Storage, max_bytes: int) -> tuple[ImageSet, Normalization]:
    image_set = load_train(source, storage=storage, image_size=image_size, max_bytes=max_bytes)
    return image_set, measure(image_set.images)


@functools.lru_cache(maxsize=8)
def _load_task(
    source: str,
    image_size: int | None,
    spaces: LabelSpaces,
    val_fraction: float,
    split_seed: int,
    storage: Storage,
    *,
    images_per_class: int | None,
    teacher_input: InputConfig | None,
    max_bytes: int,
) -> Task:
    image_set, normalization = _load_all(source, image_size, storage, max_bytes)
    _require_images(image_set, spaces.student, images_per_class)
    split = hold_out(image_set, fraction=val_fraction, seed=split_seed, images_per_class=images_per_class)
    held = len(split.validation)
    validation = select_classes(image_set, split.validation, spaces.student, max_bytes) if held else None
    train = select_classes(image_set, split.train, spaces.student, max_bytes)
    for_teacher = None
    if teacher_input is not None:
        side = train.images.shape[2]
        # What was resized when it was decoded has more to be decoded at another size; what was not is interpolated.
        is_decoded = image_size is not None and teacher_input.size not in (None, image_size)
        seen = train
        if is_decoded:
            larger, _ = _load_all(source, teacher_input.size, storage, max_bytes)
            seen = select_classes(larger, split.train, spaces.student, max_bytes)
        as_seen = _teacher_normalization(teacher_input, normalization, None if is_decoded else side)
        for_teacher = TeacherImages(seen, as_seen)
    return Task(
        spaces=spaces,
        train=train,
        validation=validation,
        normalization=normalization,
        data_digest=image_set.digest,
        for_teacher=for_teacher,
    )


def _teacher_normalization(wanted: InputConfig, of_data: Normalization, side: int | None) -> Normalization:
    """The teacher's; `side` is that of its images before they are resized, none where they have its size already."""
    mean = of_data.mean if wanted.mean is None else torch.tensor(wanted.mean, dtype=torch.float64)
    std = of_data.std if wanted.std is None else torch.tensor(wanted.std, dtype=torch.float64)
    if len(mean) not in (1, len(of_data.mean)) and len(of_data.mean) != 1:
        raise UserError(f"teacher_mean must have {len(of_data.mean)} numbers for these images, got {len(mean)}.")
    return Normalization(mean, std, None if side is None or wanted.size == side else wanted.size)


def _require_images(image_set: ImageSet, classes: tuple[str, ...], images_per_class: int | None) -> None:
    counts = torch.bincount(image_set.labels, minlength=len(image_set.class_names))
    of_classes = {name: int(counts[label]) for label, name in enumerate(image_set.class_names) if name in classes}
    least = min(of_classes, key=of_classes.__getitem__, default=None)
    if least is not None and images_per_class is not None and images_per_class > of_classes[least]:
        raise UserError(
            f"images_per_class must be at most {of_classes[least]}, as many as class {least!r} has, got "
            f"{images_per_class}."
        )


def verify_test_images(config: RunConfig, storage: Storage, classes: tuple[str, ...]) -> None:
    """Prove that the test part can be read and has images of these classes, and give nothing of it back.

    A search calls it before any training starts, so that a damaged test file is not found out at the very end.
    """
    load_test_images(config, storage, classes)
