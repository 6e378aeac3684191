"""The samplers that `--sampler` knows keep the contract that is shipped for another; broken ones are seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from contract_failures import checks_of, failures
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from refilled.config.search import SAMPLERS
from tune.studies.samplers import LEARNING
from tune.studies.study_store import StudyPlan
from tune.studies.testing import SamplerContract

for _name in SAMPLERS:
    _test = f"Test{_name.title()}"
    globals()[_test] = type(_test, (SamplerContract,), {"sampler": _name, "learns": _name in LEARNING})


class TestTpeOfOnesOwn(SamplerContract):
    learns = True

    def make_sampler(self, plan: StudyPlan, seed: int) -> BaseSampler:
        return TPESampler(seed=seed, n_startup_trials=4)


class _Random(RandomSampler):
    """What the broken ones are made from."""

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        value = super().sample_independent(study, trial, param_name, param_distribution)
        return self.changed(value, study, param_distribution)

    def changed(self, value: Any, study: optuna.Study, distribution: BaseDistribution) -> Any:
        return value


class LeavesTheSpace(_Random):
    def changed(self, value: Any, study: optuna.Study, distribution: BaseDistribution) -> Any:
        return value + distribution.high if isinstance(distribution, FloatDistribution) else value


class IgnoresSteps(_Random):
    def changed(self, value: Any, study: optuna.Study, distribution: BaseDistribution) -> Any:
        return distribution.low + 1 if isinstance(distribution, IntDistribution) else value


class LooksAtTestNumbers(_Random):
    def changed(self, value: Any, study: optuna.Study, distribution: BaseDistribution) -> Any:
        noted = [trial.user_attrs["test_accuracy"] for trial in study.trials if "test_accuracy" in trial.user_attrs]
        return distribution.low if sum(noted) % 1 > 0.5 and isinstance(distribution, FloatDistribution) else value


class SharesAStream(_Random):
    """All studies of a process draw from one stream of numbers."""

    stream = RandomSampler(seed=0)

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._rng = self.stream._rng


class LearnsFromCurves(TPESampler):
    """Of stopped trials, which are shown with a value alone, it learns nothing."""

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        seen = optuna.create_study(direction="maximize")
        seen.add_trials([each for each in study.trials if each.intermediate_values])
        return super().sample_independent(seen, trial, param_name, param_distribution)


def _contract(sampler: type[BaseSampler], *, learns: bool = False, **arguments: Any) -> type[SamplerContract]:
    def make_sampler(self: SamplerContract, plan: StudyPlan, seed: int) -> BaseSampler:
        return sampler(**{"seed": seed} | arguments)

    return type(sampler.__name__, (SamplerContract,), {"make_sampler": make_sampler, "learns": learns})


WHOLE, STOPPED = "it_learns_from_whole_trials", "it_learns_from_trials_that_were_stopped"
SAME, CONTINUED = "same_seed_and_history_give_the_same_draws", "a_search_that_continues_draws_what_it_would_have_drawn"
OTHERS, NOTED = "another_studys_draws_disturb_nothing", "it_does_not_see_test_numbers"
BROKEN: Mapping[str, tuple[type[SamplerContract], set[str]]] = {
    "ignores its seed": (_contract(RandomSampler, seed=None), {SAME, CONTINUED, OTHERS, NOTED}),
    "has one seed for all": (_contract(RandomSampler, seed=0), {"trials_of_a_study_differ"}),
    "leaves the space": (
        _contract(LeavesTheSpace),
        {"draws_lie_in_the_space_of_a_search", "draws_lie_in_any_space"},
    ),
    "ignores steps": (_contract(IgnoresSteps), {"draws_lie_in_any_space"}),
    "looks at test numbers": (_contract(LooksAtTestNumbers), {NOTED}),
    "shares a stream": (_contract(SharesAStream), {SAME, CONTINUED, OTHERS, NOTED}),
    "does not learn": (_contract(RandomSampler, learns=True), {WHOLE, STOPPED}),
    "learns from curves": (_contract(LearnsFromCurves, learns=True, n_startup_trials=4, multivariate=False), {STOPPED}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_it_is_seen(name: str, tmp_path: Path) -> None:
    contract, expected = BROKEN[name]
    assert failures(contract, tmp_path).keys() == expected


def test_every_check_is_seen_to_fail() -> None:
    assert set().union(*(expected for _, expected in BROKEN.values())) == checks_of(SamplerContract)
