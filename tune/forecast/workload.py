"""The runs of a search as work with a length: what each trains, and what that takes by the timings."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING

from refilled.config import RunConfig
from refilled.data.batches import num_batches
from refilled.data.views import Views
from refilled.embedding_cache.rows import BankFormat
from refilled.embedding_cache.site import bank_pays, epochs_with_teacher
from refilled.execution import cache_of
from refilled.methods import VANILLA, has_embedding_stage
from refilled.models import build_model
from refilled.stages import needs_teacher, num_epochs_of, stages_of
from refilled.tasks.classification import load_task
from refilled.teacher import pretraining_run, teacher_folder
from tune.backend.cluster import Resources
from tune.forecast.measure import Timings, kind_of
from tune.forecast.simulate import Work

if TYPE_CHECKING:
    from refilled.timing import StepTimes
    from tune.plan import Cell, Plan

# Seconds that Tune and the driver's stores take, seen on two cores: between two trials of a slot, and for a row.
TRIAL_S, ROW_S = 0.15, 0.012
# The same with a new Ray Train group for every trial (and what is between two jobs there).
GROUP_TRIAL_S, GROUP_ROW_S = 12.0, 0.2
JOB_S = 0.05  # between two jobs of a slot
TEST_SHARE = 0.2  # a test part's size over its training part's: no forecast looks at it


class Workload:
    """A plan's teachers, trials and refits as `Work`."""

    def __init__(self, plan: Plan, resources: Resources, timings: Timings) -> None:
        self._plan, self._resources, self._timings = plan, resources, timings
        self._with_groups = plan.search.trial_backend == "torch_trainer"
        self._sizes: dict[float, tuple[int, int, int]] = {}

    def teachers(self, *, on_all: bool) -> list[Work]:
        """What is left of the different teachers, those of the trials or those of the refits."""
        works: dict[str, Work] = {}
        for cell in self._plan.cells:
            if not needs_teacher(cell.run):
                continue
            run = dataclasses.replace(cell.run, val_fraction=0.0) if on_all else cell.run
            folder = teacher_folder(run, self._plan.storage)
            if folder.result() is None:
                works[folder.path.name] = self._teacher(cell, run, on_all, len(folder.rows()))
        return [self._with_company(work, len(works)) for work in works.values()]

    def _with_company(self, work: Work, count: int) -> Work:
        """Timings are of full slots; of `count` jobs side by side, where that is fewer, each takes less."""
        slots = max(1, self._resources.slots_now)
        alone = statistics.mean(times.alone for times in self._timings.kinds.values())
        factor = 1.0 if count >= slots else alone + (1.0 - alone) * (count - 1) / (slots - 1)
        stages = tuple((epochs, factor * bank_s, factor * live_s) for epochs, bank_s, live_s in work.stages)
        return dataclasses.replace(work, stages=stages)

    def trial(self, cell: Cell) -> Work:
        """One whole trial of a cell."""
        search = self._plan.search
        is_group = self._with_groups
        return self._run(
            cell,
            cell.run,
            on_all=False,
            num_sharing_runs=self._plan.num_sharing_runs(search.trials),
            fixed_s=GROUP_TRIAL_S if is_group else TRIAL_S,
            row_s=GROUP_ROW_S if is_group else ROW_S,
        )

    def refits(self) -> list[Work]:
        """All refits, in their order: of winners, and of vanilla students with the classifier stage's epochs alone."""
        search, works = self._plan.search, list[Work]()
        has_two = any(has_embedding_stage(method) for method in search.methods)
        for cell in self._plan.cells:
            variants = [cell.run]
            if cell.method == VANILLA and has_two:
                variants.append(dataclasses.replace(cell.run, epochs=(0, search.run.epochs[1])))
            works += [self._refit(cell, run) for run in variants for _ in range(search.seeds)]
        return works

    def _refit(self, cell: Cell, run: RunConfig) -> Work:
        search, times = self._plan.search, self._times(cell)
        train, held_out, _ = self._images(cell)
        group_s = GROUP_TRIAL_S if self._resources.num_workers > 1 else 0.0
        return self._run(
            cell,
            run,
            on_all=True,
            num_sharing_runs=self._plan.num_sharing_runs(search.seeds),
            fixed_s=JOB_S + group_s + TEST_SHARE * (train + held_out) * times.accuracy_s / self._resources.num_workers,
            row_s=0.0,
        )

    def _run(
        self, cell: Cell, run: RunConfig, *, on_all: bool, num_sharing_runs: int, fixed_s: float, row_s: float
    ) -> Work:
        times, workers = self._times(cell), self._resources.num_workers
        train, validation, means_of = self._images(cell)
        if on_all:
            train, validation = train + validation, 0
        steps = num_batches(train, run.global_batch_size)
        stages = []
        for stage in stages_of(run):
            if stage.name == "embedding":
                bank_s, live_s = times.embedding_bank_s, times.embedding_live_s
                validation_s = (validation + means_of) * times.nearest_mean_s if validation else 0.0
            else:
                bank_s, live_s = times.classifier_bank_s, times.classifier_live_s
                validation_s = validation * times.accuracy_s
            beside_s = validation_s / workers + times.epoch_s + row_s
            if not stage.is_cacheable:  # no teacher, or one that no bank can stand for; both are timed as what they do
                bank_s = live_s = max(bank_s, live_s)
            stages.append((stage.num_epochs, steps * bank_s + beside_s, steps * live_s + beside_s))
        work = Work(stages=tuple(stages), fixed_s=times.run_s + fixed_s)
        if not needs_teacher(run):
            return work
        num_views = len(Views(run.views).view_ids)
        has_bank = (
            run.bank.mode != "live" and epochs_with_teacher(run) > 0 and self._bank_fits(cell, run, train, num_views)
        )
        has_bank = has_bank and (run.bank.mode == "bank" or bank_pays(run, num_views, num_sharing_runs))
        return dataclasses.replace(
            work,
            shares=f"{cell.overlap} {cell.teacher} {on_all}",
            prototypes_s=train * times.teacher_s / workers,
            bank_s=train * num_views * times.teacher_s / workers if has_bank else None,
            waits=run.bank.mode == "bank",
        )

    def _teacher(self, cell: Cell, run: RunConfig, on_all: bool, epochs_done: int) -> Work:
        times, pretraining, workers = self._times(cell), pretraining_run(run), self._resources.num_workers
        train, validation, _ = self._images(cell, pretraining=True)
        if on_all:
            train, validation = train + validation, 0
        epoch_s = num_batches(train, pretraining.global_batch_size) * times.pretraining_s
        epoch_s += validation * times.teacher_s / workers + times.epoch_s
        left = max(0, num_epochs_of(pretraining) - epochs_done)
        return Work(stages=((left, epoch_s, epoch_s),), fixed_s=times.run_s + (GROUP_TRIAL_S if workers > 1 else 0.0))

    def _images(self, cell: Cell, *, pretraining: bool = False) -> tuple[int, int, int]:
        """Images to train on, held out, and in the class means of stage embedding's validation."""
        key = -1.0 if pretraining else cell.overlap
        if key not in self._sizes:
            run = pretraining_run(cell.run) if pretraining else cell.run
            task = load_task(run, cache_of(self._plan.storage))
            means_of = int(task.train.labels.bincount().clamp(max=cell.run.ncm_images_per_class).sum())
            self._sizes[key] = len(task.train), len(task.validation or ()), means_of
        return self._sizes[key]

    def _bank_fits(self, cell: Cell, run: RunConfig, num_images: int, num_views: int) -> bool:
        task = load_task(cell.run, cache_of(self._plan.storage))
        channels, size, _ = task.train.images.shape[1:]
        model = build_model(
            run.teacher, num_classes=2, in_channels=channels, image_size=size, seed=0, sources=run.sources
        )
        return BankFormat(num_images, num_views, model.embedding_dim, run.bank.dtype).num_bytes <= run.bank.max_bytes

    def _times(self, cell: Cell) -> StepTimes:
        return self._timings.kinds[kind_of(cell)]
