"""The runs of a search as what they do how often: steps, evaluations, checkpoints."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from refilled.config import RunConfig
from refilled.data.batches import num_batches
from refilled.data.views import Views
from refilled.embedding_cache import layout_of
from refilled.methods import VANILLA, has_embedding_stage
from refilled.shared_caches import cache_name, pays, shared_caches
from refilled.stages import Stage, needs_teacher, num_epochs_of, stages_of
from refilled.tasks.classification import load_task
from refilled.teacher import pretraining_run, teacher_folder
from refilled.timing import Part, embedding_dim_of, epoch_part, image_part, step_part, teacher_part
from tune.plan import Plan
from tune.studies.cells import Cell

TEST_SHARE = 0.2  # a test part's size over its training part's, as in CIFAR-100: no forecast looks at it
Calls = Mapping[Part, float]


@dataclass(frozen=True)
class Work:
    """One run, or what several share: its epochs, and how often it does every part."""

    num_epochs: int
    calls: Calls


def total(calls: Iterable[tuple[float, Calls]]) -> Calls:
    """The sum of calls, each so many times."""
    found = defaultdict[Part, float](float)
    for times, each in calls:
        for part, count in each.items():
            found[part] += times * count
    return dict(found)


class Workload:
    """A plan's teachers, trials and refits, and what runs share, as `Work`."""

    def __init__(self, plan: Plan, num_workers: int, done: Collection[str] = ()) -> None:
        """Of runs on so many workers each, without the refits of cells in which all is done, by their names."""
        self._plan, self._num_workers = plan, num_workers
        self.to_refit = [cell for cell in plan.cells if cell.name not in done]
        self._sizes: dict[object, tuple[int, int, int]] = {}
        self._caches: dict[bool, set[str | None]] = {}

    def calls(self) -> Calls:
        """How often the whole search does every part, trials being whole."""
        works = [each for on_all in (False, True) for each in self.teachers(on_all) + self.shared(on_all)]
        trials = [(self._plan.search.trials, self.trial(cell).calls) for cell in self._plan.cells]
        return total([*trials, *((1, work.calls) for work in works + self.refits())])

    def teachers(self, on_all: bool) -> list[Work]:
        """What is left of the different teachers, those of the trials or, on all images, those of the refits."""
        works: dict[str, Work] = {}
        for cell in self._asking(on_all):
            run = _on_all(cell.run) if on_all else cell.run
            if run.teacher_weights is not None:
                continue
            folder, pretraining = teacher_folder(run, self._plan.storage), pretraining_run(run)
            if folder.result() is None:
                left = max(0, num_epochs_of(pretraining) - len(folder.rows()))
                work = self._run(dataclasses.replace(pretraining, epochs=(0, left)))
                works[folder.path.name] = work
        return list(works.values())

    def trial(self, cell: Cell) -> Work:
        """One whole trial of a cell."""
        return self._run(cell.run)

    def refits(self) -> list[Work]:
        """All refits, in their order: of winners, and of vanilla students with the classifier stage's epochs alone."""
        search, works = self._plan.search, list[Work]()
        has_two = any(has_embedding_stage(method) for method in search.methods)
        for cell in self.to_refit:
            variants = [_on_all(cell.run)]
            if cell.method == VANILLA and has_two:
                variants.append(dataclasses.replace(variants[0], epochs=(0, search.run.epochs[1])))
            for run in variants:
                work = self._run(run)
                tested = {image_part(self._share(run)): TEST_SHARE * self._images(run)[0] / self._num_workers}
                works += [Work(work.num_epochs, total([(1, work.calls), (1, tested)]))] * search.seeds
        return works

    def shared(self, on_all: bool) -> list[Work]:
        """The teacher's passes over the images for prototypes and caches, made once for all runs of an overlap."""
        found: dict[tuple[str, float, int | None], Work] = {}
        for cell in self._asking(on_all):
            run = _on_all(cell.run) if on_all else cell.run
            has_cache = self._has_cache(run)
            key, passes = (cell.teacher, cell.overlap, cell.images_per_class), 1 + has_cache * _num_views(run)
            work = Work(0, total([(passes, self._teacher_pass(run))]))
            if key not in found or has_cache:
                found[key] = work
        return list(found.values())

    def _asking(self, on_all: bool) -> Iterable[Cell]:
        return (cell for cell in (self.to_refit if on_all else self._plan.cells) if needs_teacher(cell.run))

    def an_epoch(self, cell: Cell) -> dict[str, Calls]:
        """How often an epoch of a cell's trials does every part up to its row, by stage."""
        return {stage.name: self._epoch(cell.run, stage) for stage in stages_of(cell.run)}

    def _run(self, run: RunConfig) -> Work:
        num_epochs, ends = num_epochs_of(run), {epoch_part(self._share(run)): 1}
        epochs = [(stage.num_epochs, self._epoch(run, stage)) for stage in stages_of(run)]
        return Work(num_epochs, total([*epochs, (num_epochs, ends)]))

    def _epoch(self, run: RunConfig, stage: Stage) -> Calls:
        """One epoch's calls on one worker."""
        train, validation, means_of = self._images(run)
        judged = validation and validation + (means_of if stage.validates_by == "nearest_mean" else 0)
        share = self._share(run)
        steps = {step_part(share, stage): num_batches(train, run.global_batch_size)}
        live = self._teacher_pass(run) if stage.is_cacheable and not self._has_cache(run) else {}
        return total([(1, steps), (judged / self._num_workers, {image_part(share): 1}), (1, live)])

    def _teacher_pass(self, run: RunConfig) -> Calls:
        """The teacher's forward passes over all images."""
        part = teacher_part(run) if run.teacher_weights is not None else image_part(self._share(pretraining_run(run)))
        return {part: self._images(run)[0] / self._num_workers}

    def _share(self, run: RunConfig) -> RunConfig:
        """The run with one worker's share of its batches, as if it were the whole."""
        return dataclasses.replace(run, global_batch_size=max(2, run.global_batch_size // self._num_workers))

    def _images(self, run: RunConfig) -> tuple[int, int, int]:
        """Images to train on, held out, and in the class means of stage embedding's validation."""
        split = dataclasses.replace(run, val_fraction=self._plan.search.run.val_fraction)
        key = (run.overlap, run.num_student_classes, run.images_per_class)
        if key not in self._sizes:
            task = load_task(split, self._plan.storage)
            means_of = int(task.train.labels.bincount().clamp(max=run.ncm_images_per_class).sum())
            self._sizes[key] = len(task.train), len(task.validation or ()), means_of
        train, validation, means_of = self._sizes[key]
        return (train, validation, means_of) if run.val_fraction else (train + validation, 0, 0)

    def _has_cache(self, run: RunConfig) -> bool:
        """Whether the search computes a cache of the teacher's embeddings that the run uses."""
        on_all = not run.val_fraction
        if on_all not in self._caches:
            search = self._plan.search
            runs = [(_on_all(cell.run) if on_all else cell.run) for cell in self._plan.cells]
            count = search.seeds if on_all else search.trials
            caches = shared_caches([(each, count) for each in runs], self._plan.storage)
            self._caches[on_all] = {
                name for name, each in caches.items() if pays(each.run, each.epochs) and self._fits(each.run)
            }
        return cache_name(run, self._plan.storage) in self._caches[on_all]

    def _fits(self, run: RunConfig) -> bool:
        task = load_task(run, self._plan.storage)
        return layout_of(run, task, embedding_dim_of(run, task)).num_bytes <= run.embedding_cache.max_bytes


def _num_views(run: RunConfig) -> int:
    return len(Views(run.views).view_ids)


def _on_all(run: RunConfig) -> RunConfig:
    """The run on all images, without validation."""
    return dataclasses.replace(run, val_fraction=0.0)
