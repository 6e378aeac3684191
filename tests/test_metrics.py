"""Rows of metrics and ends of trials, as they are written and read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from refilled.metrics import EpochMetrics, TrialEnd

ROW = EpochMetrics(
    epoch=3,
    stage="classifier",
    train_loss=1.25,
    learning_rate=0.1,
    gradient_norm=0.3,
    gradient_norm_max=1 / 3,
    images_per_second=1234.5,
    epoch_s=0.1,
    finished=False,
)
VALIDATED = EpochMetrics(**ROW.to_dict(), val_accuracy=0.5, best_val_accuracy=0.75, best_epoch=2)


@pytest.mark.parametrize("row", [ROW, VALIDATED], ids=["no validation", "validation"])
def test_a_row_is_read_as_it_was_written(row: EpochMetrics) -> None:
    values = json.loads(json.dumps(row.to_dict()))
    assert EpochMetrics.from_dict(values) == row
    assert ("val_accuracy" in values) == (row is VALIDATED)
    assert None not in values.values()


def test_what_other_versions_wrote_beside_is_passed_over() -> None:
    assert EpochMetrics.from_dict(VALIDATED.to_dict() | {"shared": True, "loss": 1.0}) == VALIDATED


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in VALIDATED.to_dict().items() if key != name}


@pytest.mark.parametrize(
    "values",
    [
        *(None, [], [1, 2], "row", 3, {}, {"epoch": 1}),
        *(without(name) for name in ROW.to_dict()),
        *(VALIDATED.to_dict() | {"epoch": epoch} for epoch in ("3", 3.0, None, True)),
        *(VALIDATED.to_dict() | {name: "a"} for name in ("train_loss", "epoch_s", "val_accuracy", "best_epoch")),
        *(VALIDATED.to_dict() | {name: [0.5]} for name in ("train_loss", "val_accuracy")),
        VALIDATED.to_dict() | {"finished": 1},
        VALIDATED.to_dict() | {"stage": 1},
        VALIDATED.to_dict() | {"learning_rate": True},
        VALIDATED.to_dict() | {"train_loss": None},
    ],
)
def test_what_is_no_row_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="not a row of metrics"):
        EpochMetrics.from_dict(values)


def test_a_whole_number_where_a_fraction_stands_is_a_row() -> None:
    """As writers of JSON other than ours have them."""
    assert EpochMetrics.from_dict(VALIDATED.to_dict() | {"val_accuracy": 1}).val_accuracy == 1.0


@pytest.mark.parametrize("kind", ["diverged", "failed", "storage_full"])
def test_an_end_is_read_as_it_was_written(kind: Any) -> None:
    end = TrialEnd(kind, "The loss is nan in epoch 3.")
    assert TrialEnd.from_dict(json.loads(json.dumps(end.to_dict()))) == end
