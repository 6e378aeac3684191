"""The history that a sampler is shown: more than the complete trials of its own study.

Optuna's samplers make little of a pruned trial (a Gaussian process nothing), and read one study alone. Here each draw
gets an in-memory study, in which

- a pruned trial has the value that it would probably have ended with, which at late rungs is predictable;
- trials of source cells are there too, shifted to the level of this cell's values, while it has few of its own;
- of a long study's trials only the best and the newest are there.

The study itself is not changed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import optuna
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

# Ended trials of a cell's own, after which those of source cells are left out. Chosen among 0, 8 and 16 on simulated
# searches of the digits: 16 made the slower of two pairs of cells worse, 0 left out what helped the other.
MAX_OWN_TRIALS = 8
# A Gaussian process of more points takes seconds for a draw, in which no other trial is served.
MAX_SHOWN = 100


def history(
    trials: Sequence[FrozenTrial], number: int, source_trials: Mapping[str, Sequence[FrozenTrial]]
) -> tuple[optuna.Study, FrozenTrial]:
    """The study to draw one trial from.

    Args:
        trials: All trials of the cell's study, in order.
        number: Number of the trial that is drawn.
        source_trials: Trials of source cells, by source cell.

    Returns:
        The study, in memory, and its last trial, which stands for the one that is drawn.
    """
    own = [_as_seen(trial, trials) for trial in trials if trial.number < number and _counts(trial)]
    own = _at_most(MAX_SHOWN, own)
    ended = [trial for trial in own if trial.state == TrialState.COMPLETE]
    others = []
    if len(ended) < MAX_OWN_TRIALS:
        others = [each for each_cell in source_trials.values() for each in _on_level(each_cell, ended)]
    storage = InMemoryStorage()
    study_id = storage.create_new_study([StudyDirection.MAXIMIZE])
    for trial in [*others, *own]:
        storage.create_new_trial(study_id, template_trial=trial)
    new = storage.create_new_trial(study_id)
    study = optuna.Study(storage.get_study_name_from_id(study_id), storage)
    return study, storage.get_trial(new)


def _at_most(count: int, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """All, or those that are running, the best and the newest, in order."""
    if len(trials) <= count:
        return list(trials)
    by_value = sorted(range(len(trials)), key=lambda index: trials[index].value or -math.inf)
    kept = {*by_value[-count // 2 :], *range(len(trials) - count // 2, len(trials))}
    return [trial for index, trial in enumerate(trials) if index in kept or trial.state == TrialState.RUNNING]


def _counts(trial: FrozenTrial) -> bool:
    return trial.state in (TrialState.COMPLETE, TrialState.RUNNING) or (
        trial.state == TrialState.PRUNED and bool(trial.intermediate_values)
    )


def _as_seen(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> FrozenTrial:
    """The trial, or a complete one in the place of a pruned one."""
    if trial.state != TrialState.PRUNED:
        return trial
    return _complete(trial, expected_value(trial, trials))


def expected_value(pruned: FrozenTrial, trials: Sequence[FrozenTrial]) -> float:
    """What a pruned trial would probably have ended with.

    It is its last value plus the median gain of complete trials after that epoch, 0 where there are none.
    """
    epoch = max(pruned.intermediate_values)
    gains = [
        trial.value - trial.intermediate_values[epoch]
        for trial in trials
        if trial.state == TrialState.COMPLETE and trial.value is not None and epoch in trial.intermediate_values
    ]
    return pruned.intermediate_values[epoch] + (statistics.median(gains) if gains else 0.0)


def _on_level(source: Sequence[FrozenTrial], own: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """A source cell's trials, shifted by the mean difference of the settings that both cells tried."""
    seen = [_as_seen(trial, source) for trial in source if trial.state != TrialState.RUNNING and _counts(trial)]
    seen = _at_most(MAX_SHOWN, seen)
    differences = [
        (mine.value or 0.0) - (theirs.value or 0.0) for mine in own for theirs in seen if mine.params == theirs.params
    ]
    shift = statistics.mean(differences) if differences else 0.0
    return [_complete(trial, (trial.value or 0.0) + shift) for trial in seen]


def _complete(trial: FrozenTrial, value: float) -> FrozenTrial:
    return create_trial(value=value, params=trial.params, distributions=trial.distributions)
