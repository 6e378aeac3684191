"""What a run's parts take: a few real steps of every kind, timed, from which the length of a search can be told.

Steps and validations are those of `training.loop`, on real images. Only the teacher is another: a network of its
architecture that has not been trained, which takes as long.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from refilled.config import BankConfig, RunConfig
from refilled.data.views import Views
from refilled.embedding_cache.bank import bank_for
from refilled.embedding_cache.site import BATCH_SIZE
from refilled.methods import StageName
from refilled.rehearsal import Steps, some_of, untrained_teacher
from refilled.stages import needs_teacher, stages_of
from refilled.storage.model_file import load_model
from refilled.storage.run_folder import RunFolder
from refilled.storage.tensor_file import save_tensors
from refilled.tasks.classification import Task, load_task
from refilled.teacher import FrozenTeacher, pretraining_run
from refilled.training.carrier import FolderCarrier
from refilled.training.compute import Compute
from refilled.training.evaluation import EVALUATION_BATCH_SIZE, accuracy, nearest_mean_accuracy
from refilled.training.learner import state_of_student

# What takes less than a block is repeated to fill one: a processor that others use too stops a step now and then, which
# adds up over a run but which the median of single steps would not see.
MOST_BLOCKS, BLOCK_S = 5, 0.05


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """What the parts of a run take one worker, in seconds; 0 for what its method does not do.

    A step's seconds are those of one batch, from drawing it to the new weights.
    """

    embedding_bank_s: float
    """A step of stage embedding, the teacher looked up."""
    embedding_live_s: float
    """The same, the teacher running."""
    classifier_bank_s: float
    """A step of stage classifier, the teacher, if any, looked up."""
    classifier_live_s: float
    """The same, the teacher, if any, running."""
    pretraining_s: float
    """A vanilla step of the teacher's architecture on the teacher's batch."""
    accuracy_s: float
    """Validation by the student's own classifier, for one image."""
    nearest_mean_s: float
    """Validation by the nearest class mean, for one image that a mean is made of or that is judged."""
    teacher_s: float
    """The teacher's embedding of one view."""
    epoch_s: float
    """What an epoch takes beside steps and validation: its checkpoint and its row."""
    run_s: float
    """What a run takes beside its epochs: images, networks, files."""
    alone: float
    """What a step takes while no other process measures, over what it takes beside them; 1 where that was not timed."""
    peak_bytes: int
    """Most memory that a run's tensors take on its GPU, bank and images included; 0 on a CPU."""
    total_bytes: int
    """Memory of that GPU; 0 on a CPU."""


def measure(
    config: RunConfig,
    storage: Path,
    compute: Compute,
    *,
    budget_s: float = 3.0,
    start_together: Callable[[], None] = lambda: None,
    others_measure: Callable[[], bool] = lambda: False,
    then_alone: bool = False,
) -> StepTimes:
    """Time the parts of a run on this process; what is written meanwhile is gone afterwards.

    Args:
        config: of the run.
        storage: the search's folder, for decoded images, and to write where runs write.
        compute: device and precision.
        budget_s: seconds to spend on steps; some of every kind are timed however long they take.
        start_together: called when everything is warm, before anything is timed; may wait for other processes.
        others_measure: while it says so steps go on after the last timed one, so that others are timed beside them.
        then_alone: time a step once more when the others have ended.
    """
    (storage / "timings").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=storage / "timings", prefix=".") as folder:
        measurement = _Measurement(config, load_task(config, storage / "cache"), Path(folder), compute, budget_s / 6)
        measurement.warm_up()
        start_together()
        times = measurement.times(functools.partial(load_task, config, storage / "cache"))
        while others_measure():
            measurement.step()
        alone = measurement.alone(times) if then_alone else 1.0
        return dataclasses.replace(times, alone=alone)


