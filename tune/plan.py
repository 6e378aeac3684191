"""What a search will do, worked out and checked before anything runs."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import refilled
from refilled.config import RunConfig, SearchConfig, content_hash
from refilled.data.label_space import NAMED_ORDERS, LabelSpaces
from refilled.data.sources import validate_source
from refilled.errors import UserError
from refilled.identity import run_key
from refilled.methods import NO_TEACHER, has_embedding_stage, name_of
from refilled.models import validate_model_name
from refilled.rehearsal import rehearse
from refilled.stages import (
    check_classes,
    complete,
    named_by_user,
    needs_teacher,
    num_epochs_of,
    stages_of,
    with_own_code,
)
from refilled.storage import Storage
from refilled.storage.run_folder import RunFolder
from refilled.tasks.classification import load_task, verify_test_images
from refilled.teacher import pretraining_run
from refilled.user_code import blaming
from tune.studies.space import as_data, default_point
from tune.studies.study_store import StudyPlan
from tune.studies.warm_start import source_cells

# What the trials of a deterministic search depend on, beside its cells.
_SHAPING = (
    "trials",
    "max_epochs_total",
    "adaptive_share",
    "sampler",
    "pruner",
    "transfer",
    "share_embeddings",  # a setting that is gone counts as off, so that stored searches keep their names
    "deterministic",
    "generation",
)
_RENAMED = {"generation": "trial_batch"}  # settings that had other names when studies were first named


class Place(NamedTuple):
    """One cell of the grid, in which methods are compared; its data is the search's."""

    overlap: float
    teacher: str
    student: str


