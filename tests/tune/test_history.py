"""What samplers are shown of a study, and of its neighbours'."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterable

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from outcomes import row_of

from refilled.config import RunConfig
from tune.studies.cell_study import CellStudy
from tune.studies.history import MAX_OWN_TRIALS, MAX_SHOWN, expected_value, history
from tune.studies.per_parameter_sampler import PerParameterSampler
from tune.studies.samplers import make_sampler
from tune.studies.searcher import Rules, StudyPlan, StudyScheduler, StudySearcher

RATE = "classifier.schedule.learning_rate"
DISTRIBUTION = FloatDistribution(0.01, 0.5, log=True)
optuna.logging.set_verbosity(optuna.logging.WARNING)


def trial(
    rate: float, value: float | None, state: TrialState = TrialState.COMPLETE, told: Iterable[float] = ()
) -> FrozenTrial:
    return create_trial(
        state=state,
        value=value,
        params={RATE: rate},
        distributions={RATE: DISTRIBUTION},
        intermediate_values=dict(enumerate(told, start=1)),
    )


def numbered(*trials: FrozenTrial) -> list[FrozenTrial]:
    for number, each in enumerate(trials):
        each.number = number
    return list(trials)


OWN = numbered(
    trial(0.1, 0.8, told=(0.1, 0.5, 0.8)),
    trial(0.2, 0.9, told=(0.3, 0.4, 0.9)),
    trial(0.05, None, TrialState.PRUNED, told=(0.2, 0.3)),
    trial(0.4, None, TrialState.FAIL, told=(0.2,)),
    trial(0.3, None, TrialState.PRUNED),
    trial(0.02, None, TrialState.RUNNING),
    trial(0.03, 0.1, told=(0.1, 0.1, 0.1)),
)


def shown(study: optuna.Study) -> list[tuple[float, float | None, str]]:
    return [(each.params[RATE], each.value, each.state.name) for each in study.trials[:-1]]


def test_a_stopped_trial_is_shown_with_the_value_it_would_probably_have_had() -> None:
    assert expected_value(OWN[2], OWN) == pytest.approx(0.3 + 0.3)  # of gains 0.3, 0.5 and 0.0 after epoch 2
    assert expected_value(OWN[2], OWN[2:3]) == 0.3
    study, drawn = history(OWN, 6, {})
    assert shown(study) == [
        (0.1, 0.8, "COMPLETE"),
        (0.2, 0.9, "COMPLETE"),
        (0.05, pytest.approx(0.6), "COMPLETE"),
        (0.02, None, "RUNNING"),
    ]
    assert drawn.number == 4
    assert drawn.state == TrialState.RUNNING
    assert [each.state.name for each in OWN[2:5]] == ["PRUNED", "FAIL", "PRUNED"]  # the study is as it was


def test_neighbours_trials_are_shown_on_the_level_of_the_cell() -> None:
    given = numbered(
        trial(0.1, 0.5), trial(0.2, 0.7), trial(0.15, 0.65), trial(0.5, None, TrialState.RUNNING), trial(0.4, 0.3)
    )
    study, _ = history(OWN, 7, {"neighbour": given})
    # the same settings came to 0.3 and 0.2 more here
    levels = [(0.1, 0.75), (0.2, 0.95), (0.15, 0.9), (0.4, 0.55)]
    assert shown(study)[:4] == [(rate, pytest.approx(value), "COMPLETE") for rate, value in levels]
    assert len(shown(study)) == 4 + 5


def test_a_cell_with_trials_enough_of_its_own_does_not_ask_its_neighbours() -> None:
    given = {"neighbour": numbered(trial(0.1, 0.5))}
    own = numbered(*(trial(0.1, 0.5) for _ in range(MAX_OWN_TRIALS)))
    assert len(history(own, MAX_OWN_TRIALS - 1, given)[0].trials) == MAX_OWN_TRIALS + 1
    assert len(history(own, MAX_OWN_TRIALS, given)[0].trials) == MAX_OWN_TRIALS + 1


def test_of_a_long_study_the_best_and_the_newest_are_shown() -> None:
    values = [0.5] * 10 + [0.9] * 10 + [0.4] * 200 + [0.1]
    own = numbered(*(trial(0.1, value) for value in values), trial(0.2, None, TrialState.RUNNING))
    study, _ = history(own, len(own), {})
    assert len(study.trials) <= MAX_SHOWN + 1
    found = [each.value for each in study.trials[:-1]]
    assert found.count(0.9) == found.count(0.5) == 10
    assert found[-2:] == [0.1, None]


@pytest.mark.parametrize("kind", ["gp", "tpe"])
def test_samplers_learn_from_what_they_are_shown(kind: str) -> None:
    """From stopped trials alone, of which a Gaussian process that looks at the study itself learns nothing."""
    draws = random.Random(0)
    rates = [math.exp(draws.uniform(math.log(0.01), math.log(0.5))) for _ in range(24)]
    stopped = numbered(*(trial(rate, None, TrialState.PRUNED, told=(1 - abs(math.log(rate / 0.1)),)) for rate in rates))

    def distance(*, sees: bool) -> float:
        study = optuna.create_study(direction="maximize")
        study.add_trials(stopped)
        found = []
        for seed in range(8):
            study.sampler = PerParameterSampler(
                lambda what, seed=seed: make_sampler(kind, study_seed=0, trial_seed=seed, num_trials=16),  # type: ignore[misc,arg-type]
                (lambda study, trial: history(study.get_trials(deepcopy=False), trial.number, {})) if sees else None,
            )
            found.append(abs(math.log(study.ask({RATE: DISTRIBUTION}).params[RATE] / 0.1)))
        return statistics.mean(found)

    assert distance(sees=True) < 0.6
    if kind == "gp":
        assert distance(sees=False) > 0.8


class _Trial:
    trial_id = "t"


def _run(searcher: StudySearcher, count: int) -> list[dict[str, object]]:
    """Trials one by one; good are learning rates near 0.2."""
    suggestions = []
    for _ in range(count):
        suggestion = searcher.suggest("t")
        if not isinstance(suggestion, dict):
            break
        suggestions.append(suggestion)
        rate = suggestion["overrides"][RATE]
        value = round(1 - abs(math.log(rate / 0.2)) / 5, 4)
        row = row_of(1, val_accuracy=value, best_val_accuracy=value, finished=True).to_dict()
        StudyScheduler(searcher).on_trial_result(None, _Trial(), row)
        searcher.on_trial_complete("t", row)
    return suggestions


def _two_cells() -> list[StudyPlan]:
    """The second one learns from the first."""
    run = RunConfig(method="student", epochs=(0, 1))
    first = StudyPlan(key="first", name="first", run=run, num_trials=12, num_epochs=1)
    return [
        first,
        StudyPlan(key="second", name="second", run=run, num_trials=12, num_epochs=1, source_cells=("first",)),
    ]


def _searcher(storage: optuna.storages.BaseStorage) -> StudySearcher:
    return StudySearcher(_two_cells(), storage, Rules(pruner="none"))


def test_a_cell_draws_near_what_was_good_for_its_neighbour_from_its_first_draw_on() -> None:
    suggestions = _run(_searcher(optuna.storages.InMemoryStorage()), 24)
    of_second = [each for each in suggestions if each["cell"] == "second"]
    assert [each["origin"] for each in of_second] == ["default", "transfer", *["sampled"] * 10]
    of_first = [each["overrides"] for each in suggestions if each["cell"] == "first"]
    winner = min(of_first, key=lambda each: abs(math.log(each[RATE] / 0.2)))  # type: ignore[index]
    assert of_second[1]["overrides"] == winner
    rates = [each["overrides"][RATE] for each in of_second[2:]]  # type: ignore[index]
    assert all(abs(math.log(rate / 0.2)) < 0.8 for rate in rates[:3])


def test_a_driver_that_goes_on_draws_what_the_one_before_would_have_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _run(_searcher(optuna.storages.InMemoryStorage()), 18)[-1]
    assert (expected["cell"], expected["origin"]) == ("second", "sampled")

    storage = optuna.storages.InMemoryStorage()
    _run(_searcher(storage), 17)
    first = optuna.load_study(study_name="first", storage=storage)
    for known_trial in first.trials[:5]:  # what a neighbour tries after it gave depends on who is faster
        params = known_trial.params | {RATE: 0.02}
        first.add_trial(create_trial(value=0.99, params=params, distributions=known_trial.distributions))
    (resumed,) = _run(_searcher(storage), 1)
    assert resumed == expected

    # one that died between asking for a trial and drawing its settings
    storage = optuna.storages.InMemoryStorage()
    dying = _searcher(storage)
    _run(dying, 17)
    with monkeypatch.context() as patch:
        patch.setattr(CellStudy, "_draw_settings", _die)
        with pytest.raises(KeyboardInterrupt):
            dying.suggest("t")
    (taken_over,) = _run(_searcher(storage), 1)
    assert taken_over == expected


def _die(*arguments: object) -> None:
    raise KeyboardInterrupt
