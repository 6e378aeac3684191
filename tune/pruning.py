"""Asynchronous successive halving within one study, judged by epoch."""

from __future__ import annotations

import math

import optuna
from optuna.trial import FrozenTrial, TrialState

# The share kept is 1 / REDUCTION at every rung, and rungs grow by the same factor (Li et al., 2020, use 3 or 4).
REDUCTION = 3
# A cell prunes nothing before this many of its trials have reached a rung: best of two says little.
MIN_TRIALS = 4


def halving_rungs(num_epochs: int, reduction: int = REDUCTION) -> tuple[int, ...]:
    """Epochs at which a run of `num_epochs` epochs is judged: an eighth of it, then `reduction` times that.

    A run of at most 4 epochs is judged once, halfway; a run of one epoch never.
    """
    if num_epochs <= 4:
        return ((num_epochs + 1) // 2,) if num_epochs > 1 else ()
    rungs = [math.ceil(num_epochs / 8)]
    while rungs[-1] * reduction < num_epochs:
        rungs.append(rungs[-1] * reduction)
    return tuple(rungs)


class HalvingPruner(optuna.pruners.BasePruner):
    """Keep a trial that is, at a rung, among the best 1 / reduction of the trials that were there.

    Optuna's SuccessiveHalvingPruner prunes the first trials of a study (the second trial goes if it is worse than the
    first, and its `bootstrap_count` prunes every trial before the count is reached), remembers values of failed
    trials, and so lets a trial that is run again after a crash compete with itself. This one reads nothing but the
    intermediate values of the trials that did not fail, so asking again gives the same kind of answer.

    Args:
        rungs: epochs (the steps of the intermediate values) at which trials are judged.
        reduction: one of this many trials goes on; of n trials ceil(n / reduction) do, and whoever equals the last.
        min_trials: nobody is pruned at a rung that fewer trials have reached.
    """

    def __init__(self, rungs: tuple[int, ...], *, reduction: int = REDUCTION, min_trials: int = MIN_TRIALS) -> None:
        self.rungs, self.reduction, self.min_trials = rungs, reduction, min_trials

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial, whose newest intermediate value has just been reported, should stop."""
        rung = trial.last_step
        if rung is None or rung not in self.rungs:
            return False
        value = trial.intermediate_values[rung]
        others = [
            other.intermediate_values[rung]
            for other in study.get_trials(deepcopy=False)
            if other.state != TrialState.FAIL and other.number != trial.number and rung in other.intermediate_values
        ]
        if len(others) + 1 < self.min_trials:
            return False
        num_kept = math.ceil((len(others) + 1) / self.reduction)
        return sum(other > value for other in others) >= num_kept
