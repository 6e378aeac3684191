"""What a search varies, as data.

A space is a tuple of `Searched` entries in the order in which they are drawn. An entry that only one kind of schedule
reads is only drawn for that kind, so the sampler never learns from a setting that had no effect. Names are
the dotted names of `RunConfig`, but for `*.schedule.first_milestone`, from which `*.schedule.milestones` follow.

The space is widened to hold the settings of the run it starts from: a search always can, and first does, try those.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna

from refilled.config import Choice, Float, RunConfig, Searched
from refilled.stages import Stage, place_of, stages_of, term_config
from refilled.terms import Term

FIRST_MILESTONE = "schedule.first_milestone"
EDGE = 0.02  # of a range, at both ends


LEARNING_RATE = Float(0.01, 2.0, log=True)
"""The same for every method and stage. In eight recorded tables (analysis/simulator) the best twentieth lay
between 0.1 and 1.2, or, where 0.5 was the end of the range, at that end."""


def _schedule(stage: str) -> tuple[Searched, ...]:
    kind = f"{stage}.schedule.kind"
    return (
        Searched(kind, Choice(("step", "cosine", "one_cycle"))),
        Searched(f"{stage}.schedule.learning_rate", LEARNING_RATE),
        Searched(f"{stage}.schedule.decay", Float(0.05, 0.5, log=True), (kind, ("step",))),
        Searched(f"{stage}.{FIRST_MILESTONE}", Float(0.25, 0.8), (kind, ("step",))),
        Searched(f"{stage}.schedule.final_fraction", Float(1e-3, 0.1, log=True), (kind, ("cosine", "one_cycle"))),
        Searched(f"{stage}.schedule.peak_at", Float(0.1, 0.5), (kind, ("one_cycle",))),
    )


_WEIGHT_DECAY = Searched("optimizer.weight_decay", Float(1e-5, 5e-3, log=True))


def space(run: RunConfig) -> tuple[Searched, ...]:
    """What a search that starts from this run varies; a later entry may depend on an earlier one.

    Every stage has its terms' settings, the weights of all its terms but the first, and a schedule; every method has
    the weight decay. The weight of a whole stage is not searched: under SGD it is a learning rate, and a method with
    one would search a wider range of rates than one without.
    """
    own = _own_settings(run)
    entries: list[Searched] = []
    for stage in stages_of(run):
        entries += [_placed(entry, place_of(term)) for term, entry in searched_of(stage, run)]
        if stage.name == "classifier":
            entries.append(_WEIGHT_DECAY)
        entries += _schedule(stage.name)
    # A term that stands in two stages has one set of settings.
    unique = {entry.name: entry for entry in entries}.values()
    return tuple(
        dataclasses.replace(entry, domain=entry.domain.holding(own[entry.name])) if entry.name in own else entry
        for entry in unique
    )


def searched_of(stage: Stage, run: RunConfig) -> list[tuple[type[Term], Searched]]:
    """What is searched of a stage's terms, each with its term and under the term's own names."""
    leading = {place_of(each.terms[0]) for each in stages_of(run)}  # whose weight is that of a whole stage
    found: list[tuple[type[Term], Searched]] = []
    for term in stage.terms:
        if place_of(term) not in leading and term.weight_space is not None:
            found.append((term, term.weight_space))
        found += [(term, entry) for entry in term.searched(run)]
    return found


def _placed(entry: Searched, place: str) -> Searched:
    """A term's entry under the dotted names of a run."""
    when = None if entry.when is None else (f"{place}.{entry.when[0]}", entry.when[1])
    return dataclasses.replace(entry, name=f"{place}.{entry.name}", when=when)


def sample(trial: optuna.trial.BaseTrial, run: RunConfig) -> dict[str, Any]:
    """Draw one point of the space.

    Args:
        trial: Optuna's trial, which names its parameters as the entries of `space` are named.
        run: The run that the search starts from.

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


@dataclass(frozen=True)
class Edge:
    """A setting of a winner at an end of its range: a better one may lie beyond."""

    name: str
    value: float
    low: float
    high: float


def edges(params: Mapping[str, Any], run: RunConfig) -> list[Edge]:
    """The numbers of a trial that lie within `EDGE` of an end of their range, on the range's own scale.

    Args:
        params: Optuna's parameters of the trial.
        run: The run that the search starts from.
    """
    found = []
    for entry in space(run):
        domain, value = entry.domain, params.get(entry.name)
        if not isinstance(domain, Float) or value is None:
            continue
        low, high, here = domain.low, domain.high, float(value)
        if domain.log:
            low, high, here = math.log(low), math.log(high), math.log(here)
        if high > low and not low + EDGE * (high - low) < here < high - EDGE * (high - low):
            found.append(Edge(entry.name, float(value), domain.low, domain.high))
    return found


def milestones(first: float, count: int) -> tuple[float, ...]:
    """Where a step schedule decays: `count` positions at equal distances from the first to the end, end excluded.

    The usual schedules have this form: (0.5, 0.75), (0.25, 0.5, 0.75), or 150, 180 and 210 of 240 epochs.
    """
    return tuple(round(first + index * (1 - first) / count, 6) for index in range(count))


def _own_settings(run: RunConfig) -> dict[str, Any]:
    """The run's own values under the names of the space; a schedule without milestones has no first one."""
    own = run.flat()
    for stage in stages_of(run):
        for term in stage.terms:
            own |= {f"{place_of(term)}.{name}": value for name, value in term_config(term, run).flat().items()}
    for owner in ("embedding", "classifier"):
        positions = own[f"{owner}.schedule.milestones"]
        if positions:
            own[f"{owner}.{FIRST_MILESTONE}"] = positions[0]
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
