"""Images in memory against images in their file, four times as many as memory may hold: seconds a step, memory, losses.

    python tests/benchmarks/bench_images.py --side 64 --student wrn-16-1 --batch 128

Each kind runs in a process of its own; steps are timed in alternating rounds of both. Memory is what the processes hold
(anonymous and file pages) at their highest; what steps take beside images is that of the process that had its images
before the first step.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from refilled.config import RunConfig
from refilled.data.batches import epoch_batches
from refilled.data.images import make_image_set
from refilled.data.label_space import LabelSpaces
from refilled.data.pixels import Pixels, StoredPixels
from refilled.presets import smoke
from refilled.stages import stages_of
from refilled.tasks.classification import Task
from refilled.tasks.normalization import Normalization
from refilled.training.compute import Compute
from refilled.training.learner import begin_stage, make_learner, optimizer_of
from refilled.training.loop import _with_images_ahead
from refilled.training.step import step

CLASSES = tuple("abcdefghij")


def resident_mib() -> float:
    """Pages that are this process's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise AssertionError("Linux says it")


def worker(pipe: Connection, file: Path, run: RunConfig, in_memory: bool) -> None:
    """Do as many steps as are asked for; say seconds a step, the loss and the highest resident MiB."""
    torch.set_num_threads(1)
    pixels: Pixels = torch.from_numpy(np.load(file)) if in_memory else StoredPixels(file)
    labels = torch.arange(len(pixels)) % len(CLASSES)
    half = torch.full((3,), 0.5, dtype=torch.float64)
    train = make_image_set(pixels, labels, CLASSES)
    task = Task(LabelSpaces((), CLASSES), train, None, Normalization(half, half), "noise")
    learner = make_learner(run, task, None, Compute(torch.device("cpu"), run.precision))
    (stage,) = stages_of(run)
    begin_stage(learner, stage)
    optimizer = optimizer_of(learner, stage)
    learner.student.train()
    epoch, start, highest = 0, resident_mib(), 0.0
    batches = iter(())
    while (count := pipe.recv()) > 0:
        took_s, loss = [], torch.zeros(())
        for _ in range(count):
            began_s = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                drawn = epoch_batches(labels, global_batch_size=run.global_batch_size, seed=0, epoch=epoch)
                batches, epoch = _with_images_ahead(learner, drawn), epoch + 1
                batch = next(batches)
            loss, _ = step(learner, stage, optimizer, batch, epoch)
            took_s.append(time.perf_counter() - began_s)
            highest = max(highest, resident_mib())
        pipe.send((statistics.median(took_s), float(loss), highest - start))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--mib", type=int, default=512, help="of all images; memory may hold a quarter")
    parser.add_argument("--student", default="wrn-16-1")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    run = dataclasses.replace(
        smoke().run, method="student", epochs=(0, 1), student=given.student, global_batch_size=given.batch
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "images.npy"
        count = given.mib * 2**20 // (3 * given.side**2)
        np.save(file, np.random.default_rng(0).integers(0, 256, (count, 3, given.side, given.side), dtype=np.uint8))
        context = multiprocessing.get_context("spawn")
        pipes = []
        for in_memory in (True, False):
            ours, theirs = context.Pipe()
            context.Process(target=worker, args=(theirs, file, run, in_memory), daemon=True).start()
            pipes.append(ours)
        ratios, memory = [], [0.0, 0.0]
        for number in range(given.rounds):
            seconds, losses = [0.0, 0.0], [0.0, 0.0]
            for kind in (0, 1) if number % 2 else (1, 0):
                pipes[kind].send(8)
                seconds[kind], losses[kind], memory[kind] = pipes[kind].recv()
            assert losses[0] == losses[1], "both must take the same steps"
            ratios.append(seconds[1] / seconds[0])
            print(f"round {number + 1}: {1000 * seconds[0]:.1f} ms in memory, {1000 * seconds[1]:.1f} ms from the file")
        for pipe in pipes:
            pipe.send(0)
    print(f"{count} images of {given.side} pixels, {given.mib} MiB; bound {given.mib // 4} MiB; losses equal")
    print(f"step from the file / in memory: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"resident for images: {given.mib} MiB in memory, {memory[1] - memory[0]:.0f} MiB from the file")


if __name__ == "__main__":
    main()
