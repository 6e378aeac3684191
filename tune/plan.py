"""What a search will do, worked out and checked before anything runs."""

from __future__ import annotations

import dataclasses
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import refilled
from refilled.config import RunConfig, SearchConfig, content_hash
from refilled.data.label_space import NAMED_ORDERS, LabelSpaces
from refilled.data.sources import validate_source
from refilled.errors import UserError
from refilled.execution import cache_of
from refilled.methods import num_epochs_of
from refilled.models import validate_model_name
from refilled.storage.mirror import open_storage
from refilled.storage.run_folder import run_key
from refilled.storage.store import require_writable
from refilled.tasks.classification import load_task, verify_test_images
from tune.studies.space import as_data
from tune.studies.study_store import StudyPlan
from tune.studies.warm_start import donors

Role = Literal["method", "baseline"]
NO_TEACHER = "none"
# What the trials of a deterministic search depend on, beside its cells.
_SHAPING = (
    "trials",
    "max_epochs_total",
    "adaptive_share",
    "sampler",
    "pruner",
    "transfer",
    "share_embeddings",
    "deterministic",
    "generation",
)


@dataclass(frozen=True)
class Cell:
    """One (data set, overlap, teacher, student) with its own study and winner.

    The vanilla student beside it is a cell of role `baseline` that all teachers share: same overlap and student, no
    teacher, the same number of trials, and all epochs of both stages for its single one.
    """

    role: Role
    overlap: float
    teacher: str
    student: str
    run: RunConfig
    spaces: LabelSpaces
    data_digest: str
    num_validation_images: int

    @property
    def name(self) -> str:
        """For people: `0.4 wrn-40-2>wrn-16-1 refilled`."""
        return f"{self.overlap:g} {self.teacher}>{self.student} {self.run.method}"

    @property
    def tags(self) -> dict[str, str]:
        """What MLflow's runs of this cell carry."""
        return {
            "cell": self.name,
            "role": self.role,
            "overlap": f"{self.overlap:g}",
            "teacher": self.teacher,
            "student": self.student,
            "method": self.run.method,
            "data_digest": self.data_digest,
        }

    @cached_property
    def identity(self) -> str:
        """Hash of what defines the cell's studies: the run, its classes and data, and what is searched."""
        return content_hash([run_key(self.run, self.spaces, self.data_digest), as_data(self.run)])


@dataclass(frozen=True)
class Plan:
    """All cells of a search and what they share."""

    search: SearchConfig
    storage: Path
    cells: tuple[Cell, ...]
    baselines: tuple[Cell, ...]

    @property
    def all_cells(self) -> tuple[Cell, ...]:
        """Cells with a study: the grid's, then the vanilla students'."""
        return self.cells + self.baselines

    def baseline_of(self, cell: Cell) -> Cell:
        """The vanilla student beside a cell; a search of vanilla students is its own baseline."""
        if cell.role == "baseline":
            return cell
        same = [each for each in self.baselines if (each.overlap, each.student) == (cell.overlap, cell.student)]
        return same[0] if same else cell

    @cached_property
    def key(self) -> str:
        """Names the search: equal for equal studies in one experiment, whatever the refits and workers."""
        return content_hash([self.search.experiment, sorted(study.name for study in self.studies.values())])

    @cached_property
    def studies(self) -> dict[str, StudyPlan]:
        """The study of every cell, by the cell's name.

        A study's name hashes what defines the cell and the experiment that asks, so a larger grid or more trials go on
        with it. A deterministic study depends on all that shapes the search, and is named by that too.
        """
        search = self.search
        shape: list[object] = [search.experiment]
        if search.deterministic:
            shape += [[name, getattr(search, name)] for name in _SHAPING] + [[each.identity for each in self.all_cells]]
        studies = {}
        for index, cell in enumerate(self.all_cells):
            baseline = self.baseline_of(cell)
            studies[cell.name] = StudyPlan(
                key=cell.name,
                name=f"{search.experiment} {cell.name} {content_hash([*shape, cell.identity])}",
                run=cell.run,
                num_trials=search.trials,
                num_epochs=num_epochs_of(cell.run),
                donors=donors(cell, self.all_cells[:index]),
                baseline=None if baseline is cell else baseline.name,
                num_validation_images=cell.num_validation_images,
                attributes={
                    **cell.tags,
                    "teacher_classes": list(cell.spaces.teacher),
                    "student_classes": list(cell.spaces.student),
                    "config": cell.run.to_dict(),
                },
            )
        return studies


