"""What the parts of runs take: a few real steps of every stage, timed, from which the length of a search can be told.

Steps and evaluations are those of `refilled.training`, on real images. Only the teacher is another: a network of its
architecture that has not been trained, which takes as long.

A part is timed once for all runs that have it. Steps of a stage that asks the teacher for embeddings alone are timed
with these at hand, as from a cache: with the teacher live they take its forward pass of the batch in addition, which is
a part of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from refilled.config import RunConfig, content_hash
from refilled.data.views import Views
from refilled.methods import VANILLA, StageName
from refilled.metrics import EpochMetrics
from refilled.networks import Role, size_of
from refilled.rehearsal import Steps, some_of, untrained_teacher
from refilled.stages import Stage, needs_teacher, stages_of
from refilled.storage import Storage
from refilled.storage.run_folder import RunFolder
from refilled.tasks.classification import Task, load_task
from refilled.training.compute import Compute
from refilled.training.evaluation import EVALUATION_BATCH_SIZE, accuracy
from refilled.training.learner import make_learner

Kind = Literal["step", "image", "teacher", "epoch"]
BLOCKS = 5  # of calls, whose median is taken: a processor that others use too stops a call now and then
# What changes no step's time. Overlaps differ in which classes there are, not in how many.
_UNTIMED = (
    *("overlap", "val_fraction", "ncm_images_per_class", "seed", "split_seed", "epochs", "teacher_epochs"),
    *("checkpoint_every", "pretraining", "embedding_cache"),
)


@dataclass(frozen=True)
class Part:
    """Something that runs do over and over; parts with the same key take the same time.

    Attributes:
        key: Hash of all that its time depends on within a kind of machine.
        name: For people.
        kind: A step of a stage, the evaluation of one image, or an epoch's checkpoint and row.
        run: A run that has it.
        stage: The step's.
        images: Images that one call takes through the student's network.
    """

    key: str
    name: str = field(compare=False)
    kind: Kind = field(compare=False)
    run: RunConfig = field(compare=False)
    stage: StageName | None = field(default=None, compare=False)
    images: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Timed:
    """What a part takes.

    Attributes:
        seconds: Of one call.
        peak_bytes: Most memory of a run that has the part on its GPU, all images and the cache included; 0 on a CPU.
        total_bytes: Memory of that GPU; 0 on a CPU.
    """

    seconds: float
    peak_bytes: int = 0
    total_bytes: int = 0


def step_part(run: RunConfig, stage: Stage) -> Part:
    """A step of a stage, with the teacher live where a cache does not have all that is asked of it."""
    source = f", teacher {run.teacher} live" if _is_live(stage) else ", teacher cached" if stage.needs_teacher else ""
    terms = "+".join(term.name for term in stage.terms)
    name = f"{run.student} on {run.global_batch_size} images, stage {stage.name} ({terms}){source}"
    return _part(run, "step", name, run.global_batch_size, stage)


def image_part(run: RunConfig) -> Part:
    """The student's network forward, for one image."""
    return _part(run, "image", f"{run.student}, evaluation", 1)


def teacher_part(run: RunConfig) -> Part:
    """The forward pass of a teacher that is brought, for one image as it sees it."""
    return _part(run, "teacher", f"{run.teacher}, forward pass", 1)


def epoch_part(run: RunConfig) -> Part:
    """The checkpoint and the row of an epoch, those of the student's network alone."""
    return _part(run, "epoch", f"{run.student}, checkpoint", 0)


def _part(run: RunConfig, kind: Kind, name: str, images: int, stage: Stage | None = None) -> Part:
    terms = [term.name for term in stage.terms] if stage else []
    asks = stage is not None and stage.needs_teacher
    what = run.to_dict() | dict.fromkeys(_UNTIMED)
    what |= {"method": terms, "terms": {term: run.terms.of(term) for term in terms}}
    what |= {"teacher": run.teacher if asks or kind == "teacher" else None}
    if not (asks or kind == "teacher"):
        what |= {name: None for name in what if name.startswith("teacher_")}
    if kind == "teacher":
        what |= {name: None for name in what if name == "student" or name.startswith("student_")}
    what |= dict.fromkeys(("teacher_weights", "teacher_classes", "teacher_data", "student_weights"))
    what |= {"student_classes": None, "images_per_class": None}
    if not stage:
        run, what = dataclasses.replace(run, method=VANILLA), what | {"embedding": None, "classifier": None}
    stage_name = stage.name if stage else None
    return Part(content_hash([kind, stage_name, what]), name, kind, run, stage_name, images)


def work_of(part: Part, task: Task) -> float:
    """What one call computes, in images times parameters that they meet; a step takes three times its forward pass."""
    run, stage = part.run, _stage_of(part)
    if part.kind == "teacher":
        return part.images * _num_parameters(run, "teacher", task)
    student = _num_parameters(run, "student", task)
    if stage is None:
        return part.images * student
    teacher = _num_parameters(run, "teacher", task) if _is_live(stage) else 0
    return part.images * (3.0 * student + teacher)


def _num_parameters(run: RunConfig, role: Role, task: Task) -> int:
    return size_of(run, role, task).num_parameters


def _stage_of(part: Part) -> Stage | None:
    return next((stage for stage in stages_of(part.run) if stage.name == part.stage), None)


def _is_live(stage: Stage) -> bool:
    """Whether it asks the teacher for what no cache has."""
    return stage.needs_teacher and not stage.is_cacheable


