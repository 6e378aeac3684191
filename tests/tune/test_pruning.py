import random

import optuna
import pytest
from optuna.trial import TrialState

from refilled.config.search import PRUNERS
from tune.studies.pruning import HalvingPruner, make_pruner, rungs_of

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Study:
    """A study whose trials report values at epochs, as the searcher has them do."""

    def __init__(self, pruner):
        self.study = optuna.create_study(direction="maximize", pruner=pruner)

    def begin(self):
        return self.study.ask()

    def run(self, values, *, state=None):
        """Report a new trial's values ({epoch: value}) until it is told to stop; whether it was."""
        trial = self.study.ask()
        is_stopped = False
        for epoch, value in values.items():
            trial.report(value, epoch)
            if is_stopped := trial.should_prune():
                break
        if state is None:
            state = TrialState.PRUNED if is_stopped else TrialState.COMPLETE
        self.study.tell(trial, 0.5 if state == TrialState.COMPLETE else None, state=state)
        return is_stopped


@pytest.mark.parametrize("num_epochs", [1, 2, 4, 5, 8, 30, 80, 240])
def test_rungs_lie_within_a_run(num_epochs):
    rungs = rungs_of(num_epochs)
    assert list(rungs) == sorted(set(rungs))
    assert all(1 <= rung < num_epochs for rung in rungs)
    assert bool(rungs) is (num_epochs > 2)


def test_rungs_lie_where_ranks_have_meaning():
    assert [rungs_of(count) for count in (2, 3, 4, 12, 80)] == [(), (2,), (3,), (9, 10), (60, 67)]


def early(**more):
    """A pruner whose rungs lie so that the tests below can be read."""
    return HalvingPruner((10, 30), reduction=3, **more)


def test_every_kind_has_its_pruner():
    pruner = make_pruner("halving", 80)
    assert isinstance(pruner, HalvingPruner)
    assert pruner.rungs == rungs_of(80)
    assert isinstance(make_pruner("none", 80), optuna.pruners.NopPruner)


@pytest.mark.parametrize("kind", PRUNERS)
def test_the_first_trials_and_the_best_are_never_stopped(kind):
    generator = random.Random(1)
    study = Study(make_pruner(kind, 80))
    best, stopped = -1.0, []
    for number in range(60):
        value = generator.random()
        is_stopped = study.run(dict.fromkeys(range(1, 80), value))
        stopped.append(is_stopped)
        if number < 3:
            assert not is_stopped
        if value > best:
            assert not is_stopped
            best = value
    assert any(stopped) is (kind != "none")


def test_trials_are_judged_at_rungs_alone():
    pruner = make_pruner("halving", 80)
    study = Study(pruner)
    for _ in range(12):
        study.run(dict.fromkeys(range(1, 80), 0.9))
    epochs = []
    for _ in range(20):
        trial = study.begin()
        for epoch in range(1, 80):
            trial.report(0.1, epoch)
            if trial.should_prune():
                epochs.append(epoch)
    assert set(epochs) == set(pruner.rungs)


def test_failed_trials_are_no_rivals_and_running_ones_are():
    study = Study(early())
    for _ in range(12):
        assert not study.run({10: 0.9, 30: 0.9}, state=TrialState.FAIL)
    assert not any(study.run({10: 0.1, 30: 0.1}) for _ in range(12))  # nobody was better
    study = Study(early())
    for _ in range(12):
        trial = study.begin()
        for epoch in (10, 30):
            trial.report(0.9, epoch)
    assert any(study.run({10: 0.1, 30: 0.1}) for _ in range(3))


def test_only_visible_trials_are_rivals():
    generation = 16

    def is_earlier(other, trial):
        return other.number < trial.number // generation * generation

    decisions = []
    for order in (range(generation), range(generation - 1, -1, -1)):  # who reports first
        study = Study(early(visible=is_earlier))
        decided = {}
        for start in (0, generation):
            trials = [study.begin() for _ in range(generation)]
            for index in order:
                trials[index].report(index / generation, 10)
                decided[start + index] = trials[index].should_prune()
        decisions.append(decided)
    assert decisions[0] == decisions[1]
    assert not any(decisions[0][number] for number in range(generation))  # nobody was there before them
    assert any(decisions[0].values())
    blind = Study(early(visible=lambda other, trial: False))
    assert not any(blind.run({10: 1 - index / 20}) for index in range(20))


def test_fewer_than_min_trials_stop_nobody():
    for min_trials in (2, 6):
        study = Study(early(min_trials=min_trials))
        stopped = [study.run({10: 1 - index / 40, 30: 1 - index / 40}) for index in range(30)]
        assert not any(stopped[: min_trials - 1])
        assert stopped.index(True) == min_trials - 1  # of 6 two go on; of 2 one does


def test_of_four_trials_three_go_on():
    pruner = make_pruner("halving", 12)
    values = [0.4, 0.3, 0.2, 0.1]
    kept = [value for value in values if not pruner.is_beaten(value, [other for other in values if other != value])]
    assert kept == values[:3]
