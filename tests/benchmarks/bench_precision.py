"""What bfloat16 costs and brings: accuracy and speed against float32, on real images, paired by seed.

    python tests/benchmarks/bench_precision.py --data parquet:DIR
    python tests/benchmarks/bench_precision.py --data parquet:DIR --student wrn-16-1 --epochs 6 --seeds 5 --classes 50

Trains the vanilla student with each precision and seed, everything else alike, validates on the held-out images (the
test set is not read), and prints each pair, the mean difference with its 95 % interval, and the ratio of the speeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from analysis.machine import machine_line
from refilled.config import RunConfig
from refilled.execution import execute, run_folder
from refilled.presets import cifar100
from refilled.statistics import mean_and_ci95
from refilled.storage import Storage
from refilled.training.compute import Compute

PRECISIONS = ("bfloat16", "float32")


def train(run: RunConfig, storage: Storage, device: str) -> tuple[float, float]:
    """Last validation accuracy and images a second (median over epochs) of one run."""
    torch.set_num_threads(1)
    execute(run, storage, Compute(torch.device(device), run.precision))
    rows = run_folder(run, storage).rows()
    speeds = sorted(row.images_per_second for row in rows)
    value = rows[-1].val_accuracy
    assert value is not None, "the preset holds images out"
    return value, speeds[len(speeds) // 2]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--student", default="wrn-16-1")
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=2, help="runs side by side, one thread each")
    arguments = parser.parse_args()
    base = dataclasses.replace(
        cifar100().run,
        data=arguments.data,
        student=arguments.student,
        method="student",
        epochs=(0, arguments.epochs),
        num_teacher_classes=arguments.classes,
        num_student_classes=arguments.classes,
    )
    runs = {
        (seed, precision): dataclasses.replace(base, seed=seed, precision=precision)
        for seed in range(arguments.seeds)
        for precision in PRECISIONS
    }
    print(machine_line(1))
    print(f"{arguments.student}, {arguments.classes} classes, {arguments.epochs} epochs")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool,
    ):
        jobs = {key: pool.submit(train, run, Storage.open(folder), arguments.device) for key, run in runs.items()}
        found = {key: job.result() for key, job in jobs.items()}
    print(f"{'seed':>5} {'bfloat16 %':>11} {'float32 %':>10} {'difference':>11} {'speed ratio':>12}")
    differences, ratios = [], []
    for seed in range(arguments.seeds):
        (low, low_speed), (full, full_speed) = (found[seed, precision] for precision in PRECISIONS)
        differences.append(100 * (low - full))
        ratios.append(low_speed / full_speed)
        print(f"{seed:>5} {100 * low:>11.2f} {100 * full:>10.2f} {differences[-1]:>+11.2f} {ratios[-1]:>12.2f}")
    mean, half_width = mean_and_ci95(differences)
    interval = "one seed, no interval" if half_width is None else f"± {half_width:.2f} (95 %, n = {arguments.seeds})"
    speed = sorted(ratios)[len(ratios) // 2]
    print(f"mean difference {mean:+.2f} {interval} percentage points; median speed ratio {speed:.2f}")


if __name__ == "__main__":
    main()
