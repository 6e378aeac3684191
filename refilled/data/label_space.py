"""Who learns which classes, and which images are held out.

The paper's sliding window (section 5.1.1, Figure 4): over an ordered list of all classes the teacher has the first
ones, and the student's window starts where it shares the wanted part of its classes with the teacher.
"""

from __future__ import annotations

import hashlib
import sys
import unicodedata
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from refilled.data import pixels
from refilled.data.images import ImageSet, check_class_names, make_image_set
from refilled.data.text import one_line, shown
from refilled.errors import UserError
from refilled.keyed import derive_seed, keyed_permutation

NAMED_ORDERS = ("alphabetical", "cifar_fs")


@dataclass(frozen=True)
class LabelSpaces:
    """The class lists of a cell; a label is the position in its list.

    Attributes:
        teacher: The teacher's; empty where it is brought without names.
        student: The student's.
        teacher_digest: Digest of the teacher's own training images, where it is pre-trained on other data; else empty.
    """

    teacher: tuple[str, ...]
    student: tuple[str, ...]
    teacher_digest: str = ""

    @property
    def overlap(self) -> float:
        """Share of the student's classes that are the teacher's too, by name."""
        return self.num_shared / len(self.student)

    @property
    def num_shared(self) -> int:
        """Number of classes that teacher and student have in common."""
        return len(set(self.teacher) & set(self.student))


def order_classes(order: str, class_names: tuple[str, ...]) -> tuple[str, ...]:
    """All classes of a data set in the order over which the windows slide.

    Args:
        order: `alphabetical`; `cifar_fs`, the order of the authors' code: the 64 training, 16 validation and 20 test
            classes of CIFAR-FS (Bertinetto et al., ICLR 2019), alphabetical within each part; or the path of a text
            file with one class name a line.
        class_names: The data set's classes.

    Raises:
        UserError: For a file that cannot be read, or that does not name every class exactly once.
    """
    if order == "alphabetical":
        return tuple(sorted(class_names))
    if order == "cifar_fs":
        text = resources.files("refilled.data").joinpath("class_orders/cifar_fs.txt").read_text(encoding="utf-8")
    else:
        try:
            text = Path(order).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:  # not there, not text, not a path
            raise UserError(
                f"class_order must be {', '.join(NAMED_ORDERS)} or a readable text file with one class a line, "
                f"got {shown(repr(order))} ({one_line(error)})."
            ) from error
    order = shown(order)
    names = _lines_once(text, f"class_order {order!r}")
    if set(names) != set(class_names):
        odd = sorted(set(names) ^ set(class_names))[0]
        where = "which the data does not have" if odd in names else "which the order leaves out"
        raise UserError(
            f"class_order {order!r} must name the data's {len(class_names)} classes; see {shown(repr(odd))}, {where}."
        )
    return names


def listed_classes(text: str, field_name: str, path: str, image_set: ImageSet | None) -> tuple[str, ...]:
    """The classes that a text file names, one a line.

    Args:
        text: The file's.
        field_name: The setting, for messages.
        path: The file's name, likewise.
        image_set: The data that must have them; none: names that nobody can check.

    Raises:
        UserError: It names one twice, fewer than two, or one that the data does not have or has no image of.
    """
    where = f"{field_name} {shown(path)!r}"
    names = _lines_once(text, where)
    if len(names) < 2:
        raise UserError(f"{where} must name at least 2 classes, one a line, got {len(names)}.")
    if image_set is None:
        return check_class_names(names, where)
    odd = [name for name in names if name not in image_set.class_names]
    if odd:
        some = ", ".join(shown(name) for name in image_set.class_names[:3])
        raise UserError(
            f"{where} must name classes of the data, which has no {shown(repr(odd[0]))} and {len(odd) - 1} more of "
            f"them; it has {some}, ..."
        )
    empty = [name for name in names if name in empty_classes(image_set)]
    if empty:
        raise UserError(
            f"{where} must name classes with training images, but the data has none of {shown(empty[0])!r}."
        )
    return names


def empty_classes(image_set: ImageSet) -> tuple[str, ...]:
    """Classes that a data set declares and has no image of."""
    counts = torch.bincount(image_set.labels, minlength=len(image_set.class_names)).tolist()
    return tuple(name for name, count in zip(image_set.class_names, counts, strict=True) if not count)


def _lines_once(text: str, where: str) -> tuple[str, ...]:
    lines = unicodedata.normalize("NFC", text).splitlines()
    names = tuple(line.strip() for line in lines if line.strip())
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{where} must name every class once, but names {shown(repr(twice))} twice.")
    return names


