"""How far the student's step is from what the machine could do.

    python tests/benchmarks/bench_roofline.py
    python tests/benchmarks/bench_roofline.py --device cuda --batch 256

Measures the device's peak rates (a large matrix product in the precision's type, a large copy), counts the arithmetic
of the vanilla student's forward and backward pass and the bytes that its operations read and write one by one, and
gives the time each would take at those rates beside the time the step takes. The bound is the larger of the two. Fused
kernels and caches can beat the count of bytes, so a share above 100 % is possible there.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from bench_step import Case, random_task, timed_s
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from analysis.machine import machine_line
from refilled.data.batches import epoch_batches
from refilled.presets import CIFAR_STUDENTS, cifar100
from refilled.training.compute import Compute


class TrafficCounter(TorchDispatchMode):
    """Adds up the bytes of the tensors that every operation reads and writes; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(
        self,
        operation: Any,
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation and count."""
        result = operation(*arguments, **(options or {}))
        if not operation.is_view:
            for tensor in tree_leaves((arguments, options, result)):
                if isinstance(tensor, torch.Tensor):
                    self.num_bytes += tensor.numel() * tensor.element_size()
        return result


def median_s(action: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median seconds of a call, after one that is not counted."""
    action()
    return statistics.median(timed_s(action, device) for _ in range(rounds))


def peak_rates(compute: Compute, rounds: int) -> tuple[float, float]:
    """Floating-point operations and bytes a second."""
    on_gpu = compute.device.type == "cuda"
    side, copied = (8192, 2**30) if on_gpu else (2048, 2**28)
    dtype = torch.bfloat16 if compute.precision == "bfloat16" else compute.dtype
    left, right, product = (torch.randn(side, side, device=compute.device).to(dtype) for _ in range(3))
    product_s = median_s(lambda: torch.mm(left, right, out=product), compute.device, rounds)
    source = torch.zeros(copied, dtype=torch.uint8, device=compute.device)
    target = torch.empty_like(source)
    copy_s = median_s(lambda: target.copy_(source), compute.device, rounds)
    return 2 * side**3 / product_s, 2 * copied / copy_s


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", default=list(CIFAR_STUDENTS))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    compute = Compute(torch.device(arguments.device), arguments.precision)
    flops_per_s, bytes_per_s = peak_rates(compute, arguments.rounds)
    print(machine_line(arguments.threads))
    print(f"peak: {flops_per_s / 1e9:.0f} GFLOP/s ({arguments.precision}), {bytes_per_s / 1e9:.1f} GB/s")
    print(f"{'student':>9} {'images/s':>9} {'step ms':>8} {'arithmetic ms':>14} {'traffic ms':>11} {'of bound':>9}")
    task = random_task(2 * arguments.batch)
    for student in arguments.students:
        run = dataclasses.replace(cifar100().run, student=student, method="student", precision=arguments.precision)
        case = Case(run, task, None, compute, "classifier")
        batch = next(iter(epoch_batches(task.train.labels, global_batch_size=arguments.batch, seed=0, epoch=0)))
        case.step(batch)
        with FlopCounterMode(display=False) as arithmetic:
            case.step(batch)
        with TrafficCounter() as traffic:
            case.step(batch)
        step_s = median_s(functools.partial(case.step, batch), compute.device, arguments.rounds)
        needed_s = arithmetic.get_total_flops() / flops_per_s, traffic.num_bytes / bytes_per_s
        print(
            f"{student:>9} {arguments.batch / step_s:>9.0f} {1e3 * step_s:>8.1f} {1e3 * needed_s[0]:>14.1f} "
            f"{1e3 * needed_s[1]:>11.1f} {100 * max(needed_s) / step_s:>7.0f} %",
            flush=True,
        )


if __name__ == "__main__":
    main()
