"""What a run says of itself: a row an epoch, and how a trial ended that did not come to its last one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self


@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """One epoch of a run, a line of its `metrics.jsonl`.

    Attributes:
        epoch: 1-based, over all stages.
        stage: Name of its stage.
        train_loss: Mean of the global batches' losses, weighted by their images.
        learning_rate: Learning rate of the last step.
        gradient_norm: Mean over the steps of the l2 norm of all parameters' gradients by the global batch's loss, the
            terms' own parameters included.
        gradient_norm_max: The largest of them.
        images_per_second: Training images, validation not counted.
        epoch_s: Seconds with validation.
        finished: Whether it is the run's last.
        val_accuracy: Validation accuracy, in stage embedding of the nearest class mean; none without validation images.
        best_val_accuracy: The best of stage classifier so far.
        best_epoch: Its epoch.
    """

    epoch: int
    stage: str
    train_loss: float
    learning_rate: float
    gradient_norm: float
    gradient_norm_max: float
    images_per_second: float
    epoch_s: float
    finished: bool
    val_accuracy: float | None = None
    best_val_accuracy: float | None = None
    best_epoch: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without what there is not."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; names that are not known are passed over, as of rows that an earlier version wrote.

        Raises:
            ValueError: It is no such row.
        """
        fields = {each.name: each for each in dataclasses.fields(cls)}
        try:
            found = cls(**{name: value for name, value in values.items() if name in fields})
        except (AttributeError, TypeError):
            raise ValueError("not a row of metrics") from None
        if not all(_is_one(getattr(found, name), str(each.type)) for name, each in fields.items()):
            raise ValueError("not a row of metrics")
        return found


def _is_one(value: object, kinds: str) -> bool:
    """Whether a value is of one of the types that an annotation names."""
    name, names = "None" if value is None else type(value).__name__, kinds.split(" | ")
    return name in names or (name == "int" and "float" in names)  # JSON has one kind of number


Report = Callable[[EpochMetrics], None]
"""Takes an epoch's row; may end the run by raising."""


END = "end"
"""Field of a report that says how the trial ended, and is no row."""


@dataclass(frozen=True)
class TrialEnd:
    """Why a trial ended before its last epoch, other than by being stopped.

    Attributes:
        kind: `diverged`: the loss was no longer finite. `failed`: for another reason of its own that would only come
            again. `storage_full`, `data_changed`: no trial of the search can go on.
        reason: A sentence for people.
    """

    kind: Literal["diverged", "failed", "storage_full", "data_changed"]
    reason: str

    @property
    def is_of_all(self) -> bool:
        """Whether no other trial of the search can go on either."""
        return self.kind in ("storage_full", "data_changed")

    def to_dict(self) -> dict[str, str]:
        """Plain data, which a trial reports in place of a row: no name is one of a row's."""
        return {END: self.kind, "end_reason": self.reason}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(kind=values[END], reason=values["end_reason"])