class _Measurement:
    """The networks and images that are timed, by at most `budget_s` seconds for every kind of step."""

    def __init__(self, config: RunConfig, whole: Task, folder: Path, compute: Compute, budget_s: float) -> None:
        self._given, self._whole, self._folder, self._compute, self._budget_s = config, whole, folder, compute, budget_s
        self._task = some_of(whole, config.global_batch_size)
        # A bank of the fewest views that make one of its own batches; rendering takes the same for few views and many.
        num_views = min(config.views.most, math.ceil(BATCH_SIZE / len(self._task.train)))
        views = dataclasses.replace(config.views, num_views=num_views)
        self._config = dataclasses.replace(config, views=views, bank=BankConfig(mode="bank", dtype=config.bank.dtype))
        self._live: FrozenTeacher | None = None
        self._banked: FrozenTeacher | None = None
        if needs_teacher(config):
            # The same network twice: one is going to be looked up in a bank.
            self._live, self._banked = (untrained_teacher(self._config, self._task, compute) for _ in range(2))
        self._names = [stage.name for stage in stages_of(config)]

    def warm_up(self) -> None:
        """Take a process's first step, during which torch loads and compiles parts of itself."""
        if self._compute.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._compute.device)
        self.step = self._stage(self._names[0], self._live)
        self.step()

    def times(self, load: Callable[[], object]) -> StepTimes:
        """Time everything; `load` finds the images again."""
        if self._banked is not None:
            self._banked.bank = bank_for(self._config, self._task, self._banked, self._folder, self._compute)
        steps: dict[tuple[str, str], float] = {}
        for stage in stages_of(self._config):
            name = stage.name
            self.step = self._stage(name, self._banked)
            steps[name, "bank"] = self._median_s(self.step)
            live = self._live is not None and stage.needs_teacher
            steps[name, "live"] = self._median_s(self._stage(name, self._live)) if live else steps[name, "bank"]
        accuracy_s, nearest_mean_s = self._validation_s()
        return StepTimes(
            embedding_bank_s=steps.get(("embedding", "bank"), 0.0),
            embedding_live_s=steps.get(("embedding", "live"), 0.0),
            classifier_bank_s=steps["classifier", "bank"],
            classifier_live_s=steps["classifier", "live"],
            pretraining_s=self._pretraining_s(),
            accuracy_s=accuracy_s,
            nearest_mean_s=nearest_mean_s,
            teacher_s=self._teacher_s(),
            epoch_s=self._epoch_s(self.step),
            run_s=self._run_s(load),
            alone=1.0,
            peak_bytes=self._peak_bytes(),
            total_bytes=self._total_bytes(),
        )

    def alone(self, times: StepTimes) -> float:
        """A step of stage classifier now, over the same in `times`; at most 1, as company speeds nothing up."""
        return min(1.0, self._median_s(self.step, warm=True) / times.classifier_bank_s)

    def _stage(self, name: StageName, teacher: FrozenTeacher | None) -> Steps:
        return Steps(self._config, self._task, teacher, self._compute, name)

    def _pretraining_s(self) -> float:
        if self._live is None:
            return 0.0
        config = pretraining_run(self._config)
        task = some_of(self._whole, config.global_batch_size)
        return self._median_s(Steps(config, task, None, self._compute, "classifier"))

    def _teacher_s(self) -> float:
        """As a bank is filled: render, normalise, forward."""
        if self._live is None:
            return 0.0
        views, images = Views(self._config.views), self._task.train.images.to(self._compute.device)
        image_ids = torch.arange(BATCH_SIZE, device=self._compute.device) % len(images)
        view_ids = views.draw(image_ids, seed=0, epoch=0)

        def embed() -> None:
            assert self._live is not None
            rendered = views.render(images[image_ids], view_ids)
            placed = self._compute.place_images(rendered, self._task.normalization)
            self._live.embed(placed, image_ids, view_ids)

        return self._median_s(embed, warm=True) / BATCH_SIZE

    def _validation_s(self) -> tuple[float, float]:
        """By the classifier and by the nearest class mean, for one image."""
        student, normalization, compute = self.step.student, self._task.normalization, self._compute
        some = some_of(self._whole, EVALUATION_BATCH_SIZE).train
        by_head_s = self._median_s(lambda: accuracy(student, some, normalization, compute))
        means = torch.ones(len(some.class_names), student.embedding_dim, device=compute.device, dtype=compute.dtype)
        by_mean_s = self._median_s(
            lambda: nearest_mean_accuracy(student, some, means, normalization, compute), warm=True
        )
        return by_head_s / len(some), by_mean_s / len(some)

    def _epoch_s(self, step: Steps) -> float:
        """Checkpoint and row, as a run leaves them in its folder."""
        carrier = FolderCarrier(RunFolder(self._folder / "run"))
        self._create()
        epochs = itertools.count(1)

        def write() -> None:
            row = {"epoch": next(epochs)}
            carrier.save(step.state([row]))
            carrier.report(row)

        return self._median_s(write, warm=True)

    def _run_s(self, load: Callable[[], object]) -> float:
        """Find images, build the student, load the teacher, create and finish the run's folder."""
        teacher = self._folder / "teacher.pt"
        if self._live is not None:
            pretraining = pretraining_run(self._config)
            student = Steps(pretraining, self._task, None, self._compute, "classifier").student
            save_tensors(teacher, state_of_student(pretraining, self._task, student))

        def surround() -> None:
            load()
            step = self._stage("classifier", self._live)
            self._create()
            if teacher.exists():
                self._compute.place_model(load_model(teacher))
            RunFolder(self._folder / "run").finish({}, state_of_student(self._config, self._task, step.student))

        return self._median_s(surround, warm=True)

    def _create(self) -> None:
        RunFolder(self._folder / "run").create(self._config.to_dict(), self._task.spaces.student)

    def _peak_bytes(self) -> int:
        if self._compute.device.type != "cuda":
            return 0
        peak = torch.cuda.max_memory_allocated(self._compute.device)
        rest = len(self._whole.train) - len(self._task.train)
        peak += rest * math.prod(self._whole.train.images.shape[1:])
        if self._live is not None and self._given.bank.mode != "live":
            num_views = len(Views(self._given.views).view_ids)
            size = getattr(torch, self._given.bank.dtype).itemsize
            bank = len(self._whole.train) * num_views * self._live.embedding_dim * size
            peak += bank if 3 * bank <= self._total_bytes() else 0  # else its rows stay on the host
        return int(peak)

    def _total_bytes(self) -> int:
        if self._compute.device.type != "cuda":
            return 0
        return int(torch.cuda.get_device_properties(self._compute.device).total_memory)

    def _block_s(self, action: Callable[[], object], *, least_s: float = BLOCK_S) -> tuple[float, int]:
        """Seconds of as many calls as fill a block, and their number."""
        on_device = self._compute.device.type == "cuda"
        count, started_s = 0, time.perf_counter()
        while not count or time.perf_counter() - started_s < least_s:
            action()
            count += 1
            if on_device:
                torch.cuda.synchronize(self._compute.device)
        return time.perf_counter() - started_s, count

    def _median_s(self, action: Callable[[], object], *, warm: bool = False) -> float:
        """Median seconds of a call over a few blocks, of one at least; where nothing like it has run, after a call."""
        spent_s = 0.0 if warm else self._block_s(action, least_s=0.0)[0]
        means: list[float] = []
        while not means or (len(means) < MOST_BLOCKS and spent_s < self._budget_s):
            block_s, count = self._block_s(action)
            spent_s += block_s
            means.append(block_s / count)
        return statistics.median(means)
