import random

import optuna
import pytest
from optuna.trial import TrialState

from refilled.config.search import PRUNERS
from tune.studies.pruning import (
    HalvingPruner,
    HyperbandPruner,
    MedianPruner,
    RungPruner,
    halving_rungs,
    make_pruner,
    median_rungs,
)

optuna.logging.set_verbosity(optuna.logging.WARNING)
JUDGING = [kind for kind in PRUNERS if kind != "none"]


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
    for rungs in (halving_rungs(num_epochs), median_rungs(num_epochs)):
        assert list(rungs) == sorted(set(rungs))
        assert all(1 <= rung < num_epochs for rung in rungs)
        assert bool(rungs) is (num_epochs > 2)


def test_rungs_lie_where_ranks_have_meaning():
    assert [halving_rungs(count) for count in (2, 3, 4, 12, 80)] == [(), (2,), (3,), (9, 10), (60, 67)]
    assert [median_rungs(count) for count in (2, 3, 4, 12, 80)] == [(), (2,), (3,), (8, 10), (53, 67)]


def early(kind, **more):
    """A pruner whose rungs lie so that the tests below can be read."""
    return make_pruner(kind, 80, rungs=(10, 30), reduction=3, **more)


def test_every_kind_has_its_pruner():
    kinds = {"halving": HalvingPruner, "hyperband": HyperbandPruner, "median": MedianPruner}
    for kind in JUDGING:
        pruner = make_pruner(kind, 80)
        assert type(pruner) is kinds[kind]
        assert pruner.rungs == (median_rungs(80) if kind == "median" else halving_rungs(80))
        assert make_pruner(kind, 80, rungs=[7, 9]).rungs == (7, 9)
    for kind in ("halving", "hyperband"):
        assert make_pruner(kind, 80, reduction=5).reduction == 5
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


@pytest.mark.parametrize("kind", JUDGING)
def test_trials_are_judged_at_rungs_alone(kind):
    pruner = make_pruner(kind, 80)
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


@pytest.mark.parametrize("kind", JUDGING)
def test_failed_trials_are_no_rivals_and_running_ones_are(kind):
    study = Study(early(kind))
    for _ in range(12):
        assert not study.run({10: 0.9, 30: 0.9}, state=TrialState.FAIL)
    assert not any(study.run({10: 0.1, 30: 0.1}) for _ in range(12))  # nobody was better
    study = Study(early(kind))
    for _ in range(12):
        trial = study.begin()
        for epoch in (10, 30):
            trial.report(0.9, epoch)
    assert any(study.run({10: 0.1, 30: 0.1}) for _ in range(3))


@pytest.mark.parametrize("kind", JUDGING)
def test_only_visible_trials_are_rivals(kind):
    generation = 16

    def is_earlier(other, trial):
        return other.number < trial.number // generation * generation

    decisions = []
    for order in (range(generation), range(generation - 1, -1, -1)):  # who reports first
        study = Study(early(kind, visible=is_earlier))
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
    blind = Study(early(kind, visible=lambda other, trial: False))
    assert not any(blind.run({10: 1 - index / 20}) for index in range(20))


@pytest.mark.parametrize("kind", JUDGING)
def test_fewer_than_min_trials_stop_nobody(kind):
    for min_trials in (2, 6):
        study = Study(early(kind, min_trials=min_trials))
        stopped = [study.run({10: 1 - index / 40, 30: 1 - index / 40}) for index in range(30)]
        assert not any(stopped[: min_trials - 1])
        if kind == "halving":  # of 6 two go on; of 2 one does
            assert stopped.index(True) == min_trials - 1
        assert any(stopped)


def test_a_bracket_competes_within_itself_and_starts_later():
    pruner = HyperbandPruner((10, 30), reduction=3)
    study = Study(pruner)
    trials = [study.begin() for _ in range(110)]
    frozen = study.study.trials
    brackets = [pruner.bracket_of(trial) for trial in frozen]
    assert [brackets.count(bracket) for bracket in range(3)] == [60, 30, 20]
    for start in range(0, 110, 11):  # spread evenly: no long run without a bracket
        assert set(brackets[start : start + 11]) == {0, 1, 2}
    assert [pruner.rungs_of(frozen[brackets.index(bracket)]) for bracket in range(3)] == [(10, 30), (30,), ()]

    # Bracket 1 is full of good trials, bracket 0 of bad ones: a middling one goes on in 0 and stops in 1.
    for trial, bracket in list(zip(trials, brackets, strict=True))[:80]:
        for epoch in (10, 30):
            trial.report({0: 0.1, 1: 0.9, 2: 0.95}[bracket], epoch)
    for bracket, epochs, is_stopped in ((0, (10, 30), False), (1, (10,), False), (1, (30,), True), (2, (30,), False)):
        trial = next(trials[number] for number in range(80, 110) if brackets[number] == bracket)
        for epoch in epochs:
            trial.report(0.5, epoch)
        assert trial.should_prune() is is_stopped


def test_the_median_is_of_the_same_epoch_not_of_the_best_so_far():
    # In stage embedding the value is nearest-class-mean accuracy, in stage classifier (here from epoch 5) accuracy.
    good = {1: 0.5, 2: 0.6, 3: 0.6, 4: 0.6, 5: 0.4, 6: 0.5, 7: 0.7}
    fails_later = {1: 0.5, 2: 0.6, 3: 0.6, 4: 0.6, 5: 0.1, 6: 0.1, 7: 0.1}

    def stopped_at(pruner):
        study = Study(pruner)
        for _ in range(4):
            assert not study.run(good)
        study.run(fails_later)
        return study.study.trials[-1].last_step

    assert stopped_at(make_pruner("median", 8, rungs=range(1, 8))) == 5
    optunas = optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1)
    assert stopped_at(optunas) == 7  # its best value is of the other stage; only the last epoch's median is above it


def test_the_median_stops_what_is_below_it():
    study = Study(MedianPruner((2,)))
    assert [study.run({2: value}) for value in (0.1, 0.2, 0.9)] == [False] * 3
    assert study.run({2: 0.19})
    assert not study.run({2: 0.2})  # the median of four is 0.195
    assert not study.run({2: 0.2})  # and of five 0.2


@pytest.mark.parametrize(("kind", "going_on"), [("halving", 3), ("hyperband", 2)])
def test_of_four_trials_a_pruner_made_by_name_keeps_its_own_share(kind, going_on):
    pruner = make_pruner(kind, 12)
    assert isinstance(pruner, RungPruner)
    values = [0.4, 0.3, 0.2, 0.1]
    kept = [value for value in values if not pruner.is_beaten(value, [other for other in values if other != value])]
    assert kept == values[:going_on]
