"""A sampler whose every parameter has a random stream of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

ShowHistory = Callable[[optuna.Study, FrozenTrial], tuple[optuna.Study, FrozenTrial]]


class PerParameterSampler(BaseSampler):
    """Draws as another sampler does, whatever was drawn of the trial before.

    A sampler draws the settings that it models together at once, and each of the others when it is asked for, all from
    one stream of random numbers. A driver that takes over a trial which was drawn in part would stand elsewhere in
    that stream. Here the settings drawn together have a sampler of their own, and so has every other setting.

    Args:
        make: Makes the sampler, with a seed that follows from the trial and the text it is given.
        show: The study, and the trial in it, that the sampler is shown in place of the real ones; none: these.
    """

    def __init__(self, make: Callable[[str], BaseSampler], show: ShowHistory | None = None) -> None:
        self._make = make
        self._together = make("")
        self._show = show
        self._seen: tuple[optuna.Study, FrozenTrial] | None = None

    def _shown(self, study: optuna.Study, trial: FrozenTrial) -> tuple[optuna.Study, FrozenTrial]:
        if self._show is None:
            return study, trial
        if self._seen is None:  # one sampler draws one trial, all of it from what is known at its start
            self._seen = self._show(study, trial)
        return self._seen

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """See Optuna."""
        return self._together.infer_relative_search_space(*self._shown(study, trial))

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See Optuna."""
        return self._together.sample_relative(*self._shown(study, trial), search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """See Optuna."""
        shown = self._shown(study, trial)
        return self._make(param_name).sample_independent(*shown, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """See Optuna."""
        self._together.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """See Optuna."""
        self._together.after_trial(study, trial, state, values)
