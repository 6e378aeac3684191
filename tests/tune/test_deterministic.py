"""By generations, a search's trials do not depend on which one ends first, nor on being killed."""

import math
import random

import optuna
import pytest
from optuna.trial import TrialState
from outcomes import row_of
from ray.tune.search import Searcher

from refilled.config import RunConfig
from tune.studies.searcher import Budget, Rules, StudyPlan, StudyScheduler, StudySearcher, open_storage

EPOCHS = (3, 6)
optuna.logging.set_verbosity(optuna.logging.WARNING)


class Trial:
    """What Tune's scheduler gets of a trial."""

    def __init__(self, trial_id):
        self.trial_id = trial_id


def plans(num_trials=8):
    run = RunConfig(method="refilled", epochs=EPOCHS)

    def one(key, **more):
        return StudyPlan(key=key, name=f"s-{key}", run=run, num_trials=num_trials, num_epochs=sum(EPOCHS), **more)

    first = [one("a", group="x"), one("b", group="y", source_cells=("a",))]
    return [*first, one("c", group="x"), one("d", group="y", source_cells=("c",))]


def value_of(suggestion, epoch):
    """A formula of what was drawn: higher for some learning rates, and rising with the epochs."""
    config = suggestion["config"]
    optimum = 0.02 + 0.01 * "abcd".index(suggestion["cell"])
    off = abs(math.log(config["classifier"]["schedule"]["learning_rate"] / optimum))
    off += 0.3 * abs(math.log(config["embedding"]["temperature"]))
    return round(0.9 - 0.08 * off, 3) * (1 - 0.5 ** (epoch / 2))


class Clock:
    """Runs a searcher's trials side by side as Tune does, an epoch at a time, in an order drawn from a seed."""

    def __init__(self, searcher, slots, seed):
        self.searcher, self.slots = searcher, slots
        self.random = random.Random(seed)
        self.running, self.epochs, self.count = {}, {}, 0
        self.is_over = False

    def step(self):
        """Start what can start, then let one trial train one epoch."""
        while len(self.running) < self.slots:
            trial_id = f"t{self.count}"
            suggestion = self.searcher.suggest(trial_id)
            if not isinstance(suggestion, dict):
                self.is_over = suggestion == Searcher.FINISHED
                break
            self.count += 1
            self.running[trial_id], self.epochs[trial_id] = suggestion, 0
        if not self.running:
            return
        trial_id = self.random.choice(sorted(self.running))
        suggestion = self.running[trial_id]
        self.epochs[trial_id] += 1
        epoch = self.epochs[trial_id]
        value = value_of(suggestion, epoch)
        is_last = epoch == sum(EPOCHS)
        best = {"best_val_accuracy": value, "best_epoch": epoch} if epoch > EPOCHS[0] else {}
        row = row_of(epoch, val_accuracy=value, finished=is_last, **best).to_dict()
        decision = StudyScheduler(self.searcher).on_trial_result(None, Trial(trial_id), row)
        if decision == "CONTINUE":
            self.searcher.on_trial_result(trial_id, row)
        if decision != "CONTINUE" or is_last:
            self.searcher.on_trial_complete(trial_id, row)
            del self.running[trial_id]


def state_of(storage, cells):
    """Everything that counts of every study's trials, by number."""
    found = {}
    for cell in cells:
        trials = optuna.load_study(study_name=cell.name, storage=storage).trials
        found[cell.key] = [
            (each.number, each.state.name, each.params, each.intermediate_values, each.value, each.user_attrs["origin"])
            if "origin" in each.user_attrs
            else (each.number, each.state.name, each.params, each.intermediate_values, each.value)
            for each in trials
        ]
    return found


def search(rules, budget=Budget(), *, slots, seed, storage=None, kill_after=()):  # noqa: B008
    """The end state of a search whose driver dies after so many steps each."""
    storage = storage or optuna.storages.InMemoryStorage()
    cells = plans()
    for steps in kill_after:
        clock = Clock(StudySearcher(cells, storage, rules, budget), slots, seed)
        for _ in range(steps):
            clock.step()
        seed += 1
    clock = Clock(StudySearcher(cells, storage, rules, budget), slots, seed)
    while not clock.is_over:
        clock.step()
    return state_of(storage, cells)


