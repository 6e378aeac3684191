"""How a step scales with workers: images per second of 2 over 1, the share spent in communication, a model up to 64.

    python tests/benchmarks/bench_scaling.py
    python tests/benchmarks/bench_scaling.py --student wrn-40-2 --batch 512

Real gloo processes of one thread each on this machine, the global batch the same for every number of workers, stage
embedding of REFILLED on random images of CIFAR's shape, float32. Rounds of one worker and of two alternate; the table
shows medians. Time in communication is all time inside torch.distributed's calls, waiting for the slower worker
included.

The model: T(W) = c + a B / W + l(B) + n * latency * ceil(log2 W) + 2 (W - 1) / W * bytes / bandwidth, with
    c, a       a line through the step's times of one worker at B, B / 2 and B / 4, without the loss l
    l(B)       the loss of the global batch, forward and backward, which every worker computes
    n, bytes   collectives of a step and what they carry
    latency    of an all-reduce of one number between two processes, bandwidth from one of 16 MiB
It is compared with the two workers that were measured. On more machines latency and bandwidth are the network's:
`--latency-us` and `--gbit` put others in.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_step import NUM_CLASSES, random_task
from torch import Tensor

from analysis.machine import machine_line
from refilled.config import RunConfig
from refilled.data.batches import epoch_batches
from refilled.models import build_model
from refilled.presets import cifar100
from refilled.stages import stages_of
from refilled.teacher import FrozenTeacher
from refilled.terms import GlobalBatch
from refilled.training.compute import Compute
from refilled.training.learner import begin_stage, make_learner, optimizer_of
from refilled.training.step import step

FLOAT32 = Compute(torch.device("cpu"), "float32")
CALLS = ("all_reduce", "all_gather", "broadcast")
LARGE = 2**22  # float32 values of the all-reduce that shows the bandwidth


@dataclasses.dataclass
class Traffic:
    """What goes through torch.distributed."""

    seconds: float = 0.0
    calls: int = 0
    num_bytes: int = 0

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The collective, counted and timed."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            started_s = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - started_s
            self.calls += 1
            tensors = [each for each in args if isinstance(each, Tensor)]
            self.num_bytes += sum(each.numel() * each.element_size() for each in tensors)
            return result

        return counted


def steps(run: RunConfig, batch_size: int, num_steps: int) -> dict[str, float]:
    """Median seconds of a step on this group, and what it says to others."""
    run = dataclasses.replace(run, global_batch_size=batch_size)
    task = random_task(batch_size * num_steps)
    model = FLOAT32.place_model(build_model("wrn-10-1", num_classes=50, in_channels=3, image_size=32, seed=1))
    teacher = FrozenTeacher(model, torch.randn(NUM_CLASSES, model.embedding_dim), FLOAT32, torch.float32, "noise")
    learner = make_learner(run, task, teacher, FLOAT32)
    stage = stages_of(run)[0]
    begin_stage(learner, stage)
    optimizer = optimizer_of(learner, stage)
    world = {"rank": dist.get_rank(), "world_size": dist.get_world_size()} if dist.is_initialized() else {}
    learner.student.train()
    traffic, times = Traffic(), []
    plain = {name: getattr(dist, name) for name in CALLS}
    try:
        for name, function in plain.items():
            setattr(dist, name, traffic.watch(function))
        batches = epoch_batches(task.train.labels, global_batch_size=batch_size, seed=0, epoch=0, **world)
        for number, batch in enumerate(batches):
            if number == 2:  # the first two are warm-up
                traffic.seconds, traffic.calls, traffic.num_bytes = 0.0, 0, 0
            started_s = time.perf_counter()
            step(learner, stage, optimizer, batch, epoch=0)
            times.append(time.perf_counter() - started_s)
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)
    timed = times[2:]
    return {
        "step_s": statistics.median(timed),
        "share": traffic.seconds / sum(timed),
        "calls": traffic.calls / len(timed),
        "bytes": traffic.num_bytes / len(timed),
    }


def loss_s(run: RunConfig, batch_size: int) -> float:
    """Median seconds of the global batch's loss, forward and backward."""
    task = random_task(batch_size)
    rows = {
        "embedding": torch.randn(batch_size, 64, requires_grad=True),
        "teacher_embedding": torch.randn(batch_size, 64),
    }
    labels = task.train.labels
    batch = GlobalBatch(
        image_ids=torch.arange(batch_size),
        labels=labels,
        classes=labels.unique(),
        largest_class=int(torch.bincount(labels).max()),
        epoch=0,
    )
    learner = make_learner(run, task, None, FLOAT32)
    begin_stage(learner, stages_of(run)[0])
    (term,) = learner.present_terms
    times = []
    for _ in range(7):
        started_s = time.perf_counter()
        term.loss(rows, batch).backward()  # type: ignore[no-untyped-call]
        times.append(time.perf_counter() - started_s)
    return statistics.median(times)


