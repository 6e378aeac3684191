"""What a change of structure must not change: epochs recorded at 01268ed, when each method was written by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from refilled.execution import execute, run_folder
from refilled.presets import smoke
from refilled.storage import Storage
from refilled.training.compute import Compute

GOLDEN = json.loads((Path(__file__).parent / "golden_runs.json").read_text())


@pytest.mark.parametrize("method", GOLDEN)
def test_a_methods_epochs_are_as_recorded(method: str, storage: Storage) -> None:
    base = smoke().run
    run = dataclasses.replace(
        base,
        method=method,
        overlap=1.0 if method == "kd" else 0.4,
        precision="float64",
        epochs=(3, 4),
        teacher_epochs=5,
        optimizer=dataclasses.replace(base.optimizer, dropout=0.1),
    )
    execute(run, storage, Compute(torch.device("cpu"), "float64"))
    rows = run_folder(run, storage).rows()
    assert len(rows) == len(GOLDEN[method])
    for row, golden in zip(rows, GOLDEN[method], strict=True):
        assert row.stage == golden.pop("stage")
        assert {name: getattr(row, name) for name in golden} == pytest.approx(golden, rel=1e-6)
