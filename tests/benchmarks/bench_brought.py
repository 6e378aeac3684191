"""Seconds of a step with the cached embeddings of teachers of several kinds over those of a vanilla step.

    python tests/benchmarks/bench_brought.py --student mobilenet-0.25 --side 64 --batch 64

With a cache a step does not depend on the teacher but for the width of its embedding. Rounds of all kinds alternate in
one process; the table has medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import torch

from refilled.data.images import make_image_set
from refilled.data.label_space import LabelSpaces
from refilled.methods import StageName
from refilled.models import build_model
from refilled.presets import smoke
from refilled.rehearsal import Steps
from refilled.tasks.classification import Task
from refilled.tasks.normalization import Normalization
from refilled.teacher import FrozenTeacher, InputView
from refilled.timing import _AtHand
from refilled.training.compute import Compute

TEACHERS = (
    *("timm:resnet10t", "timm:vit_tiny_patch16_224", "timm:convnext_atto"),
    *("torchvision:resnet18", "torchvision:mobilenet_v3_small", "wrn-16-1"),
)
STAGES: tuple[StageName, ...] = ("embedding", "classifier")
CLASSES = tuple("abcdefghij")
CALLS = 4  # of one kind in a round


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="mobilenet-0.25")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=11)
    given = parser.parse_args()
    torch.set_num_threads(1)
    compute = Compute(torch.device("cpu"), "float32")
    shape = (4 * given.batch, 3, given.side, given.side)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    half = Normalization(*(torch.full((3,), 0.5, dtype=torch.float64) for _ in range(2)))
    train = make_image_set(images, torch.arange(len(images)) % len(CLASSES), CLASSES)
    task = Task(LabelSpaces(CLASSES, CLASSES), train, None, half, "noise")
    run = dataclasses.replace(smoke().run, student=given.student, global_batch_size=given.batch)
    steps: dict[tuple[str, StageName], Steps] = {}
    for name in TEACHERS:
        network = build_model(name, num_classes=10, in_channels=3, image_size=given.side, seed=0)
        prototypes = torch.randn(len(CLASSES), network.embedding_dim)
        teacher = FrozenTeacher(network, prototypes, compute, torch.float16, "noise", InputView(run, task, compute))
        teacher.cache = _AtHand(len(train), network.embedding_dim, compute)
        for stage in STAGES:
            steps[name, stage] = Steps(run, task, teacher, compute, stage)
    vanilla = Steps(dataclasses.replace(run, method="student"), task, None, compute, "classifier")

    def seconds(one: Steps) -> float:
        began_s = time.perf_counter()
        for _ in range(CALLS):
            one()
        return (time.perf_counter() - began_s) / CALLS

    for one in (vanilla, *steps.values()):
        seconds(one)
    ratios: dict[tuple[str, StageName], list[float]] = {which: [] for which in steps}
    for _ in range(given.rounds):
        for which, one in steps.items():
            before_s = seconds(vanilla)
            took_s = seconds(one)
            ratios[which].append(2 * took_s / (before_s + seconds(vanilla)))
    for (name, stage), found in ratios.items():
        print(f"{name:32}{stage:12}{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})")


if __name__ == "__main__":
    main()
