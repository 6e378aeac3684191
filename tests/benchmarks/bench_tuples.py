"""Comparison matching by sorted ranges against dense masking: time and peak memory, forward and backward.

    python tests/benchmarks/bench_tuples.py
    python tests/benchmarks/bench_tuples.py --sizes 256 1024 8192 --classes 10 --max-negatives 20

Every case runs in a process of its own, so that its peak resident memory is its own. "Peak" is the peak of the process
less what it held before the first step. The dense form is the usual one: float32, one row of B masked distances for
every same-class pair, [N, B], differentiated by autograd. It runs where it needs less than --dense-gib.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from analysis.machine import machine_line  # noqa: E402
from refilled.losses import comparison_matching  # noqa: E402

GIB = 2**30
DENSE_BYTES_PER_ENTRY = 40
"""Peak of the dense form over N x B, as measured: some ten float32 matrices live in its forward and backward."""


def dense_comparison_matching(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, max_negatives: int | None
) -> Tensor:
    """The same loss with a mask over [pairs, B]; float32 and autograd throughout."""
    d_s, d_t = (torch.cdist(rows, rows) for rows in (_unit(student), _unit(teacher)))
    is_same = labels[:, None] == labels[None, :]
    anchors, positives = is_same.logical_and(~torch.eye(len(labels), dtype=torch.bool)).nonzero(as_tuple=True)
    rows = d_s.detach()[anchors]
    is_impostor = ~is_same[anchors] & (rows > rows.gather(1, positives[:, None]))
    if max_negatives is not None:
        nearest = rows.masked_fill(~is_impostor, torch.inf).topk(min(max_negatives, len(labels)), 1, largest=False)
        is_impostor &= torch.zeros_like(is_impostor).scatter_(1, nearest.indices, True)
    is_member = is_impostor.scatter(1, positives[:, None], True)
    student_log = (d_s[anchors] / -temperature).masked_fill(~is_member, -torch.inf).log_softmax(1)
    teacher_log = (d_t[anchors] / -temperature).masked_fill(~is_member, -torch.inf).log_softmax(1)
    divergence = (teacher_log.exp() * (teacher_log - student_log).masked_fill(~is_member, 0.0)).sum(1)
    is_tuple = is_impostor.any(1)
    return (divergence * is_tuple).sum() / is_tuple.sum().clamp(min=1)


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def measure(case: dict[str, object], arguments: argparse.Namespace) -> None:
    """Run one case in this process and print a JSON object."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    size = int(str(case["size"]))
    labels = torch.randint(0, arguments.classes, (size,))
    centres = torch.randn(arguments.classes, arguments.dim)
    student = (torch.randn(size, arguments.dim) + 0.5 * centres[labels]).requires_grad_()
    teacher = torch.randn(size, arguments.dim) + centres[labels]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, value = [], 0.0
    for _ in range(arguments.repeats + 1):
        start = time.perf_counter()
        if case["form"] == "sorted":
            loss = comparison_matching(
                student,
                teacher,
                labels,
                temperature=0.5,
                max_negatives=arguments.max_negatives,
                margin=arguments.margin,
            )
        else:
            loss = dense_comparison_matching(student, teacher, labels, 0.5, arguments.max_negatives)
        loss.backward()
        seconds.append(time.perf_counter() - start)
        value = loss.item()
    peak_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(json.dumps({"seconds": seconds[1:], "peak_bytes": peak_bytes, "loss": value}))


def run_case(form: str, size: int, arguments: argparse.Namespace) -> dict[str, object]:
    """Measure one case in a process of its own."""
    command = [sys.executable, __file__, "--case", json.dumps({"form": form, "size": size})]
    for name in ("classes", "dim", "threads", "repeats", "max_negatives", "margin"):
        value = getattr(arguments, name)
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{form} at B = {size} failed:\n{done.stderr}")
    result: dict[str, object] = json.loads(done.stdout)
    return result


def row_of(form: str, size: int, result: dict[str, object]) -> tuple[str, float]:
    """A line of the table, and the median in seconds."""
    seconds = result["seconds"]
    assert isinstance(seconds, list)
    median = statistics.median(seconds)
    peak_gib = float(str(result["peak_bytes"])) / GIB
    line = (
        f"{size:>6} {form:>7} {1e3 * median:>10.1f} {1e3 * min(seconds):>10.1f} {1e3 * max(seconds):>10.1f} "
        f"{peak_gib:>10.3f} {result['loss']:>11.6f}"
    )
    return line, median


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048], help="batch sizes B")
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--dim", type=int, default=64, help="embedding dimensions")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7, help="timed steps after one warm-up")
    parser.add_argument("--max-negatives", type=int, default=None)
    parser.add_argument("--margin", type=float, default=None, help="of the sorted form; the dense form is left out")
    parser.add_argument("--dense-gib", type=float, default=4.0)
    parser.add_argument("--case", type=json.loads, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        measure(arguments.case, arguments)
        return
    print(machine_line(arguments.threads))
    print(f"{arguments.classes} classes, {arguments.dim} dimensions, median of {arguments.repeats} steps")
    print(f"{'B':>6} {'form':>7} {'median ms':>10} {'min ms':>10} {'max ms':>10} {'peak GiB':>10} {'loss':>11}")
    for size in arguments.sizes:
        line, sorted_s = row_of("sorted", size, run_case("sorted", size, arguments))
        print(line, flush=True)
        dense_bytes = size * max(size // arguments.classes, 1) * size * DENSE_BYTES_PER_ENTRY
        if arguments.margin is not None or dense_bytes > arguments.dense_gib * GIB:
            continue
        line, dense_s = row_of("dense", size, run_case("dense", size, arguments))
        print(f"{line}   {dense_s / sorted_s:.1f} x the time", flush=True)


if __name__ == "__main__":
    main()