RULES = Rules(deterministic=True, pruner="halving")


@pytest.fixture(scope="module")
def undisturbed():
    return search(RULES, Budget(adaptive_share=0.25), slots=2, seed=0)


def test_the_search_is_worth_comparing(undisturbed):
    states = [trial[1] for trials in undisturbed.values() for trial in trials]
    assert set(states) == {"COMPLETE", "PRUNED"}
    assert len(states) == 4 * 8
    assert any(trial[-1] == "transfer" for trial in undisturbed["d"])
    counts = {key: len(trials) for key, trials in undisturbed.items()}
    assert counts != dict.fromkeys("abcd", 8)  # some got more
    assert (counts["a"], counts["b"]) == (counts["c"], counts["d"])  # but never one of a group alone


@pytest.mark.parametrize(("slots", "seed"), [(1, 1), (2, 2), (3, 3), (7, 4)])
def test_the_order_in_which_trials_end_changes_nothing(undisturbed, slots, seed):
    assert search(RULES, Budget(adaptive_share=0.25), slots=slots, seed=seed) == undisturbed


def test_as_trials_end_it_changes_what_is_drawn():
    rules = Rules(deterministic=False, pruner="halving")
    assert search(rules, slots=2, seed=1) != search(rules, slots=3, seed=2)


def test_drivers_that_die_change_nothing(undisturbed):
    for seed in range(3):
        steps = [random.Random(seed * 100 + index).randrange(1, 60) for index in range(10)]
        assert search(RULES, Budget(adaptive_share=0.25), slots=2, seed=seed, kill_after=steps) == undisturbed


class DiedError(Exception):
    """The process ended here."""


@pytest.mark.parametrize(
    ("method", "every"),
    [("set_study_user_attr", 3), ("create_new_trial", 5), ("set_trial_param", 31), ("set_trial_user_attr", 13)],
)
def test_a_driver_that_dies_between_two_writes_changes_nothing(undisturbed, method, every, monkeypatch):
    storage = optuna.storages.InMemoryStorage()
    real, writes = getattr(storage, method), 0
    die_at = set(range(every - 1, 400, every))

    def write(*arguments, **named):
        nonlocal writes
        writes += 1
        if writes in die_at:
            raise DiedError
        return real(*arguments, **named)

    monkeypatch.setattr(storage, method, write)
    deaths = 0
    while True:
        try:
            assert search(RULES, Budget(adaptive_share=0.25), slots=2, seed=deaths, storage=storage) == undisturbed
        except DiedError:
            deaths += 1
        else:
            break
    assert deaths > 2


def test_epochs_are_shared_alike_and_never_exceeded():
    for rules in (RULES, Rules(pruner="halving")):
        for most in (4 * 9, 100, 150):
            storage = optuna.storages.InMemoryStorage()
            end = search(rules, Budget(max_epochs_total=most, adaptive_share=0.25), slots=3, seed=most, storage=storage)
            epochs = {key: sum(len(trial[3]) for trial in trials) for key, trials in end.items()}
            assert sum(epochs.values()) <= most
            assert sum(epochs.values()) > most - 2 * sum(EPOCHS)
            assert min(epochs.values()) >= sum(EPOCHS)
            assert not [t for trials in end.values() for t in trials if t[1] == TrialState.RUNNING.name]


def test_epochs_by_generations_do_not_depend_on_the_order():
    budget = Budget(max_epochs_total=160, adaptive_share=0.25)
    assert search(RULES, budget, slots=1, seed=1) == search(RULES, budget, slots=4, seed=2, kill_after=(5, 17, 40))


def test_a_deterministic_search_lives_through_a_real_database(tmp_path, undisturbed):
    storage = open_storage(f"sqlite:///{tmp_path}/studies.db")
    assert search(RULES, Budget(adaptive_share=0.25), slots=2, seed=9, storage=storage, kill_after=(30,)) == undisturbed
