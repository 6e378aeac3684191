"""A search whose label spaces are given, by a teacher that is brought, class lists or a second data set.

Between given label spaces the overlap is a fact, measured by the classes' names, and not an axis.
"""

from __future__ import annotations

import dataclasses

from refilled.brought import describe_teacher
from refilled.config import RunConfig, SearchConfig
from refilled.errors import UserError
from refilled.presets import PRESETS
from refilled.stages import with_own_code
from refilled.storage import Storage
from refilled.tasks.classification import all_classes, left_out, load_task, spaces_of


def measured(search: SearchConfig, storage: Storage) -> SearchConfig:
    """The search with the measured overlap as its only one.

    Raises:
        UserError: It asks for other overlaps or windows, or brings one file for several networks.
    """
    run = search.run
    if search.overlaps not in {make().overlaps for make in PRESETS.values()} and len(search.overlaps) > 1:
        raise UserError(
            "overlaps must not be given where the teacher is brought or classes are given: the overlap is then what "
            f"the classes' names say, got {', '.join(f'{each:g}' for each in search.overlaps)}."
        )
    for name in ("num_teacher_classes", "num_student_classes"):
        if getattr(run, name) is not None:
            raise UserError(f"{name} must be none where the teacher is brought or classes are given.")
    for role, names in (("teacher", search.teachers), ("student", search.students)):
        if getattr(run, f"{role}_weights") is not None and len(names) > 1:
            raise UserError(f"{role}s must be one architecture with {role}_weights, got {', '.join(names)}.")
    run = with_own_code(dataclasses.replace(run, teacher=search.teachers[0], student=search.students[0]))
    overlap = round(spaces_of(run, storage).overlap, 6)
    return dataclasses.replace(search, overlaps=(overlap,))


def remarks(run: RunConfig, storage: Storage) -> list[str]:
    """What is taken for granted of classes, and of a teacher that is brought, for people."""
    lines, task = [], load_task(run, storage)
    if empty := left_out(run, storage):
        some = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
        lines.append(f"Left out, since the data has no training image of them: {some} ({len(empty)} classes).")
    spaces = task.spaces
    if not run.is_explicit:
        if run.num_student_classes is None:
            num_classes = len(all_classes(run, storage))
            lines.append(
                f"Of the data's {num_classes} classes the teacher has {len(spaces.teacher)} and the student "
                f"{len(spaces.student)}; --num-teacher-classes, --num-student-classes or lists of them change that."
            )
        return lines
    if run.teacher_weights is not None:
        lines.append(describe_teacher(run, task))
    if spaces.teacher:
        lines.append(
            f"Overlap {spaces.overlap:g}, by name: {spaces.num_shared} of the student's {len(spaces.student)} classes "
            f"are among the teacher's {len(spaces.teacher)}."
        )
    else:
        lines.append(
            "Overlap is not known, since the teacher's classes have no names here (--teacher-classes FILE), and counts "
            "as 0."
        )
    return lines
