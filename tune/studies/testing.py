"""What must hold of a sampler, as a test class to inherit."""

from __future__ import annotations

import math
import random
import statistics
import unittest
import zlib
from collections.abc import Callable
from typing import Any, ClassVar

import numpy
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from refilled.config import RunConfig
from refilled.config.search import SAMPLERS
from refilled.stages import complete
from tune.studies.cell_study import CellStudy, Rules
from tune.studies.per_parameter_sampler import PerParameterSampler
from tune.studies.samplers import make_sampler
from tune.studies.space import space
from tune.studies.study_store import StudyPlan

RATE = "classifier.schedule.learning_rate"
NUM_TOLD = 9  # trials of a study, of which learning samplers draw the first four at random
NUM_HISTORY = 24  # trials to learn from


class SamplerContract:
    """Inherit it, say how a sampler is made, and pytest runs the checks.

        class TestMine(SamplerContract):
            learns = True

            def make_sampler(self, plan, seed):
                return optuna.samplers.TPESampler(seed=seed % 2**32, multivariate=True)

    It is asked as in a search: made anew for every draw, through `Rules.make_sampler`, and shown what
    `tune.studies.history` makes of a study.
    """

    sampler: ClassVar[str] = ""
    """One that `--sampler` knows, in the place of `make_sampler`."""
    learns: ClassVar[bool] = False
    """Whether it draws near what was good before."""

    def make_sampler(self, plan: StudyPlan, seed: int) -> BaseSampler:
        """The sampler of one draw; see `Rules.make_sampler`."""
        assert self.sampler in SAMPLERS, "name a sampler, or override make_sampler"
        return make_sampler(self.sampler, study_seed=1, trial_seed=seed, num_trials=plan.num_trials)  # type: ignore[arg-type]

    # ---- where it draws

    def test_draws_lie_in_the_space_of_a_search(self) -> None:
        """Settings that the others call for, and no others, each within its bounds."""
        for method in ("student", "refilled"):
            study = self._study(_plan("cell", method))
            for trial in _run(study, NUM_TOLD):
                entries = [entry for entry in space(study.plan.run) if entry.is_drawn(trial.params)]
                odd = sorted(trial.params.keys() ^ {entry.name for entry in entries})
                assert not odd, f"these are drawn though nothing asks for them, or are not: {odd}"
                outside = [n for n, each in trial.distributions.items() if not _holds(each, trial.params[n])]
                assert not outside, f"these are drawn out of their bounds: {outside} of {trial.params}"

    def test_draws_lie_in_any_space(self) -> None:
        """Integers, steps, logarithms and choices, in a study of one trial and of many."""
        plan = _plan("cell")
        study = optuna.create_study(direction="maximize")
        for number in range(NUM_TOLD):
            study.sampler = self._keyed(plan, number)
            trial = study.ask(_ANY_SPACE)
            for name, distribution in _ANY_SPACE.items():
                assert _holds(distribution, trial.params[name]), (
                    f"{name} = {trial.params[name]} is not in {distribution}"
                )
            study.tell(trial, float(trial.params["integer"]))

    def test_trials_of_a_study_differ(self) -> None:
        """Each has a seed of its own."""
        trials = _run(self._study(_plan("cell")), NUM_TOLD)
        rates = [trial.params[RATE] for trial in trials]
        assert len(set(rates)) > NUM_TOLD // 2, f"{NUM_TOLD} trials have only the learning rates {sorted(set(rates))}"

    # ---- what it depends on

    def test_same_seed_and_history_give_the_same_draws(self) -> None:
        """Whatever the process drew before: a search that continues draws what it would have drawn."""
        drawn = []
        for number in range(2):
            random.seed(number)
            numpy.random.seed(number)  # the generator that a sampler without a seed may use
            drawn.append([trial.params for trial in _run(self._study(_plan("cell")), NUM_TOLD)])
        odd = [number for number, pair in enumerate(zip(*drawn, strict=True)) if pair[0] != pair[1]]
        assert not odd, f"trials {odd} differ the second time"

    def test_a_search_that_continues_draws_what_it_would_have_drawn(self) -> None:
        """Nothing that a draw depends on is kept outside the study."""
        expected = [trial.params for trial in _run(self._study(_plan("cell")), NUM_TOLD)][-1]
        storage = InMemoryStorage()
        _run(self._study(_plan("cell"), storage), NUM_TOLD - 1)
        (found,) = _run(self._study(_plan("cell"), storage), 1)
        assert found.params == expected, f"a new process draws {found.params}, not {expected}"

    def test_another_studys_draws_disturb_nothing(self) -> None:
        """Cells are drawn in turn, in one process and one storage."""
        alone = [trial.params for trial in _run(self._study(_plan("cell")), NUM_TOLD)]
        storage = InMemoryStorage()
        study, other = self._study(_plan("cell"), storage), self._study(_plan("other"), storage)
        beside = []
        for _ in range(NUM_TOLD):
            _run(other, 1)
            beside += [trial.params for trial in _run(study, 1)]
        assert beside == alone, "the draws of a study change with those of another"

    def test_it_does_not_see_test_numbers(self) -> None:
        """Nor anything else that is noted beside a trial: values of validation are what there is to learn from."""
        drawn = []
        for seed in range(2):
            noted = random.Random(seed)

            def note(trial: optuna.Trial, noted: random.Random = noted) -> None:
                trial.set_user_attr("test_accuracy", noted.random())

            drawn.append([trial.params for trial in _run(self._study(_plan("cell")), NUM_TOLD, note=note)])
        assert drawn[0] == drawn[1], "draws change with what is noted beside the trials"

    # ---- what it learns

    def test_it_learns_from_trials_that_were_stopped(self) -> None:
        """They are shown with the value that they would probably have ended with."""
        self._assert_learns(TrialState.PRUNED)

    def test_it_learns_from_whole_trials(self) -> None:
        """Draws go where values were high."""
        self._assert_learns(TrialState.COMPLETE)

    # ----

    def _rules(self, seed: int) -> Rules:
        by_name = Rules(seed=seed, pruner="none", sampler=self.sampler)  # type: ignore[arg-type]
        return by_name if self.sampler else Rules(seed=seed, pruner="none", make_sampler=self.make_sampler)

    def _keyed(self, plan: StudyPlan, number: int) -> PerParameterSampler:
        return PerParameterSampler(lambda what: self.make_sampler(plan, zlib.crc32(f"{number} {what}".encode())))

    def _study(self, plan: StudyPlan, storage: BaseStorage | None = None, seed: int = 0) -> CellStudy:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return CellStudy(plan, storage or InMemoryStorage(), self._rules(seed))

    def _assert_learns(self, state: TrialState) -> None:
        if not self.learns:
            raise unittest.SkipTest("this sampler does not learn")
        low, high = 0.03, 0.7
        means = [statistics.mean(self._drawn_after(state, peak, seed) for seed in range(4)) for peak in (low, high)]
        apart = (means[1] - means[0]) / math.log(high / low)
        assert apart > 0.3, (
            f"rates near {low} or near {high} were good, and draws after trials that are {state.name} are near "
            f"{math.exp(means[0]):.2f} or near {math.exp(means[1]):.2f}"
        )

    def _drawn_after(self, state: TrialState, peak: float, seed: int) -> float:
        """Logarithm of the learning rate that is drawn when rates near a peak were good."""
        storage, plan = InMemoryStorage(), _plan("cell")
        told = CellStudy(plan, storage, Rules(sampler="random", pruner="none"))
        _run(told, NUM_HISTORY, peak=peak, state=state)
        (trial,) = _run(self._study(plan, storage, seed), 1)
        return math.log(trial.params[RATE])


