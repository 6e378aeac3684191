"""What a search varies, as data.

A space is a tuple of `Searched` entries in the order in which they are drawn. An entry that only one kind of schedule
reads is only drawn for that kind, so the sampler never learns from a setting that had no effect. Names are
the dotted names of `RunConfig`, but for `*.schedule.first_milestone`, from which `*.schedule.milestones` follow.

The space is widened to hold the settings of the run it starts from: a search always can, and first does, try those.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna

from refilled.config import RunConfig

FIRST_MILESTONE = "schedule.first_milestone"


@dataclass(frozen=True)
class Float:
    """A number from an interval, both ends included; uniform, or uniform in its logarithm."""

    low: float
    high: float
    log: bool = False

    def holding(self, value: float) -> Float:
        """The interval, widened to hold a value; a logarithm has no room for 0."""
        if self.log and value <= 0:
            return self
        return dataclasses.replace(self, low=min(self.low, value), high=max(self.high, value))


@dataclass(frozen=True)
class Choice:
    """One of a few unordered values."""

    values: tuple[str | int | float | None, ...]

    def holding(self, value: str | int | float | None) -> Choice:
        """The values and, if it is none of them, the given one."""
        return self if value in self.values else Choice((*self.values, value))


@dataclass(frozen=True)
class Searched:
    """One searched setting: its name, its values, and the setting and values of it that it depends on, if any."""

    name: str
    domain: Float | Choice
    when: tuple[str, tuple[str, ...]] | None = None

    def is_drawn(self, drawn: Mapping[str, Any]) -> bool:
        """Whether the settings drawn before make this one matter."""
        return self.when is None or drawn.get(self.when[0]) in self.when[1]


def _schedule(stage: str) -> tuple[Searched, ...]:
    kind = f"{stage}.schedule.kind"
    return (
        Searched(kind, Choice(("step", "cosine", "one_cycle"))),
        Searched(f"{stage}.schedule.learning_rate", Float(0.01, 0.5, log=True)),
        Searched(f"{stage}.schedule.decay", Float(0.05, 0.5, log=True), (kind, ("step",))),
        Searched(f"{stage}.{FIRST_MILESTONE}", Float(0.25, 0.8), (kind, ("step",))),
        Searched(f"{stage}.schedule.final_fraction", Float(1e-3, 0.1, log=True), (kind, ("cosine", "one_cycle"))),
        Searched(f"{stage}.schedule.peak_at", Float(0.1, 0.5), (kind, ("one_cycle",))),
    )


_COMPARISON = (
    Searched("embedding.temperature", Float(0.1, 4.0, log=True)),
    Searched("embedding.max_negatives", Choice((1, 5, 20, None))),
    Searched("embedding.weight", Float(1.0, 100.0, log=True)),
)
_DISTILLATION = (
    Searched("classifier.distill_weight", Float(0.1, 10.0, log=True)),
    Searched("classifier.temperature", Float(0.5, 8.0, log=True)),
)
_CLASSIFIER_WEIGHT = (Searched("classifier.weight", Float(0.3, 3.0, log=True)),)
_EMBEDDING_SCHEDULE = _schedule("embedding")
# Every method has these. The vanilla student has nothing else: with one loss term its weight is a learning rate.
_COMMON = (Searched("optimizer.weight_decay", Float(1e-5, 5e-3, log=True)), *_schedule("classifier"))

SPACES: Mapping[str, tuple[Searched, ...]] = {
    "student": _COMMON,
    "kd": (*_DISTILLATION, *_COMMON),
    "refilled_emb": (*_COMPARISON, *_EMBEDDING_SCHEDULE, *_COMMON),
    "refilled_lkd": (*_DISTILLATION, *_CLASSIFIER_WEIGHT, *_COMMON),
    "refilled_minus": (*_COMPARISON, *_EMBEDDING_SCHEDULE, *_DISTILLATION, *_CLASSIFIER_WEIGHT, *_COMMON),
    "refilled": (*_COMPARISON, *_EMBEDDING_SCHEDULE, *_DISTILLATION, *_CLASSIFIER_WEIGHT, *_COMMON),
}
"""What is searched for each method, before it is widened by the run a search starts from."""


def space(run: RunConfig) -> tuple[Searched, ...]:
    """What a search that starts from this run varies; a later entry may depend on an earlier one."""
    own = _own_settings(run)
    entries = []
    for entry in SPACES[run.method]:
        if entry.name == "embedding.max_negatives" and run.embedding.tuples == "batch_minimum":
            continue  # there the batch decides how many impostors a tuple has
        held = entry.domain.holding(own[entry.name]) if entry.name in own else entry.domain
        entries.append(dataclasses.replace(entry, domain=held))
    return tuple(entries)


def sample(trial: optuna.trial.BaseTrial, run: RunConfig) -> dict[str, Any]:
    """Draw one point of the space.

    Args:
        trial: Optuna's trial, which names its parameters as the entries of `space` are named.
        run: the run that the search starts from.

    Returns:
        Overrides by dotted name, for `run.with_overrides`.
    """
    drawn: dict[str, Any] = {}
    for entry in space(run):
        if not entry.is_drawn(drawn):
            continue
        if isinstance(entry.domain, Choice):
            drawn[entry.name] = trial.suggest_categorical(entry.name, entry.domain.values)
        else:
            drawn[entry.name] = trial.suggest_float(
                entry.name, entry.domain.low, entry.domain.high, log=entry.domain.log
            )
    return _to_overrides(drawn, run)


def default_point(run: RunConfig) -> dict[str, Any]:
    """The point of the space whose sample is the run itself, as Optuna's parameters.

    Where the space cannot say a setting the nearest value stands for it (0 in a logarithmic interval: its low end),
    or, for a step schedule that never decays, none: the sampler draws it.
    """
    own = _own_settings(run)
    point: dict[str, Any] = {}
    for entry in space(run):
        if entry.name in own and entry.is_drawn(point):
            value = own[entry.name]
            point[entry.name] = max(value, entry.domain.low) if isinstance(entry.domain, Float) else value
    return point


def as_data(run: RunConfig) -> list[dict[str, Any]]:
    """The space as plain data: part of what identifies a study, and what a reader of a finished one wants to see."""
    return [
        {
            "name": entry.name,
            "domain": list(entry.domain.values)
            if isinstance(entry.domain, Choice)
            else {"low": entry.domain.low, "high": entry.domain.high, "log": entry.domain.log},
            "when": None if entry.when is None else [entry.when[0], list(entry.when[1])],
        }
        for entry in space(run)
    ]


def describe(run: RunConfig) -> list[tuple[str, str]]:
    """Name and values of every searched setting, for people."""
    rows = []
    for entry in space(run):
        if isinstance(entry.domain, Choice):
            values = ", ".join("none" if value is None else str(value) for value in entry.domain.values)
        else:
            values = f"{entry.domain.low:g} .. {entry.domain.high:g}{' (log)' if entry.domain.log else ''}"
        rows.append((entry.name, values if entry.when is None else f"{values}, for {' and '.join(entry.when[1])}"))
    return rows


def milestones(first: float, count: int) -> tuple[float, ...]:
    """Where a step schedule decays: `count` positions at equal distances from the first to the end, end excluded.

    The usual schedules have this form: (0.5, 0.75), (0.25, 0.5, 0.75), or 150, 180 and 210 of 240 epochs.
    """
    return tuple(round(first + index * (1 - first) / count, 6) for index in range(count))


def _own_settings(run: RunConfig) -> dict[str, Any]:
    """The run's own values under the names of the space; a schedule without milestones has no first one."""
    own = run.flat()
    for stage in ("embedding", "classifier"):
        positions = own[f"{stage}.schedule.milestones"]
        if positions:
            own[f"{stage}.{FIRST_MILESTONE}"] = positions[0]
    return own


def _to_overrides(drawn: Mapping[str, Any], run: RunConfig) -> dict[str, Any]:
    """Replace the first milestone by all; their number is the starting run's own, or 2 where that has none."""
    own = run.flat()
    overrides: dict[str, Any] = {}
    for name, value in drawn.items():
        if name.endswith(FIRST_MILESTONE):
            target = f"{name.removesuffix(FIRST_MILESTONE)}schedule.milestones"
            overrides[target] = milestones(value, len(own[target]) or 2)
        else:
            overrides[name] = value
    return overrides
