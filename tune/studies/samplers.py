"""Who draws the points of a study.

A sampler is made anew for every trial, with a seed of that trial's own: what is drawn then follows from the study's
trials and the two seeds alone, not from what the process drew before. Two processes that ask at the same state of a
study draw the same point, and a search that is continued draws what it would have drawn.
"""

from __future__ import annotations

import warnings
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial
from threadpoolctl import threadpool_limits

from refilled.config.search import Sampler

LEARNING = ("tpe", "gp")
"""Samplers that look at the trials before."""
NUM_RANDOM = 4
"""Trials, the first ones included, before a Gaussian process draws: few settings matter, and it finds them early."""


def make_sampler(kind: Sampler, *, study_seed: int, trial_seed: int, num_trials: int) -> BaseSampler:
    """The sampler of one trial.

    Args:
        kind: Gp: a Gaussian process over the settings that all trials have which it is shown as complete. tpe:
            multivariate TPE, conditional settings modelled jointly with the rest. random: independent. qmc: the next
            point of a scrambled Sobol sequence over the settings of the study's first trial. gp and qmc draw
            conditional settings independently.
        study_seed: The same for all trials of a study; scrambles the sequence of qmc. Any integer.
        trial_seed: The trial's own; decides everything else that is random. Any integer.
        num_trials: What the study ends with; tpe draws the first quarter of it at random (4 to 10 trials).
    """
    seed = trial_seed % 2**32
    if kind == "tpe":
        with warnings.catch_warnings():
            # `group` is marked experimental since 2021; without it conditional settings are drawn independently.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            num_random = min(10, max(NUM_RANDOM, num_trials // 4))
            return TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=num_random)
    if kind == "gp":
        # It would log a line for every conditional setting: they are drawn independently, as documented above.
        return _OneThreadGP(seed=seed, n_startup_trials=NUM_RANDOM, warn_independent_sampling=False)
    if kind == "qmc":
        with warnings.catch_warnings():
            # The sampler is marked experimental since 2022.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return _FirstTrialQMC(
                scramble=True,
                seed=study_seed % 2**32,
                independent_sampler=RandomSampler(seed=seed),
                # It would log a line for every setting that the first trial did not have, which is meant.
                warn_independent_sampling=False,
            )
    return RandomSampler(seed=seed)


class _OneThreadGP(GPSampler):
    """Computes on one thread: its matrices are small, and threads that wait for each other take cores from trials."""

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See Optuna."""
        with threadpool_limits(limits=1):
            return super().sample_relative(study, trial, search_space)


class _FirstTrialQMC(QMCSampler):
    """One sequence a study, over the settings that its first trial drew, however that trial goes on.

    Optuna's own takes the union over running trials until one has ended: with conditional settings that is a new
    space, hence a new sequence from its start, for every trial drawn meanwhile, and a logged warning for each.
    """

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The settings of the earliest trial that drew any; none for that trial itself."""
        drawn = (other for other in study.get_trials(deepcopy=False) if other.number < trial.number)
        return next((dict(other.distributions) for other in drawn if other.distributions), {})
