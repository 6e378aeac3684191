"""What a search will do, worked out and checked before anything runs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from refilled.brought import with_stored_weights
from refilled.config import RunConfig, SearchConfig, content_hash
from refilled.data.label_space import NAMED_ORDERS
from refilled.data.sources import validate_source
from refilled.errors import UserError
from refilled.export import require_packages
from refilled.given_spaces import measured, remarks
from refilled.identity import run_key
from refilled.methods import NO_TEACHER, has_embedding_stage, name_of
from refilled.models import validate_model_name
from refilled.models.exact import require_exact
from refilled.networks import build_network, image_shape, require_kept_whole, size_of
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
from tune.studies.cells import Cell, Place
from tune.studies.space import default_point
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
        grid = itertools.product(search.overlaps, search.teachers, search.students, _numbers_of_images(search))
        return tuple(Place(*each) for each in grid)

    @property
    def remarks(self) -> list[str]:
        """What is taken for granted of a teacher that is brought or of label spaces that are given, for people."""
        first = next((cell for cell in self.cells if cell.teacher != NO_TEACHER), self.cells[0])
        return remarks(first.run, self.storage)

    def at(self, place: Place) -> dict[str, Cell]:
        """What is compared in a cell of the grid, by method."""
        found = {
            cell.method: cell
            for cell in self.cells
            if cell.place._replace(teacher=place.teacher) == place and cell.teacher in (place.teacher, NO_TEACHER)
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
    for source in (search.run.data, search.run.teacher_data):
        if source is not None:
            validate_source(source)
    require_packages(search.export)
    methods = tuple(name_of(method) for method in search.methods)
    search = dataclasses.replace(search, run=_with_absolute_paths(search.run), methods=methods)
    storage = Storage.open(search.storage)
    if search.run.is_explicit:
        search = measured(search, storage)
    cells: dict[str, Cell] = {}
    grid = itertools.product(search.overlaps, search.teachers, search.students, _numbers_of_images(search))
    for place in (Place(*each) for each in grid):
        for method in search.methods:
            cell = _cell(search.run, method, place, storage)
            cells.setdefault(cell.name, cell)
    _require_different(list(cells.values()))
    if search.workers_per_trial > 1:
        require_exact_networks(list(cells.values()), storage, search.workers_per_trial)
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


def _numbers_of_images(search: SearchConfig) -> tuple[int | None, ...]:
    return tuple(None if each == "all" else int(each) for each in search.images_per_class)


def _cell(template: RunConfig, method: str, place: Place, storage: Storage) -> Cell:
    run = dataclasses.replace(template, **place._asdict())
    with blaming([name for _, name in named_by_user(dataclasses.replace(run, method=method, epochs=(1, 1)))]):
        run = run_of_method(run, method, template.epochs)
        default_point(run)
        task = load_task(run, storage)
        check_classes(run, task.spaces)
        run = with_stored_weights(run, task, storage)
        of_teacher = task.spaces.teacher_digest or None
        run = dataclasses.replace(run, data_digest=task.data_digest, teacher_data_digest=of_teacher)
        require_kept_whole(run, "student", task)
        if needs_teacher(run):
            require_kept_whole(run, "teacher", task)
        return Cell(
            overlap=place.overlap,
            teacher=place.teacher if needs_teacher(run) else NO_TEACHER,
            student=place.student,
            run=run,
            spaces=task.spaces,
            data_digest=task.data_digest,
            num_validation_images=0 if task.validation is None else len(task.validation.labels),
            teacher_size=size_of(run, "teacher", task) if needs_teacher(run) else None,
            student_size=size_of(run, "student", task),
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
    kind, colon, path = (run.teacher_data or "").partition(":")
    teacher_data = f"{kind}:{Path(path).expanduser().absolute()}" if colon else run.teacher_data
    is_named = run.class_order in NAMED_ORDERS
    order = run.class_order if is_named else str(Path(run.class_order).expanduser().absolute())
    return dataclasses.replace(run, data=data, teacher_data=teacher_data, class_order=order)


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
        for run in _with_its_teachers(cell):
            what = run.method, cell.teacher, run.student
            on_maps = any("features" in stage.teacher_needs for stage in stages_of(run))
            asks_brought = run.teacher_weights is not None and needs_teacher(run)
            is_others = ":" in run.student or (":" in run.teacher and needs_teacher(run))
            if what not in tried and (on_maps or asks_brought or is_others or named_by_user(run)):
                rehearse(run, load_task(run, storage), storage)
            tried.add(what)


def _with_its_teachers(cell: Cell) -> list[RunConfig]:
    """A cell's run, after the run that pre-trains its teacher if it has one."""
    is_pretrained = needs_teacher(cell.run) and cell.run.teacher_weights is None
    return [pretraining_run(cell.run), cell.run] if is_pretrained else [cell.run]


def require_exact_networks(cells: Sequence[Cell], storage: Storage, num_workers: int) -> None:
    """Refuse networks whose training on several workers would not be that on one, before anything is trained.

    Raises:
        UserError: Naming the network and what in it depends on the workers.
    """
    tried = set()
    for run in (run for cell in cells for run in _with_its_teachers(cell)):
        if run.student not in tried:
            tried.add(run.student)
            task = load_task(run, storage)
            network = build_network(run, "student", task, num_classes=2, dropout=run.optimizer.dropout)
            require_exact(network, run.student, image_shape("student", task), num_workers)


def _validate_model(field_name: str, name: str) -> None:
    try:
        validate_model_name(name)
    except UserError as error:
        raise UserError(f"{field_name}: {error}") from error
