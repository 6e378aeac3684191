"""Who stops trials early, within one study, judged by epoch.

A pruner compares a trial's value at an epoch with what other trials of the study had at the same epoch, and with
nothing else. So it does not matter that a value is nearest-class-mean accuracy in stage embedding and accuracy in stage
classifier: the stages of a study's trials lie at the same epochs. Optuna's own pruners would not do:

- MedianPruner and its kin compare a trial's best value so far, over both stages, and only with complete trials.
- SuccessiveHalvingPruner and HyperbandPruner prune the first trials of a study (the second one goes if it is worse than
  the first, and `bootstrap_count` prunes every trial before the count is reached), remember values of failed trials,
  and so let a trial that is run again after a crash compete with itself.

These read nothing but intermediate values of trials that did not fail, so asking again gives the same kind of answer.
"""

from __future__ import annotations

import math
import statistics
from abc import abstractmethod
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
HYPERBAND_REDUCTION = 2.0
# Where trials are judged, as parts of a run. Classical halving begins at an eighth and would train far less, but there
# a trial's rank says nothing of its end: while learning rates are high, and in stage embedding, the rank correlation
# with the final values was -0.1 to 0.2 on recorded runs of the digits and CIFAR-100, and 0.6 to 0.9 at three quarters.
HALVING_PARTS = (3 / 4, 5 / 6)
MEDIAN_PARTS = (2 / 3, 5 / 6)
# A cell prunes nothing before this many of its trials have reached a rung: best of two says little.
MIN_TRIALS = 4

Visible = Callable[[FrozenTrial, FrozenTrial], bool]
"""Whether the first trial may be looked at when the second is judged."""


def make_pruner(
    kind: Pruner,
    num_epochs: int,
    *,
    rungs: Sequence[int] | None = None,
    reduction: float | None = None,
    min_trials: int = MIN_TRIALS,
    visible: Visible | None = None,
) -> BasePruner:
    """The pruner of a study.

    Args:
        kind: halving: `HalvingPruner`. hyperband: `HyperbandPruner`. median: `MedianPruner`. none: nobody is stopped.
        num_epochs: epochs of a whole run.
        rungs: epochs at which trials are judged; none: those of `halving_rungs` or `median_rungs`.
        reduction: of halving and hyperband, see `HalvingPruner`; none: each its own.
        min_trials: nobody is stopped at a rung that fewer trials have reached, the judged one included.
        visible: see `RungPruner`.
    """
    if kind == "none":
        return NopPruner()
    if kind == "median":
        rungs = median_rungs(num_epochs) if rungs is None else rungs
        return MedianPruner(tuple(rungs), min_trials=min_trials, visible=visible)
    pruner, own_reduction = (HalvingPruner, REDUCTION) if kind == "halving" else (HyperbandPruner, HYPERBAND_REDUCTION)
    rungs = halving_rungs(num_epochs) if rungs is None else rungs
    reduction = own_reduction if reduction is None else reduction
    return pruner(tuple(rungs), reduction=reduction, min_trials=min_trials, visible=visible)


def halving_rungs(num_epochs: int) -> tuple[int, ...]:
    """Epochs at which a run of `num_epochs` epochs is judged by halving; a run of at most 2 epochs never is."""
    return _rungs(num_epochs, HALVING_PARTS)


def median_rungs(num_epochs: int) -> tuple[int, ...]:
    """Epochs at which a run of `num_epochs` epochs is judged by the median; a run of at most 2 epochs never is."""
    return _rungs(num_epochs, MEDIAN_PARTS)


def _rungs(num_epochs: int, parts: Sequence[float]) -> tuple[int, ...]:
    return tuple(sorted({min(round(part * num_epochs), num_epochs - 1) for part in parts})) if num_epochs > 2 else ()


