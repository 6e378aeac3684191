"""Recorded learning curves as a problem: any settings of the space are answered by the nearest recorded ones."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refilled.config import RunConfig
from refilled.errors import UserError
from refilled.metrics import EpochMetrics
from tune.studies.space import FIRST_MILESTONE

CURVES = Path(__file__).resolve().parent / "curves"
STAGES = {"e": "embedding", "c": "classifier"}
Point = Mapping[str, Any]
Array = NDArray[Any]
Row = dict[str, Any]
NOT_RECORDED = dict.fromkeys(
    ("train_loss", "learning_rate", "gradient_norm", "gradient_norm_max", "images_per_second"), 0.0
)


@dataclass(frozen=True)
class Curve:
    """One recorded trial.

    Attributes:
        params: Optuna's parameters, those that were drawn.
        stages: The first letter of each epoch's stage.
        val_accuracy: Validation accuracy by epoch, up to where the loss was no longer finite.
        epoch_s: Mean seconds of an epoch by stage.
    """

    params: Point
    stages: str
    val_accuracy: tuple[float, ...]
    epoch_s: Mapping[str, float]

    @property
    def value(self) -> float:
        """Best validation accuracy over the epochs of stage classifier; 0 where there was none."""
        pairs = zip(self.stages, self.val_accuracy, strict=True)
        return max((value for stage, value in pairs if stage == "c"), default=0.0)

    def rows(self, num_epochs: int) -> list[Row]:
        """What the trial's process reports, in order, as `refilled.training.loop.run` does."""
        rows: list[Row] = []
        best: tuple[float, int] | None = None
        for epoch, (stage, value) in enumerate(zip(self.stages, self.val_accuracy, strict=True), start=1):
            if stage == "c" and (best is None or value > best[0]):
                best = value, epoch
            row = EpochMetrics(
                **NOT_RECORDED,
                epoch=epoch,
                stage=STAGES[stage],
                epoch_s=self.epoch_s[STAGES[stage]],
                finished=epoch == num_epochs,
                val_accuracy=value,
                best_val_accuracy=None if best is None else best[0],
                best_epoch=None if best is None else best[1],
            )
            rows.append(row.to_dict() | {"training_iteration": epoch})
        return rows


