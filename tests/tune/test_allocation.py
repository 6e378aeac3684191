import math
import random
import time

import optuna
import pytest
from optuna.trial import TrialState
from outcomes import row_of
from ray.tune.search import Searcher

from refilled.config import RunConfig
from tune.studies.allocation import Budget, uncertainty
from tune.studies.cell_study import CellStudy
from tune.studies.searcher import Rules, StudyPlan, StudySearcher

EPOCHS = 4
optuna.logging.set_verbosity(optuna.logging.WARNING)


def plan(key, *, num_trials=4, **more):
    run = RunConfig(method="kd", epochs=(0, EPOCHS))
    return StudyPlan(key=key, name=f"s-{key}", run=run, num_trials=num_trials, num_epochs=EPOCHS, **more)


@pytest.fixture
def memory():
    return optuna.storages.InMemoryStorage()


def row(epoch, value, seconds=0.0):
    return row_of(
        epoch, val_accuracy=value, best_val_accuracy=value, finished=epoch == EPOCHS, epoch_s=seconds
    ).to_dict()


def last_row(value, seconds=0.0):
    return row(EPOCHS, value, seconds)


def order_of(searcher, value_of, limit=100):
    """Cells in the order in which trials start, one at a time, until the search ends."""
    order = []
    for index in range(limit):
        suggestion = searcher.suggest(str(index))
        if suggestion == Searcher.FINISHED:
            return order
        order.append(suggestion["cell"])
        searcher.on_trial_complete(str(index), last_row(value_of(suggestion)))
    raise AssertionError("the search did not end")


def test_a_cell_begins_when_its_neighbours_are_done_and_with_their_winners(memory):
    plans = [plan("a"), plan("b", source_cells=("a",)), plan("c", source_cells=("b", "a"))]
    searcher = StudySearcher(plans, memory, Rules(seed=3))
    order = order_of(
        searcher, lambda each: 0.9 - 0.01 * each["number"] if each["cell"] == "b" else 0.01 * each["number"]
    )
    assert order == ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    received = {
        key: [(t.number, t.user_attrs["from"]) for t in searcher.trials(key) if "from" in t.user_attrs] for key in "abc"
    }
    # b's winner is the default point, which c tries anyway
    assert received == {"a": [], "b": [(1, "a")], "c": [(1, "a")]}
    assert searcher.trials("b")[1].params == searcher.best("a").params
    assert searcher.best("a").number == 3


def test_without_transfer_cells_take_turns_and_receive_nothing(memory):
    plans = [plan("a"), plan("b", source_cells=("a",))]
    searcher = StudySearcher(plans, memory, Rules(transfer=False))
    assert order_of(searcher, lambda each: 0.5) == ["a", "b"] * 4
    assert not [t for t in searcher.trials("b") if t.user_attrs.get("origin") == "transfer"]


def test_nobody_idles_for_a_neighbour_that_is_not_done(memory):
    plans = [plan("a"), plan("b", source_cells=("a",))]
    searcher = StudySearcher(plans, memory, Rules())
    started = [searcher.suggest(str(index))["cell"] for index in range(6)]
    assert started == ["a", "a", "a", "a", "b", "b"]
    for index in range(4):
        searcher.on_trial_complete(str(index), last_row(0.1 * index))
    late = searcher.suggest("late")
    assert (late["cell"], late["origin"]) == ("b", "transfer")


def test_extra_trials_go_to_the_group_of_the_least_certain_winner_and_to_all_of_it(memory):
    plans = [
        plan("clear", num_trials=8, group="clear"),
        plan("close", num_trials=8, group="close"),
        plan("clear student", num_trials=8, group="clear"),
        plan("close student", num_trials=8, group="close"),
    ]
    searcher = StudySearcher(plans, memory, Rules(transfer=False), Budget(adaptive_share=0.25))
    order = order_of(searcher, close_in("close"))
    assert len(order) == 32
    assert sorted(order[:24]) == sorted(each.key for each in plans for _ in range(6))
    assert order[24:26] == ["close", "close student"]
    counts = {each.key: order.count(each.key) for each in plans}
    assert counts["close"] == counts["close student"] > counts["clear"] == counts["clear student"]


def close_in(key):
    """Values among which the winner is clear, but for those of one study."""

    def value(each):
        if each["cell"] == key:
            return 0.7 + 1e-4 * each["number"]
        return 0.3 + 0.1 * min(each["number"], 5) - 0.1 * max(0, each["number"] - 5)

    return value


