"""Where an epoch's time goes: the share outside the model's forward, backward and optimiser.

    python tests/benchmarks/bench_epoch.py
    python tests/benchmarks/bench_epoch.py --student wrn-16-1 --images 25000 --method student

Trains one epoch on random images of CIFAR's shape and adds up the time inside the student's forward, the backward pass
and the optimiser's step. What is left is choosing and rendering views, normalising, gathering, the losses' forward and
the loop. On a GPU every part is synchronised, which the loop itself never does, so the share there is an upper bound.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from bench_step import NUM_CLASSES, random_task

from analysis.machine import machine_line
from refilled.methods import METHODS
from refilled.models import build_model
from refilled.presets import cifar100
from refilled.stages import stages_of
from refilled.teacher import FrozenTeacher
from refilled.training import loop as training
from refilled.training.compute import Compute
from refilled.training.learner import begin_stage, make_learner, optimizer_of


class Stopwatch:
    """Adds up the time of the calls it wraps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.total_s: dict[str, float] = {}

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed under a name."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started_s = self._now_s()
            result = function(*args, **kwargs)
            self.total_s[name] = self.total_s.get(name, 0.0) + self._now_s() - started_s
            return result

        return timed

    def _now_s(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


@contextmanager
def timed_backward(watch: Stopwatch) -> Iterator[None]:
    """Time every `Tensor.backward` of the block."""
    plain = torch.Tensor.backward
    torch.Tensor.backward = watch.wrap("backward", plain)  # type: ignore[method-assign]  # put back below
    try:
        yield
    finally:
        torch.Tensor.backward = plain  # type: ignore[method-assign]  # as it was


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="wrn-16-1")
    parser.add_argument("--method", default="student", choices=tuple(METHODS))
    parser.add_argument("--images", type=int, default=25_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    compute = Compute(torch.device(arguments.device), arguments.precision)
    changes = {"student": arguments.student, "precision": arguments.precision, "method": arguments.method}
    run = dataclasses.replace(cifar100().run, **changes)
    task = random_task(arguments.images)
    teacher = None
    if arguments.method != "student":
        model = compute.place_model(build_model("wrn-10-1", num_classes=50, in_channels=3, image_size=32, seed=1))
        teacher = FrozenTeacher(model, torch.randn(NUM_CLASSES, model.embedding_dim), compute, torch.float16, "noise")
    print(machine_line(arguments.threads))
    print(f"{arguments.student}, {arguments.method}, {arguments.images} images, {arguments.precision}")
    print(f"{'epoch s':>8} {'forward':>8} {'backward':>8} {'optimiser':>9} {'outside':>8} {'share':>7}")
    for epoch in range(arguments.epochs):
        watch = Stopwatch(compute.device)
        learner = make_learner(run, task, teacher, compute)
        learner.trained = watch.wrap("forward", learner.trained)
        stage = stages_of(run)[0]
        begin_stage(learner, stage)
        optimizer = optimizer_of(learner, stage)
        optimizer.step = watch.wrap("optimiser", optimizer.step)  # type: ignore[method-assign]  # timed
        with timed_backward(watch):
            row = training._epoch(learner, stage, optimizer, epoch, 0, previous=None)
        total_s, inside_s = row.epoch_s, sum(watch.total_s.values())
        parts = " ".join(f"{watch.total_s[name]:>8.2f}" for name in ("forward", "backward", "optimiser"))
        print(
            f"{total_s:>8.2f} {parts} {total_s - inside_s:>9.2f} {100 * (1 - inside_s / total_s):>6.2f} %", flush=True
        )


if __name__ == "__main__":
    main()