_ANY_SPACE: dict[str, BaseDistribution] = {
    "integer": IntDistribution(2, 9),
    "even": IntDistribution(2, 10, step=2),
    "power": IntDistribution(1, 512, log=True),
    "float": FloatDistribution(-1.0, 1.0),
    "quarter": FloatDistribution(0.0, 1.0, step=0.25),
    "log": FloatDistribution(1e-5, 1e-2, log=True),
    "choice": CategoricalDistribution((1, 5, None)),
    "single": IntDistribution(3, 3),
}


def _plan(key: str, method: str = "student") -> StudyPlan:
    run = complete(RunConfig(method=method, epochs=(1, 1)))
    return StudyPlan(key=key, name=key, run=run, num_trials=16, num_epochs=2)


def _run(
    study: CellStudy,
    count: int,
    *,
    peak: float = 0.1,
    state: TrialState = TrialState.COMPLETE,
    note: Callable[[optuna.Trial], None] | None = None,
) -> list[FrozenTrial]:
    """Run trials one by one; values are higher the nearer the learning rate is to a peak."""
    ended = []
    for _ in range(count):
        trial = study.next_trial(1)
        assert trial is not None
        value = 1 - abs(math.log(trial.params[RATE] / peak)) / 5
        trial.report(value, 1)
        if note is not None:
            note(trial)
        ended.append(study.study.tell(trial, value if state == TrialState.COMPLETE else None, state=state))
        study.ended(is_done=True, epochs=1)
    return ended


def _holds(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a value is one of a distribution's."""
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    if not distribution.low <= value <= distribution.high:
        return False
    steps = (value - distribution.low) / (distribution.step or 1)
    is_stepped = distribution.step is not None and not distribution.log
    return not is_stepped or abs(steps - round(steps)) < 1e-9