def run_side_by_side(searcher, value_of, *, slots=1, seed=0, fails=()):
    """Run to the end, up to `slots` trials at once, which end in a drawn order; returns the cells as they started.

    Trials named in `fails`, by cell and number, fail.
    """
    draws, running, started = random.Random(seed), {}, []
    for _ in range(1000):
        while len(running) < slots and isinstance(suggestion := searcher.suggest(str(len(started))), dict):
            running[str(len(started))] = suggestion
            started.append(suggestion["cell"])
        if not running:
            assert searcher.suggest("end") == Searcher.FINISHED
            return started
        trial_id = draws.choice(sorted(running))
        each = running.pop(trial_id)
        is_bad = (each["cell"], each["number"]) in fails
        for epoch in range(1, EPOCHS):
            searcher.on_trial_result(trial_id, row(epoch, value_of(each)))
        searcher.on_trial_complete(trial_id, None if is_bad else last_row(value_of(each)), error=is_bad)
    raise AssertionError("the search did not end")


def two_groups(num_trials=8):
    """Three methods in each of two cells of a grid."""
    names = [(group, method) for group in ("x", "y") for method in ("student", "refilled", "rkd")]
    return [plan(f"{group} {method}", num_trials=num_trials, group=group) for group, method in names]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("fails", [(), (("y rkd", 7), ("x student", 1), ("y student", 6))])
def test_studies_of_a_group_end_with_as_many_trials_each(memory, deterministic, slots, fails):
    rules = Rules(transfer=False, deterministic=deterministic, sampler="random")
    searcher = StudySearcher(two_groups(), memory, rules, Budget(adaptive_share=0.25))
    started = run_side_by_side(searcher, close_in("y rkd"), slots=slots, seed=slots, fails=fails)
    assert len(started) == 6 * 8 + len(fails)
    counts = {each.key: searcher.counts(each.key) for each in two_groups()}
    assert sum(each.failed for each in counts.values()) == len(fails)
    done = {key: each.done for key, each in counts.items()}
    assert len({done[f"x {method}"] for method in ("student", "refilled", "rkd")}) == 1
    assert len({done[f"y {method}"] for method in ("student", "refilled", "rkd")}) == 1
    assert sum(done.values()) == 6 * 8
    assert done["y rkd"] > done["x rkd"] >= 6