def all_reduce_s(num_values: int) -> float:
    """Median seconds of an all-reduce of float32 values."""
    values, times = torch.zeros(num_values), []
    for _ in range(20):
        started_s = time.perf_counter()
        dist.all_reduce(values)
        times.append(time.perf_counter() - started_s)
    return statistics.median(times)


def worker(rank: int, num_workers: int, folder: str, run: RunConfig, batch_size: int, num_steps: int) -> None:
    """One of a group; rank 0 keeps what was measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=num_workers)
    found = steps(run, batch_size, num_steps)
    found |= {"latency_s": all_reduce_s(1), "large_s": all_reduce_s(LARGE)}
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()  # a process that leaves while the other still talks to it takes that one down
    dist.destroy_process_group()


def group(num_workers: int, run: RunConfig, batch_size: int, num_steps: int) -> dict[str, float]:
    """What a group of processes measures."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(num_workers, folder, run, batch_size, num_steps), nprocs=num_workers)
        found: dict[str, float] = torch.load(f"{folder}/found.pt")
    return found


def main() -> None:
    """Print the measurement, the model and what it says of more workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="wrn-16-1")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12, help="of a round, two of them to warm up")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latency-us", type=float, default=None, help="of the network, in place of the measured one")
    parser.add_argument("--gbit", type=float, default=None, help="of the network, in place of the measured one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = dataclasses.replace(cifar100().run, student=arguments.student, precision="float32")
    size = arguments.batch
    rounds = []
    for _ in range(arguments.rounds):
        one = {each: steps(run, each, arguments.steps)["step_s"] for each in (size, size // 2, size // 4)}
        rounds.append((one, group(2, run, size, arguments.steps)))
    one_s = {each: statistics.median(one[each] for one, _ in rounds) for each in rounds[0][0]}
    two = {name: statistics.median(found[name] for _, found in rounds) for name in rounds[0][1]}
    speed_ups = sorted(one[size] / found["step_s"] for one, found in rounds)
    print(machine_line(1))
    print(f"{arguments.student}, stage embedding, global batch {size}, float32, {arguments.rounds} rounds")
    print(f"1 worker   {size / one_s[size]:8.0f} images/s")
    print(f"2 workers  {size / two['step_s']:8.0f} images/s, {100 * two['share']:.1f} % of a step in communication")
    print(f"2 over 1   {statistics.median(speed_ups):.2f} (rounds {speed_ups[0]:.2f} to {speed_ups[-1]:.2f})")
    print_model(run, size, one_s, two, arguments.latency_us, arguments.gbit)


def print_model(
    run: RunConfig,
    size: int,
    one_s: dict[int, float],
    two: dict[str, float],
    latency_us: float | None,
    gbit: float | None,
) -> None:
    """Fit the model, compare it with two workers, and go on to 64."""
    losses = {each: loss_s(run, each) for each in one_s}
    sizes = list(one_s)
    without = [one_s[each] - losses[each] for each in sizes]
    slope, constant = statistics.linear_regression(sizes, without)
    constant = max(0.0, constant)
    latency_s = two["latency_s"] if latency_us is None else latency_us * 1e-6
    # Two workers' ring sends every byte once each way.
    bandwidth = 4 * LARGE / two["large_s"] if gbit is None else gbit * 1e9 / 8

    def step_s(num_workers: int) -> float:
        hops = math.ceil(math.log2(num_workers)) if num_workers > 1 else 0
        carried = 2 * (num_workers - 1) / num_workers * two["bytes"]
        shared = constant + slope * size / num_workers + losses[size]
        return shared + two["calls"] * latency_s * hops + carried / bandwidth

    print(
        f"model: c {1e3 * constant:.1f} ms, a {1e6 * slope:.0f} us an image, loss {1e3 * losses[size]:.1f} ms, "
        f"{two['calls']:.0f} collectives of {two['bytes'] / 2**20:.2f} MiB in all, latency {1e6 * latency_s:.0f} us, "
        f"bandwidth {bandwidth / 2**30:.2f} GiB/s"
    )
    print(f"two workers: model {1e3 * step_s(2):.0f} ms a step, measured {1e3 * two['step_s']:.0f} ms")
    print(f"{'workers':>8} {'images/s':>9} {'speed-up':>9} {'efficiency':>11}")
    for num_workers in (1, 2, 4, 8, 16, 32, 64):
        speed_up = step_s(1) / step_s(num_workers)
        efficiency = 100 * speed_up / num_workers
        print(f"{num_workers:>8} {size / step_s(num_workers):>9.0f} {speed_up:>9.2f} {efficiency:>9.0f} %")


if __name__ == "__main__":
    main()