def make_plan(search: SearchConfig) -> Plan:
    """Check the whole request and decode the training images.

    Raises:
        UserError: for anything the search would stumble over later.
    """
    for field_name, names in (("teachers", search.teachers), ("students", search.students)):
        for name in names:
            _validate_model(field_name, name)
    validate_source(search.run.data)
    search = dataclasses.replace(search, run=_with_absolute_paths(search.run))
    storage = open_storage(search.storage)
    require_writable(storage, "storage")
    cells, baselines = [], {}
    for overlap in search.overlaps:
        for teacher in search.teachers:
            for student in search.students:
                cell = _cell(search.run, "method", overlap, teacher, student, storage)
                cells.append(cell)
                if search.run.method != "student":
                    baseline = _baseline_run(cell.run)
                    baselines[overlap, student] = dataclasses.replace(
                        cell, role="baseline", teacher=NO_TEACHER, run=baseline
                    )
    plan = Plan(search=search, storage=storage, cells=tuple(cells), baselines=tuple(baselines.values()))
    least = sum(num_epochs_of(each.run) for each in plan.all_cells)
    if search.max_epochs_total is not None and search.max_epochs_total < least:
        raise UserError(
            f"max_epochs_total must hold one whole trial of each of the {len(plan.all_cells)} studies, {least} epochs, "
            f"got {search.max_epochs_total}."
        )
    for overlap in search.overlaps:
        first = next(cell for cell in plan.cells if cell.overlap == overlap)
        verify_test_images(first.run, cache_of(storage), first.spaces.student)
    return plan


def _cell(template: RunConfig, role: Role, overlap: float, teacher: str, student: str, storage: Path) -> Cell:
    run = dataclasses.replace(template, overlap=overlap, teacher=teacher, student=student)
    task = load_task(run, cache_of(storage))
    if run.method == "kd" and task.spaces.teacher != task.spaces.student:
        raise UserError("method kd needs num_teacher_classes and num_student_classes to be equal (Eq. 2).")
    return Cell(
        role=role,
        overlap=overlap,
        teacher=teacher,
        student=student,
        run=run,
        spaces=task.spaces,
        data_digest=task.data_digest,
        num_validation_images=0 if task.validation is None else len(task.validation.labels),
    )


def _with_absolute_paths(run: RunConfig) -> RunConfig:
    """The same run for a worker, whose current folder is another."""
    kind, colon, path = run.data.partition(":")
    data = f"{kind}:{Path(path).expanduser().absolute()}" if colon else run.data
    is_named = run.class_order in NAMED_ORDERS
    order = run.class_order if is_named else str(Path(run.class_order).expanduser().absolute())
    return dataclasses.replace(run, data=data, class_order=order)


def _baseline_run(run: RunConfig) -> RunConfig:
    """The vanilla student with all the epochs that the method spends on both its stages."""
    return dataclasses.replace(run, method="student", epochs=(0, num_epochs_of(run)))


def _validate_model(field_name: str, name: str) -> None:
    try:
        validate_model_name(name)
    except UserError as error:
        raise UserError(f"{field_name}: {error}") from error


def code_version() -> str:
    """The package's version, with the commit where the code runs from a checkout."""
    root = Path(refilled.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return refilled.__version__
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return refilled.__version__
    return f"{refilled.__version__}+{described}"