def test_groups_of_different_sizes_are_level_in_deterministic_rounds(memory):
    """Half of what is left is given out in a round, but never a part of a group's share."""
    plans = [*two_groups(), plan("z student", num_trials=8, group="z"), plan("z kd", num_trials=8, group="z")]
    rules = Rules(transfer=False, deterministic=True, sampler="random", trial_batch=1)
    searcher = StudySearcher(plans, memory, rules, Budget(adaptive_share=0.25))
    run_side_by_side(searcher, close_in("x rkd"), slots=3)
    rounds = optuna.load_study(study_name=plans[0].name, storage=memory).user_attrs["rounds"]
    assert len(rounds) > 1
    for allowed in [*rounds, {each.key: searcher.counts(each.key).done for each in plans}]:
        for group in "xyz":
            assert len({count for key, count in allowed.items() if key[0] == group}) == 1
    # Half of 16 is 8: nine is what the uncertain three are given before they are level again.
    assert rounds[0] == {each.key: 9 if each.group == "x" else 6 for each in plans}


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_round_of_a_group_begins_only_with_room_for_all_of_it(memory, deterministic):
    plans = [plan(key, group="all") for key in ("student", "refilled", "rkd")]
    for trials in range(6, 14):
        storage = optuna.storages.InMemoryStorage()
        rules = Rules(transfer=False, deterministic=deterministic, sampler="random", pruner="none")
        budget = Budget(max_epochs_total=trials * EPOCHS, adaptive_share=0.25)
        searcher = StudySearcher(plans, storage, rules, budget)
        run_side_by_side(searcher, lambda each: 0.5, slots=2)
        assert [searcher.counts(each.key).done for each in plans] == [min(4, trials // 3)] * 3


def test_a_study_that_gave_up_holds_its_group_back_no_longer(memory):
    plans = [plan(key, num_trials=8, group="all") for key in ("student", "refilled", "bad")]
    searcher = StudySearcher(plans, memory, Rules(transfer=False), Budget(adaptive_share=0.25))
    run_side_by_side(searcher, lambda each: 0.5, slots=2, fails={("bad", number) for number in range(1, 40)})
    assert searcher.gave_up("bad")
    assert [searcher.counts(key).done for key in ("student", "refilled")] == [8, 8]


def test_no_round_of_a_group_begins_where_one_of_it_would_miss_the_deadline(memory):
    """Else the quick methods of a cell would be searched longer than the slow one."""
    plans = [plan(key, num_trials=8, group="all") for key in ("slow", "quick")]
    budget = Budget(adaptive_share=0.25, deadline_s=time.monotonic() + 1000)
    searcher = StudySearcher(plans, memory, Rules(transfer=False), budget)
    for index in range(12):
        suggestion = searcher.suggest(str(index))
        # All is quick up to the last trial of the equal share, which says that another would take too long.
        is_last = (suggestion["cell"], suggestion["number"]) == ("slow", 5)
        searcher.on_trial_complete(str(index), last_row(0.5, seconds=7200.0 if is_last else 0.1))
    assert [searcher.counts(key).done for key in ("slow", "quick")] == [6, 6]
    assert searcher.suggest("extra") == Searcher.FINISHED


def test_a_cell_that_gives_up_leaves_its_trials_to_nobody(memory):
    plans = [plan("bad"), plan("good")]
    searcher = StudySearcher(plans, memory, Rules(transfer=False), Budget(adaptive_share=0.25))
    count = 0
    while (suggestion := searcher.suggest(str(count))) != Searcher.FINISHED:
        is_bad = suggestion["cell"] == "bad"
        searcher.on_trial_complete(str(count), None if is_bad else last_row(0.5), error=is_bad)
        count += 1
    assert searcher.gave_up("bad")
    assert searcher.counts("good").done == 4


def test_no_trial_starts_after_the_deadline_or_when_it_would_miss_it(memory):
    late = StudySearcher([plan("a")], memory, Rules(), Budget(deadline_s=time.monotonic() - 1))
    assert late.suggest("x") == Searcher.FINISHED
    searcher = StudySearcher([plan("a"), plan("b")], memory, Rules(), Budget(deadline_s=time.monotonic() + 1000))
    assert [searcher.suggest(str(index))["cell"] for index in range(4)] == ["a", "b", "a", "b"]
    searcher.on_trial_complete("0", last_row(0.5, seconds=300.0))  # four epochs would take 1200 s
    searcher.on_trial_complete("1", last_row(0.5, seconds=200.0))
    assert searcher.suggest("x")["cell"] == "b"
    for index in ("2", "3", "x"):
        searcher.on_trial_complete(index, last_row(0.5, seconds=300.0))
    assert searcher.suggest("y") == Searcher.FINISHED
    assert searcher.counts("a").done == 2


def with_values(memory, key, values, num_images=100):
    cell = CellStudy(plan(key, num_trials=20, num_validation_images=num_images), memory, Rules())
    for value in values:
        trial = cell.next_trial(1)
        cell.study.tell(trial, value, state=None if value is not None else TrialState.PRUNED)
        cell.ended(is_done=True, epochs=1)
    return uncertainty(cell)


def test_uncertainty_is_a_probability_by_hand(memory):
    assert with_values(memory, "none", []) == 1.0
    assert with_values(memory, "pruned", [None, None]) == 1.0
    assert with_values(memory, "one", [0.5]) == pytest.approx(1 / 2)
    # standard error of the difference of two shares near one half, 100 images: sqrt(2 * 0.25 / 100)
    error = math.sqrt(2 * 0.25 / 100)
    beaten = 0.5 * math.erfc(0.1 / error / math.sqrt(2))
    assert with_values(memory, "two", [0.4, 0.5]) == pytest.approx(1 - (2 / 3) * (1 - beaten))
    assert with_values(memory, "pruned too", [0.4, 0.5, None]) == pytest.approx(1 - (3 / 4) * (1 - beaten))
    assert with_values(memory, "equal", [0.5, 0.5]) == pytest.approx(1 - (2 / 3) * 0.5)
    assert with_values(memory, "more images", [0.4, 0.5], 10_000) == pytest.approx(1 / 3)
    assert 0 < with_values(memory, "perfect", [1.0, 0.9]) < 1
