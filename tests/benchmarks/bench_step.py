"""A step of REFILLED against a step of the vanilla student, on the same batch, in turn.

    python tests/benchmarks/bench_step.py
    python tests/benchmarks/bench_step.py --students wrn-16-1 --device cuda --precision bfloat16

For each student of Table 19 and the teacher WRN-40-2, one step (views, forward, loss, backward, optimiser) of

    vanilla           cross-entropy alone
    embedding cached  stage embedding, teacher's embeddings from the cache
    classifier cached stage classifier, the same
    embedding live    stage embedding, the teacher runs in the step
    classifier live   stage classifier, the same
    triplets live     stage embedding by all triplets of the batch, [B, B, B], as it is commonly written

Every round times each of them once on the same batch; the table gives the median over rounds of the time and of the
ratio to that round's vanilla step. Images are random: the time does not depend on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from analysis.machine import machine_line
from refilled.config import EmbeddingCacheConfig, RunConfig, ViewConfig
from refilled.data.batches import Batch, epoch_batches
from refilled.data.images import make_image_set
from refilled.data.label_space import LabelSpaces
from refilled.embedding_cache import embedding_cache
from refilled.models import build_model
from refilled.presets import CIFAR_STUDENTS, cifar100
from refilled.stages import stages_of
from refilled.storage import Storage
from refilled.tasks.classification import Task
from refilled.tasks.normalization import Normalization
from refilled.teacher import FrozenTeacher
from refilled.training.compute import Compute
from refilled.training.learner import begin_stage, make_learner, optimizer_of
from refilled.training.step import step

NUM_CLASSES = 50


def random_task(num_images: int, side: int = 32) -> Task:
    """Images of noise with the shape of CIFAR's."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num_images, 3, side, side), dtype=torch.uint8, generator=generator)
    classes = tuple(f"class {number}" for number in range(NUM_CLASSES))
    return Task(
        spaces=LabelSpaces(teacher=classes, student=classes),
        train=make_image_set(images, torch.arange(num_images) % NUM_CLASSES, classes),
        validation=None,
        normalization=Normalization(mean=torch.full((3,), 0.5).double(), std=torch.full((3,), 0.25).double()),
        data_digest="noise",
    )


def triplet_matching(student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float, **_: object) -> Tensor:
    """The same comparison with one impostor a tuple, every triplet of the batch at once."""
    d_s, d_t = (torch.cdist(unit, unit) for unit in map(torch.nn.functional.normalize, (student, teacher)))
    same = labels[:, None] == labels[None, :]
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    chosen = positive[:, :, None] & ~same[:, None, :] & (d_s[:, None, :] > d_s[:, :, None])
    anchors, positives, negatives = chosen.nonzero(as_tuple=True)
    pairs_s, pairs_t = (
        torch.stack((-d[anchors, positives], -d[anchors, negatives]), dim=1) / temperature for d in (d_s, d_t)
    )
    log_s, log_t = pairs_s.log_softmax(1), pairs_t.log_softmax(1)
    return (log_t.exp() * (log_t - log_s)).sum(1).mean()


class Case:
    """One way of doing a step, with a student and an optimiser of its own."""

    def __init__(self, run: RunConfig, task: Task, teacher: FrozenTeacher | None, compute: Compute, stage: str) -> None:
        self._learner = make_learner(run, task, teacher, compute)
        self._stage = next(each for each in stages_of(run) if each.name == stage)
        begin_stage(self._learner, self._stage)
        self._optimizer = optimizer_of(self._learner, self._stage)
        self._learner.student.train()

    def step(self, batch: Batch) -> None:
        """The step of `refilled.training.step`."""
        step(self._learner, self._stage, self._optimizer, batch, epoch=0)


def timed_s(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started_s = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started_s


def with_triplets(case: Case, batch: Batch) -> None:
    """A step whose matching loss is the plain triplet form."""
    from refilled.terms import comparison

    exact = comparison.comparison_matching
    comparison.comparison_matching = triplet_matching  # type: ignore[assignment]
    try:
        case.step(batch)
    finally:
        comparison.comparison_matching = exact


def bench(student: str, arguments: argparse.Namespace, storage: Storage) -> None:
    """Print the rows of one student."""
    compute = Compute(torch.device(arguments.device), arguments.precision)
    run = dataclasses.replace(
        cifar100().run,
        student=student,
        teacher=arguments.teacher,
        precision=arguments.precision,
        global_batch_size=arguments.batch,
        compile=arguments.compile,
        views=ViewConfig(num_views=4),
        embedding_cache=EmbeddingCacheConfig(mode="cached"),
    )
    task = random_task(2 * arguments.batch)
    model = build_model(run.teacher, num_classes=NUM_CLASSES, in_channels=3, image_size=32, seed=1)
    prototypes = torch.randn(NUM_CLASSES, model.embedding_dim, generator=torch.Generator().manual_seed(1))
    prototypes = prototypes.to(compute.device, compute.dtype)
    live, cached = (
        FrozenTeacher(compute.place_model(model), prototypes, compute, torch.float16, "noise") for _ in range(2)
    )
    cached.cache = embedding_cache(run, task, cached, storage, compute)
    vanilla = dataclasses.replace(run, method="student")
    cases: dict[str, Callable[[Batch], None]] = {
        "vanilla": Case(vanilla, task, None, compute, "classifier").step,
        "embedding cached": Case(run, task, cached, compute, "embedding").step,
        "classifier cached": Case(run, task, cached, compute, "classifier").step,
        "embedding live": Case(run, task, live, compute, "embedding").step,
        "classifier live": Case(run, task, live, compute, "classifier").step,
    }
    triplets = Case(run, task, live, compute, "embedding")
    cases["triplets live"] = lambda batch: with_triplets(triplets, batch)
    batch = next(iter(epoch_batches(task.train.labels, global_batch_size=arguments.batch, seed=0, epoch=0)))
    for action in cases.values():
        action(batch)  # warm up
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(arguments.rounds):
        for name, action in cases.items():
            times[name].append(timed_s(functools.partial(action, batch), compute.device))
    for name, seconds in times.items():
        ratios = sorted(each / base for each, base in zip(seconds, times["vanilla"], strict=True))
        print(
            f"{student:>9} {name:<17} {1e3 * statistics.median(seconds):>9.1f} "
            f"{statistics.median(ratios):>7.3f} {ratios[0]:>7.3f} {ratios[-1]:>7.3f}",
            flush=True,
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", default=list(CIFAR_STUDENTS))
    parser.add_argument("--teacher", default="wrn-40-2")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(machine_line(arguments.threads))
    print(f"teacher {arguments.teacher}, batch {arguments.batch}, {arguments.precision}, {arguments.rounds} rounds")
    print(f"{'student':>9} {'step':<17} {'median ms':>9} {'ratio':>7} {'least':>7} {'most':>7}")
    with tempfile.TemporaryDirectory() as folder:
        for student in arguments.students:
            bench(student, arguments, Storage.open(folder))


if __name__ == "__main__":
    main()