class Table:
    """A problem that was recorded.

    The distance of two settings is the sum, over the settings that both have, of weight times squared difference: of a
    number as a share of its interval (of its logarithm where the space is logarithmic), of a choice 0 if equal, else 1.
    So settings that another kind of schedule does not have count nothing, and the kind itself counts 1. The earliest of
    equals answers.

    A weight is the importance of the setting in a forest of trees that was fitted to the ranks of the recorded values.
    In a dozen dimensions a few hundred points are far from each other, and with equal weights the nearest is as good as
    random in the few settings that matter: `agreement` says how well neighbours agree, with weights and without.

    Args:
        name: The name of the problem.
        run: Its own settings, from which a search of it starts.
        space: The space, as `tune.studies.space.as_data` gives it.
        curves: One or more; the first is the run itself.
        is_weighted: False gives every setting the weight 1.
    """

    def __init__(
        self,
        name: str,
        run: RunConfig,
        space: Sequence[Mapping[str, Any]],
        curves: Sequence[Curve],
        *,
        is_weighted: bool = True,
    ) -> None:
        self.name, self.run, self.space, self.curves = name, run, tuple(space), tuple(curves)
        self.is_weighted = is_weighted
        self._grid: Sequence[Table] = (self,)
        self.num_epochs = max(len(curve.val_accuracy) for curve in curves)

    @classmethod
    def load(cls, name: str, folder: Path = CURVES, *, is_weighted: bool = True) -> Table:
        """A table that `record.py` wrote.

        Raises:
            UserError: There is none of that name.
        """
        path = folder / f"{name}.json.gz"
        if not path.exists():
            recorded = ", ".join(sorted(each.name.removesuffix(".json.gz") for each in folder.glob("*.json.gz")))
            raise UserError(f"tables must be recorded ones in {folder} ({recorded or 'it has none'}), got {name!r}.")
        stored = json.loads(gzip.decompress(path.read_bytes()))
        curves = [
            Curve(each["params"], each["stages"], tuple(each["val_accuracy"]), each["epoch_s"])
            for each in stored["trials"]
        ]
        run = RunConfig.from_dict(stored["run"])
        return cls(stored["problem"], run, stored["space"], curves, is_weighted=is_weighted)

    @classmethod
    def load_grid(cls, names: Sequence[str], folder: Path = CURVES, *, is_weighted: bool = True) -> list[Table]:
        """Tables of neighbouring cells, in which the same recorded settings answer for the same settings.

        Raises:
            UserError: Other settings were recorded for one of them.
        """
        tables = [cls.load(name, folder, is_weighted=is_weighted) for name in names]
        size = min(len(table.curves) for table in tables)
        tables = [shortened(table, size) for table in tables]
        for table in tables:
            recorded = [curve.params for curve in table.curves]
            if recorded != [curve.params for curve in tables[0].curves] or table.space != tables[0].space:
                raise UserError(f"tables must be recorded at the same settings in a grid, got {', '.join(names)}.")
            table._grid = tables
        return tables

    @cached_property
    def best(self) -> float:
        """The highest value of a whole curve."""
        return max(curve.value for curve in self.curves if len(curve.val_accuracy) == self.num_epochs)

    def target(self, share: float) -> float:
        """The value that counts as found: a share of the best known."""
        return share * self.best

    @cached_property
    def epoch_s(self) -> Mapping[str, float]:
        """Median over the trials of the seconds of an epoch, by stage."""
        found: dict[str, list[float]] = {}
        for curve in self.curves:
            for stage, seconds in curve.epoch_s.items():
                found.setdefault(stage, []).append(seconds)
        return {stage: float(np.median(each)) for stage, each in found.items()}

    def nearest(self, point: Point, *, without: Collection[int] = ()) -> int:
        """Position of the nearest recorded settings.

        Args:
            point: Optuna's parameters of a trial.
            without: Positions that may not answer.
        """
        encoded = self._encode(point)
        both = self._known & ~np.isnan(encoded)
        difference = np.where(both, self._encoded - np.nan_to_num(encoded), 0.0)
        squares = np.where(self._is_choice, difference != 0, difference**2)
        distances = squares @ self.weights
        distances[list(without)] = math.inf
        return int(np.argmin(distances))

    def agreement(self) -> float:
        """Spearman's rank correlation between the values of the recorded trials and those of their nearest others."""
        from scipy.stats import spearmanr

        values = np.array([curve.value for curve in self.curves])
        nearest = [self.nearest(curve.params, without=(index,)) for index, curve in enumerate(self.curves)]
        return float(spearmanr(values, values[nearest]).statistic)

    @cached_property
    def weights(self) -> Array:
        """Weight of every setting in the distance, 1 on average; the same for all tables of a grid."""
        return np.asarray(np.mean([table._own_weights for table in self._grid], axis=0))

    @cached_property
    def _own_weights(self) -> Array:
        if not self.is_weighted:
            return np.ones(len(self.space))
        from scipy.stats import rankdata
        from sklearn.ensemble import ExtraTreesRegressor

        forest = ExtraTreesRegressor(n_estimators=200, min_samples_leaf=3, random_state=0)
        forest.fit(np.where(self._known, self._encoded, -1.0), rankdata([curve.value for curve in self.curves]))
        return np.asarray(forest.feature_importances_) * len(self.space)

    @cached_property
    def _is_choice(self) -> Array:
        return np.array([isinstance(entry["domain"], list) for entry in self.space])

    @cached_property
    def _known(self) -> Array:
        return ~np.isnan(self._filled)

    @cached_property
    def _filled(self) -> Array:
        return np.array([self._encode(curve.params) for curve in self.curves])

    @cached_property
    def _encoded(self) -> Array:
        return np.nan_to_num(self._filled)

    def _encode(self, point: Point) -> Array:
        """One number a setting of the space, NaN where the point does not have it."""
        return np.array([_encode(entry["domain"], point, entry["name"]) for entry in self.space])


class Answers:
    """Which recorded trials answer in one search of a table: every one once, then all of them once more.

    Training again at almost the same settings gives another value, by about as much as good settings differ. If the
    nearest recorded trial always answered, a search that stays where settings are good would get the same few values
    for ever. The same settings get the same answer.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self._by_point: dict[frozenset[tuple[str, Any]], int] = {}
        self._taken: set[int] = set()

    def curve(self, point: Point) -> Curve:
        """Of the nearest settings that have not answered yet."""
        key = frozenset(point.items())
        if key not in self._by_point:
            if len(self._taken) == len(self._table.curves):
                self._taken.clear()
            self._by_point[key] = self._table.nearest(point, without=self._taken)
            self._taken.add(self._by_point[key])
        return self._table.curves[self._by_point[key]]


def point_of(overrides: Point) -> Point:
    """Optuna's parameters of what `space.sample` returned: a step schedule's milestones follow from the first."""
    point = {}
    for name, value in overrides.items():
        if name.endswith("schedule.milestones"):
            point[f"{name.partition('.')[0]}.{FIRST_MILESTONE}"] = value[0]
        else:
            point[name] = value
    return point


def shortened(table: Table, num_curves: int) -> Table:
    """The table of the first curves only."""
    curves = table.curves[:num_curves]
    return Table(table.name, table.run, table.space, curves, is_weighted=table.is_weighted)


def _encode(domain: Any, point: Point, name: str) -> float:
    if name not in point:
        return math.nan
    value = point[name]
    if isinstance(domain, list):
        return float(domain.index(value))
    low, high = domain["low"], domain["high"]
    if domain["log"]:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return float((value - low) / (high - low))
