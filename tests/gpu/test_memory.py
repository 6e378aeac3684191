"""What runs take of a GPU's memory, on a real one."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from refilled.config import RunConfig
from refilled.stages import stages_of
from refilled.storage import Storage
from refilled.timing import Timed, step_part, time_part
from refilled.training.compute import Compute
from tune.backend.cluster import PROCESS_BYTES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# A run in a process of its own; prints what the GPU has less of while it is there, and what its tensors took at most.
RUN = """
import dataclasses, sys, torch
from refilled.training.compute import Compute
from refilled.execution import execute
from refilled.presets import smoke
from refilled.storage import Storage

free, _ = torch.cuda.mem_get_info()
run = dataclasses.replace(
    smoke().run, student="wrn-16-4", teacher="wrn-16-4", global_batch_size=512, epochs=(1, 1), teacher_epochs=1
)
execute(run, Storage.open(sys.argv[1]), Compute(torch.device("cuda", 0), run.precision))
cached = torch.cuda.memory_reserved()
print(free - torch.cuda.mem_get_info()[0] - cached, torch.cuda.max_memory_allocated())
"""


def big(digits_run: RunConfig) -> RunConfig:
    """Networks and batches that leave the digits' own size behind."""
    return dataclasses.replace(digits_run, overlap=1.0, student="wrn-16-4", teacher="wrn-16-4", global_batch_size=512)


def largest(run: RunConfig, storage: Storage, compute: Compute) -> Timed:
    """What is found of the stage that takes the most memory."""
    timed = [time_part(step_part(run, stage), storage, compute, seconds=0.1) for stage in stages_of(run)]
    return max(timed, key=lambda each: each.peak_bytes)


def test_measured_peak_is_that_of_a_run(digits_run: RunConfig, tmp_path: Path) -> None:
    compute = Compute(torch.device("cuda", 0), "float32")
    times = largest(big(digits_run), Storage.open(tmp_path), compute)
    assert times.total_bytes == torch.cuda.get_device_properties(0).total_memory
    command = [sys.executable, "-c", RUN, str(tmp_path / "run")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    beside, peak = map(int, done.stdout.split())
    assert 0.8 * peak < times.peak_bytes < 1.5 * peak
    assert beside < PROCESS_BYTES  # what a process takes of the GPU beside its tensors


def test_a_larger_batch_takes_more(digits_run: RunConfig, tmp_path: Path) -> None:
    compute = Compute(torch.device("cuda", 0), "float32")
    storage = Storage.open(tmp_path)
    small = largest(dataclasses.replace(big(digits_run), global_batch_size=64), storage, compute)
    large = largest(big(digits_run), storage, compute)
    assert 0 < 2 * small.peak_bytes < large.peak_bytes < large.total_bytes