def label_spaces(
    ordered: tuple[str, ...], *, overlap: float, num_teacher: int | None = None, num_student: int | None = None
) -> LabelSpaces:
    """The teacher's and the student's window over the ordered classes.

    Args:
        ordered: All classes, in the order over which the windows slide.
        overlap: Share of the student's classes that are also the teacher's, in [0, 1].
        num_teacher: Size of the teacher's window, which starts at the first class; none: half of all classes.
        num_student: Size of the student's window; none: half of all classes.

    Raises:
        UserError: For an overlap that the class counts cannot express, naming those that they can.
    """
    num_teacher = len(ordered) // 2 if num_teacher is None else num_teacher
    num_student = len(ordered) // 2 if num_student is None else num_student
    if num_teacher > len(ordered):
        raise UserError(f"num_teacher_classes must be at most {len(ordered)}, got {num_teacher}.")
    if min(num_teacher, num_student) < 2:
        raise UserError(f"The data must have at least 2 classes for the teacher and 2 for the student, got {ordered}.")
    num_shared = round(overlap * num_student)
    start = num_teacher - num_shared
    exact = abs(overlap * num_student - num_shared) < 1e-6
    if not exact or start < 0 or start + num_student > len(ordered):
        least = max(0, num_teacher + num_student - len(ordered))
        most = min(num_teacher, num_student)
        raise UserError(
            f"overlap must be k/{num_student} with k from {least} to {most} for {num_teacher} teacher and "
            f"{num_student} student classes out of {len(ordered)}, got {overlap}."
        )
    return LabelSpaces(teacher=ordered[:num_teacher], student=ordered[start : start + num_student])


@dataclass(frozen=True)
class Split:
    """Indices into a data set's training images, both int64 and ascending."""

    train: Tensor
    validation: Tensor


def hold_out(image_set: ImageSet, *, fraction: float, seed: int, images_per_class: int | None = None) -> Split:
    """A stratified validation split of all classes, before any window selects from them.

    It is drawn once for all cells, so that a teacher has never seen an image on which a student is validated. A class's
    share depends on the seed and the class's name alone. Of a smaller number of images a class, those held out are
    among those that are held out of all images, and the smaller of two numbers takes a part of the larger's.

    Args:
        image_set: All training images.
        fraction: Share of every class that is held out, rounded to whole images, at least 1 where above 0.
        seed: The seed of the draw.
        images_per_class: Most images that are taken of a class, on both sides together; none: all.

    Raises:
        UserError: Where a class has too few images to leave one on each side.
    """
    held: list[Tensor] = []
    kept: list[Tensor] = []
    for label, name in enumerate(image_set.class_names):
        members = (image_set.labels == label).nonzero().flatten()
        if not len(members):
            continue
        number = len(members) if images_per_class is None else min(images_per_class, len(members))
        count = max(1, round(fraction * number)) if fraction > 0 else 0
        if count >= number:
            raise UserError(f"val_fraction must leave images of class {name!r}, which has {number}.")
        order = members[keyed_permutation(len(members), derive_seed(seed, "hold_out", name))]
        held.append(order[:count])
        kept.append(order[count:number])
    return Split(train=torch.cat(kept).sort().values, validation=torch.cat(held).sort().values)


def select_classes(
    image_set: ImageSet, indices: Tensor, classes: tuple[str, ...], max_bytes: int | None = None
) -> ImageSet:
    """The images among `indices` that belong to `classes`, labelled by their position in that list.

    Of a set that is in a file they are read into memory where they take at most `max_bytes` (none: any number).

    Raises:
        UserError: For a class the data set does not have, or one without an image.
    """
    position = {name: label for label, name in enumerate(image_set.class_names)}
    missing = [name for name in classes if name not in position]
    if missing:
        raise UserError(f"The data has no class {missing[0]!r}.")
    new_label = torch.full((len(image_set.class_names),), -1, dtype=torch.int64)
    new_label[torch.tensor([position[name] for name in classes])] = torch.arange(len(classes))
    labels = new_label[image_set.labels[indices]]
    chosen = labels >= 0
    counts = torch.bincount(labels[chosen], minlength=len(classes))
    if int(counts.min()) == 0:
        raise UserError(f"The data must have images of class {classes[int(counts.argmin())]!r}, but has none.")
    most = sys.maxsize if max_bytes is None else max_bytes
    return make_image_set(pixels.chosen(image_set.images, indices[chosen], most), labels[chosen], classes)


def classes_digest(classes: tuple[str, ...]) -> str:
    """16 hex digits that identify an ordered class list."""
    return hashlib.sha256("\0".join(classes).encode()).hexdigest()[:16]
