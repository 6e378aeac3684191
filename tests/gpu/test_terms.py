"""Every method on a real GPU: the numbers of a CPU, and finite ones under bfloat16 autocast."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest
import torch
from outcomes import Interruption, interrupt_at, weights

from refilled.config import RunConfig
from refilled.execution import execute, run_folder
from refilled.losses import relational_distillation
from refilled.methods import METHODS
from refilled.presets import smoke
from refilled.shared_caches import epochs_with_teacher
from refilled.storage import Storage
from refilled.training.compute import Compute

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def small_run(method: str, precision: str) -> RunConfig:
    small = {"student": "wrn-10-1", "teacher": "wrn-10-2", "epochs": (2, 2), "teacher_epochs": 3}
    return dataclasses.replace(smoke().run, method=method, overlap=1.0, precision=precision, **small)


def with_cache(run: RunConfig) -> RunConfig:
    """The run with its teacher looked up, where its terms can be served so."""
    return run.with_overrides({"embedding_cache.mode": "cached"}) if epochs_with_teacher(run) else run


def devices() -> list[torch.device]:
    return [torch.device("cpu"), torch.device("cuda", 0)]


@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_gives_the_numbers_of_a_cpu(method: str, tmp_path: Path) -> None:
    """In float64, where sums in another order differ by the last digits only."""
    rows = []
    for device in devices():
        run, storage = with_cache(small_run(method, "float64")), Storage.open(tmp_path / device.type)
        execute(run, storage, Compute(device, "float64"))
        rows.append(run_folder(run, storage).rows())
    for on_cpu, on_gpu in zip(*rows, strict=True):
        assert on_gpu.train_loss == pytest.approx(on_cpu.train_loss, rel=1e-6)
        assert on_gpu.gradient_norm == pytest.approx(on_cpu.gradient_norm, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_trains_to_finite_numbers_and_goes_on_from_a_checkpoint(method: str, tmp_path: Path) -> None:
    run, compute = with_cache(small_run(method, "bfloat16")), Compute(torch.device("cuda", 0), "bfloat16")
    storage = Storage.open(tmp_path)
    with pytest.raises(Interruption):
        execute(run, storage, compute, interrupt_at(1))
    assert execute(run, storage, compute).finished
    kept = weights(run_folder(run, storage))
    assert all(bool(torch.isfinite(each.float()).all()) for each in kept.values())


@pytest.mark.parametrize("size", [256, 1024])
def test_relations_of_a_large_batch_fit(size: int) -> None:
    """All triplets of a batch, a billion at 1,024, without holding them."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    student = torch.randn(size, 64, device="cuda", generator=generator, requires_grad=True)
    teacher = torch.randn(size, 128, device="cuda", generator=generator)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        relational_distillation(student, teacher, distance_weight=25.0, angle_weight=50.0).backward()
        torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    print(f"B = {size}: {1000 * (time.perf_counter() - started_s):.1f} ms, {taken / 2**20:.0f} MiB at most")
    assert taken < 4 * 2**30