class RungPruner(BasePruner):
    """Judges a trial at a few epochs by the values that its rivals had there.

    Args:
        rungs: epochs (the steps of the intermediate values) at which trials are judged.
        min_trials: nobody is stopped at a rung that fewer trials have reached, the judged one included.
        visible: whether another trial may be looked at when a trial is judged (other, trial); none: all may. A search
            whose decisions must not depend on who ended first looks only at trials that ended before this one began.
    """

    def __init__(self, rungs: tuple[int, ...], *, min_trials: int = MIN_TRIALS, visible: Visible | None = None) -> None:
        self.rungs, self.min_trials, self._visible = rungs, min_trials, visible

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial, whose newest intermediate value has just been reported, should stop."""
        epoch = trial.last_step
        if epoch is None or epoch not in self.rungs_of(trial):
            return False
        rivals = [
            other.intermediate_values[epoch]
            for other in study.get_trials(deepcopy=False)
            if other.state != TrialState.FAIL
            and other.number != trial.number
            and epoch in other.intermediate_values
            and self.are_rivals(other, trial)
            and (self._visible is None or self._visible(other, trial))
        ]
        return len(rivals) + 1 >= self.min_trials and self.is_beaten(trial.intermediate_values[epoch], rivals)

    def rungs_of(self, trial: FrozenTrial) -> tuple[int, ...]:
        """The epochs at which this trial is judged."""
        return self.rungs

    def are_rivals(self, other: FrozenTrial, trial: FrozenTrial) -> bool:
        """Whether two trials are compared."""
        return True

    @abstractmethod
    def is_beaten(self, value: float, rivals: Sequence[float]) -> bool:
        """Whether a value is too low beside those of its rivals."""


class HalvingPruner(RungPruner):
    """Asynchronous successive halving: keep a trial that is, at a rung, among the best 1 / reduction of those there.

    Args:
        rungs: as in `RungPruner`, like `min_trials` and `visible`.
        reduction: one of this many trials goes on, above 1; of n trials ceil(n / reduction) do, and whoever equals the
            last.
    """

    def __init__(
        self,
        rungs: tuple[int, ...],
        *,
        reduction: float,
        min_trials: int = MIN_TRIALS,
        visible: Visible | None = None,
    ) -> None:
        super().__init__(rungs, min_trials=min_trials, visible=visible)
        self.reduction = reduction

    def is_beaten(self, value: float, rivals: Sequence[float]) -> bool:
        """Whether as many rivals are better as may go on."""
        num_going_on = math.ceil((len(rivals) + 1) / self.reduction - 1e-9)  # a whole number may come out a hair above
        return sum(rival > value for rival in rivals) >= num_going_on


class HyperbandPruner(HalvingPruner):
    """Halving in several brackets that begin at different rungs (Li et al., 2018), in case early values mislead.

    Bracket 0 is judged at all rungs, the next one not at the first, and so on; the last one is never judged. A trial
    competes within its bracket alone, and which one that is follows from its number. A bracket with s rungs gets
    reduction^s / (s + 1) parts of the trials, so that all brackets train about as many epochs. With two rungs that is
    4, 3 and 3 of 10: a study of few trials stops few of them.
    """

    def rungs_of(self, trial: FrozenTrial) -> tuple[int, ...]:
        """The rungs of the trial's bracket."""
        return self.rungs[self.bracket_of(trial) :]

    def are_rivals(self, other: FrozenTrial, trial: FrozenTrial) -> bool:
        """Whether the trials are of one bracket."""
        return self.bracket_of(other) == self.bracket_of(trial)

    def bracket_of(self, trial: FrozenTrial) -> int:
        """The trial's bracket; multiples of the golden ratio spread every bracket's share evenly over the numbers."""
        shares = [self.reduction**size / (size + 1) for size in range(len(self.rungs), -1, -1)]
        position = (trial.number + 0.5) * (math.sqrt(5) - 1) / 2 % 1 * sum(shares)
        bracket = 0
        while bracket + 1 < len(shares) and position >= sum(shares[: bracket + 1]):
            bracket += 1
        return bracket


class MedianPruner(RungPruner):
    """Stop a trial whose value at a rung is below the median of the others that were there (Golovin et al., 2017).

    Trials that stopped earlier have no value at later rungs, so the longer a study, the better one must be to go on.
    """

    def is_beaten(self, value: float, rivals: Sequence[float]) -> bool:
        """Whether the value is below the median."""
        return value < statistics.median(rivals)