@dataclass(frozen=True)
class Cell:
    """One method in one cell of the grid: what has a study and a winner of its own.

    A method that asks no teacher, such as the vanilla student, has one study for all teachers of the same overlap and
    student; its `teacher` is "none".
    """

    overlap: float
    teacher: str
    student: str
    run: RunConfig
    spaces: LabelSpaces
    data_digest: str
    num_validation_images: int

    @property
    def method(self) -> str:
        """As it was asked for."""
        return self.run.method

    @property
    def name(self) -> str:
        """For people: `0.4 wrn-40-2>wrn-16-1 refilled`."""
        return f"{self.overlap:g} {self.teacher}>{self.student} {self.method}"

    @property
    def group(self) -> str:
        """Names what the cell is compared with: all that has the same overlap and student."""
        return f"{self.overlap:g} {self.student}"

    @property
    def tags(self) -> dict[str, str]:
        """What MLflow's runs of this cell carry."""
        return {
            "cell": self.name,
            "overlap": f"{self.overlap:g}",
            "teacher": self.teacher,
            "student": self.student,
            "method": self.method,
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
    storage: Storage
    cells: tuple[Cell, ...]

    @property
    def places(self) -> tuple[Place, ...]:
        """The cells of the grid."""
        search = self.search
        return tuple(Place(*each) for each in itertools.product(search.overlaps, search.teachers, search.students))

    def at(self, place: Place) -> dict[str, Cell]:
        """What is compared in a cell of the grid, by method."""
        found = {
            cell.method: cell
            for cell in self.cells
            if (cell.overlap, cell.student) == (place.overlap, place.student)
            and cell.teacher in (place.teacher, NO_TEACHER)
        }
        return {method: found[method] for method in self.search.methods}

    def run_folder(self, cell: Cell, run: RunConfig) -> RunFolder:
        """The folder of a run of a cell, which need not exist."""
        return RunFolder(self.storage, self.storage.root / "runs" / run_key(run, cell.spaces, cell.data_digest))

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
            shape += [[name, getattr(search, _RENAMED.get(name, name), False)] for name in _SHAPING] + [
                [each.identity for each in self.cells]
            ]
        studies = {}
        for index, cell in enumerate(self.cells):
            studies[cell.name] = StudyPlan(
                key=cell.name,
                name=f"{search.experiment} {cell.name} {content_hash([*shape, cell.identity])}",
                run=cell.run,
                num_trials=search.trials,
                num_epochs=num_epochs_of(cell.run),
                source_cells=source_cells(cell, self.cells[:index]),
                group=cell.group,
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
        UserError: For anything the search would stumble over later.
    """
    for field_name, names in (("teachers", search.teachers), ("students", search.students)):
        for name in names:
            _validate_model(field_name, name)
    validate_source(search.run.data)
    methods = tuple(name_of(method) for method in search.methods)
    search = dataclasses.replace(search, run=_with_absolute_paths(search.run), methods=methods)
    storage = Storage.open(search.storage)
    cells: dict[str, Cell] = {}
    for overlap, teacher, student in itertools.product(search.overlaps, search.teachers, search.students):
        for method in search.methods:
            cell = _cell(search.run, method, overlap, teacher, student, storage)
            cells.setdefault(cell.name, cell)
    _require_different(list(cells.values()))
    _rehearse(list(cells.values()), storage)
    plan = Plan(search=search, storage=storage, cells=tuple(cells.values()))
    least = sum(num_epochs_of(each.run) for each in plan.cells)
    if search.max_epochs_total is not None and search.max_epochs_total < least:
        raise UserError(
            f"max_epochs_total must hold one whole trial of each of the {len(plan.cells)} studies, {least} epochs, "
            f"got {search.max_epochs_total}."
        )
    for overlap in search.overlaps:
        first = next(cell for cell in plan.cells if cell.overlap == overlap)
        verify_test_images(first.run, storage, first.spaces.student)
    return plan


def _cell(template: RunConfig, method: str, overlap: float, teacher: str, student: str, storage: Storage) -> Cell:
    place = dataclasses.replace(template, overlap=overlap, teacher=teacher, student=student)
    with blaming([name for _, name in named_by_user(dataclasses.replace(place, method=method, epochs=(1, 1)))]):
        run = run_of_method(place, method, template.epochs)
        default_point(run)
    task = load_task(run, storage)
    check_classes(run, task.spaces)
    return Cell(
        overlap=overlap,
        teacher=teacher if needs_teacher(run) else NO_TEACHER,
        student=student,
        run=run,
        spaces=task.spaces,
        data_digest=task.data_digest,
        num_validation_images=0 if task.validation is None else len(task.validation.labels),
    )


def run_of_method(template: RunConfig, method: str, epochs: tuple[int, int]) -> RunConfig:
    """A method's run: all methods train the same number of epochs, those with one stage all of them in it.

    Args:
        template: What all methods share; of its terms' settings the method takes its own.
        method: A name or composition.
        epochs: Epochs of both stages, of a method that has two.
    """
    own = epochs if has_embedding_stage(method) else (0, sum(epochs))
    return complete(with_own_code(dataclasses.replace(template, method=method, epochs=own)))


def _with_absolute_paths(run: RunConfig) -> RunConfig:
    """The same run for a worker, whose current folder is another."""
    kind, colon, path = run.data.partition(":")
    data = f"{kind}:{Path(path).expanduser().absolute()}" if colon else run.data
    is_named = run.class_order in NAMED_ORDERS
    order = run.class_order if is_named else str(Path(run.class_order).expanduser().absolute())
    return dataclasses.replace(run, data=data, class_order=order)


def _require_different(cells: list[Cell]) -> None:
    """Refuse the same study under two names, such as one file by two paths.

    Raises:
        UserError: Naming both.
    """
    names: dict[str, str] = {}
    for cell in cells:
        first = names.setdefault(cell.identity, cell.name)
        if first != cell.name:
            raise UserError(f"methods and networks must differ, but {first!r} and {cell.name!r} are the same.")


def _rehearse(cells: list[Cell], storage: Storage) -> None:
    """Try what may not fit together, code of the user's and feature maps of two networks, before anything is trained.

    Raises:
        UserError: A step cannot be taken.
    """
    tried = set()
    for cell in cells:
        for run in [pretraining_run(cell.run), cell.run] if needs_teacher(cell.run) else [cell.run]:
            what = run.method, cell.teacher, run.student
            on_maps = any("features" in stage.teacher_needs for stage in stages_of(run))
            if what not in tried and (on_maps or named_by_user(run)):
                rehearse(run, load_task(run, storage))
            tried.add(what)


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
