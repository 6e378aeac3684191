"""What a run left behind, as tests compare it, and how tests interrupt one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from refilled.metrics import EpochMetrics, Report
from refilled.storage.run_folder import RunFolder
from refilled.storage.tensor_file import load_tensors

TIMES = ("images_per_second", "epoch_s")
TOLERANCE = {"rel": 1e-9, "abs": 1e-12}  # of float64 numbers that workers add in another order (invariant 2)


def without_times(row: EpochMetrics) -> dict[str, Any]:
    """What a row says but what a clock said."""
    return {name: value for name, value in row.to_dict().items() if name not in TIMES}


def rows_without_times(folder: RunFolder) -> list[dict[str, Any]]:
    """Of all epochs that the folder has."""
    return [without_times(row) for row in folder.rows()]


def weights(folder: RunFolder) -> dict[str, Tensor]:
    """Of the finished student."""
    found: dict[str, Tensor] = load_tensors(folder.model_path)["weights"]
    return found


def assert_same_outcome(folder: RunFolder, expected: RunFolder) -> None:
    """Every number of every epoch and every weight is the same."""
    assert rows_without_times(folder) == rows_without_times(expected)
    ours, theirs = weights(folder), weights(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def assert_close_outcome(folder: RunFolder, expected: RunFolder) -> None:
    """The same within `TOLERANCE`."""
    assert_close_rows(rows_without_times(folder), rows_without_times(expected))
    torch.testing.assert_close(weights(folder), weights(expected), rtol=1e-9, atol=1e-9)


def assert_close_rows(rows: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> None:
    """Every number of every epoch is the same within `TOLERANCE`, and the stages are."""
    assert [row["stage"] for row in rows] == [row["stage"] for row in expected]
    for row, expected_row in zip(rows, expected, strict=True):
        assert row | {"stage": 0} == pytest.approx(expected_row | {"stage": 0}, **TOLERANCE)


def row_of(epoch: int, **changes: Any) -> EpochMetrics:
    """A row of an epoch like any other."""
    plain = {
        "stage": "classifier",
        "train_loss": 1.0,
        "learning_rate": 0.1,
        "gradient_norm": 1.0,
        "gradient_norm_max": 2.0,
        "images_per_second": 1000.0,
        "epoch_s": 1.0,
        "finished": False,
        "val_accuracy": 0.5,
        "best_val_accuracy": 0.5,
        "best_epoch": 1,
    }
    return EpochMetrics(epoch=epoch, **(plain | changes))


class Interruption(BaseException):
    """Ends a run between two epochs."""


def interrupt_at(epoch: int) -> Report:
    """Ends a run by an `Interruption` when it reports this epoch."""

    def interrupt(row: EpochMetrics) -> None:
        if row.epoch == epoch:
            raise Interruption

    return interrupt