def time_part(part: Part, storage: Storage, compute: Compute, *, seconds: float) -> Timed:
    """Time one part on this process; what is written meanwhile is gone afterwards.

    Args:
        part: What is timed.
        storage: The search's, for decoded images, and to write where runs write.
        compute: Device and precision.
        seconds: To spend on calls; one is timed however long it takes.
    """
    whole = load_task(part.run, storage)
    if compute.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(compute.device)
    with tempfile.TemporaryDirectory(dir=storage.root, prefix=".timing-") as folder:
        action, calls = _action(part, whole, RunFolder(storage, Path(folder) / "run"), compute)
        took_s = _median_s(action, compute, seconds, must_warm=part.run.compile or compute.device.type == "cuda")
    if compute.device.type != "cuda":
        return Timed(took_s / calls)
    total_bytes = int(torch.cuda.get_device_properties(compute.device).total_memory)
    return Timed(took_s / calls, _peak_bytes(part.run, whole, compute, total_bytes), total_bytes)


def _action(part: Part, whole: Task, folder: RunFolder, compute: Compute) -> tuple[Callable[[], object], int]:
    """What to do, and how many of the part's calls it is."""
    run = part.run
    task = some_of(whole, run.global_batch_size)
    if part.kind == "image":
        # On a GPU a whole evaluation batch, which fills it; on a CPU an image takes the same in any batch.
        count = EVALUATION_BATCH_SIZE if compute.device.type == "cuda" else min(EVALUATION_BATCH_SIZE, len(task.train))
        images = some_of(whole, count).train
        student = make_learner(run, task, None, compute).student
        return lambda: accuracy(student, images, task.normalization, compute), len(images)
    if part.kind == "teacher":
        asked = untrained_teacher(run, task, compute)
        ids = torch.arange(len(task.train), device=compute.device)
        plain = torch.full_like(ids, Views(run.views).plain)
        return lambda: asked.embed_live(asked.images(ids, plain)), len(ids)
    if part.kind == "epoch":  # a step, of whatever size, gives the optimizer the state that a checkpoint holds
        run = dataclasses.replace(run, global_batch_size=2)
    stage = _stage_of(part)
    teacher = untrained_teacher(run, task, compute) if stage and stage.needs_teacher else None
    steps = Steps(run, task, teacher, compute, part.stage or "classifier")
    if part.kind == "step":
        if teacher is not None and compute.device.type == "cuda":
            steps()  # with the teacher live, which takes the most memory
        if teacher is not None:
            teacher.cache = _AtHand(len(task.train), teacher.embedding_dim, compute)
        return steps, 1
    folder.create(run.to_dict(), task.spaces.student)
    epochs = itertools.count(1)

    def write() -> None:
        row = dataclasses.replace(_ROW, epoch=next(epochs))
        folder.save_checkpoint(steps.state([row]))
        folder.append_row(row)

    steps()
    return write, 1


_ROW = EpochMetrics(
    epoch=1,
    stage="classifier",
    train_loss=0.0,
    learning_rate=0.0,
    gradient_norm=0.0,
    gradient_norm_max=0.0,
    images_per_second=0.0,
    epoch_s=0.0,
    finished=False,
)


class _AtHand:
    """Embeddings as a cache would have them."""

    def __init__(self, num_images: int, dim: int, compute: Compute) -> None:
        self._rows = torch.randn(num_images, dim, device=compute.device, dtype=compute.dtype)

    def embed(self, image_ids: Tensor, view_ids: Tensor) -> Tensor:
        """As `refilled.teacher.KnownEmbeddings`."""
        return self._rows[image_ids]


def embedding_dim_of(run: RunConfig, task: Task) -> int:
    """Of the run's teacher."""
    return size_of(run, "teacher", task).embedding_dim


def _peak_bytes(run: RunConfig, whole: Task, compute: Compute, total_bytes: int) -> int:
    peak = torch.cuda.max_memory_allocated(compute.device)
    rest = max(0, len(whole.train) - run.global_batch_size)
    peak += rest * math.prod(whole.train.images.shape[1:])
    if needs_teacher(run) and run.embedding_cache.mode != "live":
        row_bytes = embedding_dim_of(run, whole) * getattr(torch, run.embedding_cache.dtype).itemsize
        cache_bytes = len(whole.train) * len(Views(run.views).view_ids) * row_bytes
        peak += cache_bytes if 3 * cache_bytes <= total_bytes else 0  # else its rows stay on the host
    return int(peak)


def _median_s(action: Callable[[], object], compute: Compute, seconds: float, *, must_warm: bool) -> float:
    """Median seconds of a call over a few blocks of them.

    The first call is timed alone where it is long enough that what only it does is lost in it.
    """

    def block_s(least_s: float) -> float:
        count, started_s = 0, time.perf_counter()
        while not count or time.perf_counter() - started_s < least_s:
            action()
            count += 1
            if compute.device.type == "cuda":
                torch.cuda.synchronize(compute.device)
        return (time.perf_counter() - started_s) / count

    began_s = time.perf_counter()
    first_s = block_s(0.0)
    if first_s >= seconds and not must_warm:
        return first_s
    means: list[float] = []
    while not means or (len(means) < BLOCKS and time.perf_counter() - began_s < seconds):
        means.append(block_s(seconds / BLOCKS))
    return statistics.median(means)
