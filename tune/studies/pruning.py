"""Whether a trial stops early, judged by epoch within its study.

A pruner compares a trial's value at an epoch with what other trials of the study had at the same epoch, and with
nothing else. So it does not matter that a value is nearest-class-mean accuracy in stage embedding and accuracy in stage
classifier: the stages of a study's trials lie at the same epochs. Optuna's own pruners would not do:

- MedianPruner and its kin compare a trial's best value so far, over both stages, and only with complete trials.
- SuccessiveHalvingPruner and HyperbandPruner prune the first trials of a study (the second one goes if it is worse than
  the first, and `bootstrap_count` prunes every trial before the count is reached), remember values of failed trials,
  and so let a trial that is run again after a crash compete with itself.

This one reads nothing but intermediate values of trials that did not fail, so asking again gives the same kind of
answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import optuna
from optuna.pruners import BasePruner, NopPruner
from optuna.trial import FrozenTrial, TrialState

from refilled.config.search import Pruner

# Of the trials at a rung one in this many goes on. A sampler that has found where good settings are draws good ones
# only: there ranks are chance, and stopping every other trial as is usual with halving (a reduction of 2) made searches
# with a Gaussian process take 1.9 times the epochs (550 recorded runs of the digits, 10 seeds). Whoever is last of four
# there is seldom the best.
REDUCTION = 4 / 3
# Where trials are judged, as parts of a run. Classical halving begins at an eighth and would train far less, but there
# a trial's rank says nothing of its end: while learning rates are high, and in stage embedding, the rank correlation
# with the final values was -0.1 to 0.2 on recorded runs of the digits and CIFAR-100, and 0.6 to 0.9 at three quarters.
PARTS = (3 / 4, 5 / 6)
# A cell prunes nothing before this many of its trials have reached a rung: best of two says little.
MIN_TRIALS = 4

Visible = Callable[[FrozenTrial, FrozenTrial], bool]
"""Whether the first trial may be looked at when the second is judged."""


def make_pruner(kind: Pruner, num_epochs: int, *, visible: Visible | None = None) -> BasePruner:
    """The pruner of a study.

    Args:
        kind: Its name; with none nobody is stopped.
        num_epochs: Epochs of a whole run.
        visible: See `HalvingPruner`.
    """
    return NopPruner() if kind == "none" else HalvingPruner(rungs_of(num_epochs), visible=visible)


def rungs_of(num_epochs: int) -> tuple[int, ...]:
    """Epochs at which a run of `num_epochs` epochs is judged; a run of at most 2 epochs never is."""
    return tuple(sorted({min(round(part * num_epochs), num_epochs - 1) for part in PARTS})) if num_epochs > 2 else ()


class HalvingPruner(BasePruner):
    """Asynchronous successive halving: keep a trial that is, at a rung, among the best 1 / reduction of those there.

    Args:
        rungs: Epochs (the steps of the intermediate values) at which trials are judged.
        reduction: One of this many trials goes on, above 1; of n trials ceil(n / reduction) do, and whoever equals the
            last.
        min_trials: Nobody is stopped at a rung that fewer trials have reached, the judged one included.
        visible: Whether another trial may be looked at when a trial is judged (other, trial); none: all may. A search
            whose decisions must not depend on who ended first looks only at trials that ended before this one began.
    """

    def __init__(
        self,
        rungs: tuple[int, ...],
        *,
        reduction: float = REDUCTION,
        min_trials: int = MIN_TRIALS,
        visible: Visible | None = None,
    ) -> None:
        self.rungs, self.reduction, self.min_trials, self._visible = rungs, reduction, min_trials, visible

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial, whose newest intermediate value has just been reported, should stop."""
        epoch = trial.last_step
        if epoch is None or epoch not in self.rungs:
            return False
        rivals = [
            other.intermediate_values[epoch]
            for other in study.get_trials(deepcopy=False)
            if other.state != TrialState.FAIL
            and other.number != trial.number
            and epoch in other.intermediate_values
            and (self._visible is None or self._visible(other, trial))
        ]
        return len(rivals) + 1 >= self.min_trials and self.is_beaten(trial.intermediate_values[epoch], rivals)

    def is_beaten(self, value: float, rivals: Sequence[float]) -> bool:
        """Whether as many rivals are better as may go on."""
        num_going_on = math.ceil((len(rivals) + 1) / self.reduction - 1e-9)  # a whole number may come out a hair above
        return sum(rival > value for rival in rivals) >= num_going_on
