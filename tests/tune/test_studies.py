import pickle

import optuna
import pytest
from optuna.trial import TrialState
from outcomes import row_of
from ray.tune.search import Searcher

from refilled.config import RunConfig
from refilled.errors import UserError
from refilled.metrics import TrialEnd
from tune.studies.pruning import HalvingPruner
from tune.studies.searcher import Rules, StudyPlan, StudyScheduler, StudySearcher, open_storage, overrides_of

EPOCHS = 8
optuna.logging.set_verbosity(optuna.logging.WARNING)


def plan(key="cell", *, num_trials=6, num_epochs=EPOCHS, method="kd"):
    return StudyPlan(
        key=key,
        name=f"study-{key}",
        run=RunConfig(method=method, epochs=(0, num_epochs)),
        num_trials=num_trials,
        num_epochs=num_epochs,
        attributes={"student_classes": ["a", "b"]},
    )


def early(plan, visible):
    """Judges after the first and the third of the eight epochs."""
    return HalvingPruner((1, 3), reduction=3)


@pytest.fixture
def storage(tmp_path):
    return open_storage(f"sqlite:///{tmp_path}/studies.db")


@pytest.fixture
def memory():
    """Optuna's own storage in memory, for what no second driver has to see: it saves 0.1 s a trial."""
    return optuna.storages.InMemoryStorage()


def make_row(epoch, value, *, num_epochs=EPOCHS, best=None, best_epoch=None):
    best, best_epoch = value if best is None else best, epoch if best_epoch is None else best_epoch
    row = row_of(epoch, val_accuracy=value, best_val_accuracy=best, best_epoch=best_epoch, finished=epoch == num_epochs)
    return row.to_dict() | {"training_iteration": epoch, "trial_id": "t"}  # Tune adds fields of its own


def make_end(kind, reason):
    return TrialEnd(kind, reason).to_dict() | {"trial_id": "t"}


class Trial:
    """What Tune's scheduler gets of a trial."""

    PENDING = "PENDING"

    def __init__(self, trial_id):
        self.trial_id = trial_id
        self.status = "RUNNING"


def report(searcher, trial_id, row):
    """Hand a row on as Tune's controller does: to the scheduler, then, unless that stops the trial, to the searcher."""
    decision = StudyScheduler(searcher).on_trial_result(None, Trial(trial_id), row)
    if decision == "CONTINUE":
        searcher.on_trial_result(trial_id, row)
    return decision


def run_trial(searcher, trial_id, values):
    """Run one trial that reports these values, as Tune would; returns its number."""
    suggestion = searcher.suggest(trial_id)
    for epoch, value in enumerate(values, start=1):
        last = make_row(epoch, value)
        if report(searcher, trial_id, last) == "STOP":
            break
    searcher.on_trial_complete(trial_id, last)
    return suggestion["number"]


def trials_of(storage, study_plan):
    return optuna.load_study(study_name=study_plan.name, storage=storage).trials


def test_a_whole_run_is_complete_with_its_best_value_and_every_epoch(storage):
    searcher = StudySearcher([plan()], storage, Rules(seed=0, transfer=False))
    suggestion = searcher.suggest("t")
    values = [0.1, 0.5, 0.7, 0.6, 0.6, 0.6, 0.6, 0.6]
    for epoch, value in enumerate(values, start=1):
        last = make_row(epoch, value, best=max(values[:epoch]), best_epoch=min(epoch, 3))
        report(searcher, "t", last)
        report(searcher, "t", last)  # the row that a resumed run repeats
    searcher.on_trial_complete("t", last)
    searcher.on_trial_complete("t", last)
    searcher.on_trial_complete("t", error=True)
    (trial,) = trials_of(storage, plan())
    assert trial.state == TrialState.COMPLETE
    assert trial.value == 0.7
    assert trial.intermediate_values == dict(enumerate(values, start=1))
    assert trial.user_attrs["epoch"] == 3
    assert overrides_of(trial) == suggestion["overrides"]
    assert RunConfig.from_dict(suggestion["config"]) == plan().run.with_overrides(overrides_of(trial))
    assert searcher.best("cell").number == suggestion["number"] == 0
    study = optuna.load_study(study_name=plan().name, storage=storage)
    assert study.user_attrs == {"cell": "cell", "student_classes": ["a", "b"]}


def test_the_first_trial_is_the_run_itself(storage):
    step = RunConfig(method="kd").with_overrides({"classifier.schedule.kind": "step"})
    study_plan = StudyPlan("cell", "study", step, num_trials=2, num_epochs=2)
    searcher = StudySearcher([study_plan], storage, Rules(seed=0, transfer=False))
    first, second = searcher.suggest("a"), searcher.suggest("b")
    assert RunConfig.from_dict(first["config"]) == step
    assert RunConfig.from_dict(second["config"]) != step
    assert overrides_of(trials_of(storage, study_plan)[0]) == first["overrides"]  # milestones are a tuple again


@pytest.mark.parametrize("kind", ["diverged", "failed"])
def test_a_trial_that_says_why_it_ended_has_failed_for_that_reason(memory, kind):
    searcher = StudySearcher([plan()], memory, Rules(seed=0, transfer=False))
    searcher.suggest("t")
    assert report(searcher, "t", make_row(1, 0.5)) == "CONTINUE"
    end = make_end(kind, "The loss is nan in epoch 2.")
    assert report(searcher, "t", end) == "CONTINUE"
    searcher.on_trial_complete("t", end)  # Tune repeats what came last
    (trial,) = trials_of(memory, plan())
    assert (trial.state, trial.value) == (TrialState.FAIL, None)
    assert trial.intermediate_values == {1: 0.5}
    assert trial.user_attrs["failure"] == "The loss is nan in epoch 2."
    assert (searcher.counts("cell").failed, searcher.stopped_because) == (1, "")


@pytest.mark.parametrize(
    ("rows", "error", "reason"),
    [([], True, "error"), ([], False, "no row"), ([1, 2], True, "error"), ([1, 2], False, "last epoch")],
)
def test_an_end_before_the_last_row_fails_the_trial(memory, rows, error, reason):
    searcher = StudySearcher([plan()], memory, Rules(seed=0, transfer=False))
    searcher.suggest("t")
    for epoch in rows:
        report(searcher, "t", make_row(epoch, 0.5))
    last = make_row(rows[-1], 0.5) if rows else {"done": True, "trial_id": "t"}
    searcher.on_trial_complete("t", None if error else last, error=error)
    (trial,) = trials_of(memory, plan())
    assert trial.state == TrialState.FAIL
    assert trial.value is None
    assert list(trial.intermediate_values) == rows
    assert reason in trial.user_attrs["failure"]
    assert searcher.remaining("cell") == 6


def test_a_stopped_trial_is_pruned_with_the_value_and_epoch_where_it_stopped(memory):
    searcher = StudySearcher([plan()], memory, Rules(seed=0, transfer=False, make_pruner=early))
    for index in range(4):
        run_trial(searcher, f"good{index}", [0.8] * EPOCHS)
    bad = run_trial(searcher, "bad", [0.3] * EPOCHS)
    trial = trials_of(memory, plan())[bad]
    assert (trial.state, trial.value, trial.user_attrs["epoch"]) == (TrialState.PRUNED, 0.3, 1)
    assert trial.intermediate_values == {1: 0.3}
    counts = searcher.counts("cell")
    assert (counts.complete, counts.pruned, counts.failed, counts.running, counts.done) == (4, 1, 0, 0, 5)


def test_a_row_at_the_last_epoch_is_never_pruned(memory):
    class Always(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return True

    searcher = StudySearcher([plan()], memory, Rules(seed=0, make_pruner=lambda plan, visible: Always()))
    searcher.suggest("t")
    assert report(searcher, "t", make_row(EPOCHS, 0.3)) == "CONTINUE"
    searcher.on_trial_complete("t", make_row(EPOCHS, 0.3))
    assert trials_of(memory, plan())[0].state == TrialState.COMPLETE


def test_a_repeated_row_gets_its_first_answer(memory):
    searcher = StudySearcher([plan(num_trials=20)], memory, Rules(seed=0, transfer=False))
    searcher.suggest("early")
    assert report(searcher, "early", make_row(1, 0.3)) == "CONTINUE"
    for index in range(5):
        run_trial(searcher, f"good{index}", [0.8] * EPOCHS)
    # Tune repeats the last row when the function returns; the trial that ended early was not pruned.
    assert report(searcher, "early", make_row(1, 0.3)) == "CONTINUE"
    searcher.on_trial_complete("early", make_row(1, 0.3))
    assert trials_of(memory, plan())[0].state == TrialState.FAIL


def test_cells_take_turns_by_their_share_and_the_search_ends(memory):
    plans = [plan("small", num_trials=2), plan("large", num_trials=4)]
    searcher = StudySearcher(plans, memory, Rules(seed=0, transfer=False))
    order = []
    for index in range(6):
        order.append(searcher.suggest(str(index))["cell"])
    assert order == ["small", "large", "large", "small", "large", "large"]
    assert searcher.suggest("none") is None  # a running trial may fail
    for index in range(5):
        searcher.on_trial_complete(str(index), make_row(EPOCHS, 0.5))
    assert searcher.suggest("none") is None
    searcher.on_trial_complete("5", error=True)
    again = searcher.suggest("again")
    assert again["cell"] == "large"
    searcher.on_trial_complete("again", make_row(EPOCHS, 0.5))
    assert searcher.suggest("none") == Searcher.FINISHED
    assert (searcher.counts("large").done, searcher.counts("large").failed) == (4, 1)


def test_a_cell_whose_trials_keep_failing_gives_up(memory):
    searcher = StudySearcher(
        [plan("bad", num_trials=6), plan("good", num_trials=1)], memory, Rules(seed=0, transfer=False)
    )
    fails = 0
    while (suggestion := searcher.suggest(f"t{fails}")) != Searcher.FINISHED:
        if suggestion["cell"] == "good":
            searcher.on_trial_complete(f"t{fails}", make_row(EPOCHS, 0.5))
        else:
            searcher.on_trial_complete(f"t{fails}", error=True)
        fails += 1
    assert searcher.counts("bad").failed == 4  # one above half of 6
    assert searcher.gave_up("bad")
    assert not searcher.gave_up("good")
    assert searcher.best("bad") is None
    reopened = StudySearcher([plan("bad", num_trials=6)], memory, Rules(seed=0, transfer=False))
    assert not reopened.gave_up("bad")
    assert isinstance(reopened.suggest("t"), dict)


def test_trials_of_a_dead_driver_are_taken_over_as_they_are(storage):
    first = StudySearcher([plan()], storage, Rules(seed=0))
    run_trial(first, "done", [0.5] * EPOCHS)
    dead = [first.suggest("x"), first.suggest("y")]
    report(first, "x", make_row(1, 0.4))
    report(first, "x", make_row(2, 0.6))

    StudySearcher([plan()], storage, Rules(seed=0))  # a driver that died right after it had opened the studies
    reopened = StudySearcher([plan()], storage, Rules(seed=0))
    states = [trial.state for trial in trials_of(storage, plan())]
    assert states == [TrialState.COMPLETE, *[TrialState.RUNNING] * 2]
    assert reopened.counts("cell").done == 1
    assert reopened.remaining("cell") == 5
    assert [reopened.suggest("x"), reopened.suggest("y")] == dead
    for epoch, value in ((1, 0.4), (2, 0.6)):  # the rows that the resumed run repeats
        report(reopened, "x", make_row(epoch, value))
    for epoch in range(3, EPOCHS + 1):
        report(reopened, "x", make_row(epoch, 0.7))
    reopened.on_trial_complete("x", make_row(EPOCHS, 0.7))
    taken = trials_of(storage, plan())[dead[0]["number"]]
    assert taken.intermediate_values == {1: 0.4, 2: 0.6} | dict.fromkeys(range(3, EPOCHS + 1), 0.7)
    reopened.on_trial_complete("y", make_row(EPOCHS, 0.7))

    index = 0
    while isinstance(reopened.suggest(f"t{index}"), dict):
        reopened.on_trial_complete(f"t{index}", make_row(EPOCHS, 0.5))
        index += 1
    counts = reopened.counts("cell")
    assert (counts.done, counts.failed, counts.running) == (6, 0, 0)
    assert len(trials_of(storage, plan())) == 6


def test_what_stops_the_search_fails_no_trial_and_the_next_driver_goes_on(storage):
    first = StudySearcher([plan()], storage, Rules(seed=0, transfer=False))
    numbers = [first.suggest(name)["number"] for name in "ab"]
    report(first, "a", make_row(1, 0.5))
    last = make_end("storage_full", "The disk is full.")
    assert report(first, "a", last) == "CONTINUE"
    first.on_trial_complete("a", last)
    assert first.stopped_because == "The disk is full."
    assert first.suggest("c") is None  # b may still end in peace
    first.on_trial_complete("b", last)
    assert first.suggest("c") == Searcher.FINISHED
    assert {trial.state for trial in trials_of(storage, plan())} <= {TrialState.RUNNING, TrialState.WAITING}
    second = StudySearcher([plan()], storage, Rules(seed=0, transfer=False))
    assert [run_trial(second, name, [0.5] * EPOCHS) for name in "ab"] == numbers
    assert [trials_of(storage, plan())[number].state for number in numbers] == [TrialState.COMPLETE] * 2


def test_a_process_that_is_lost_before_its_trial_begins_costs_no_trial(memory):
    searcher = StudySearcher([plan()], memory, Rules(seed=0, transfer=False))
    first = searcher.suggest("a")
    lose_start(searcher, "a")
    assert searcher.will_retry("a")
    again = searcher.suggest("b")
    assert (again["number"], again["config"]) == (first["number"], first["config"])
    assert not searcher.will_retry("b")
    for name in "bcde":
        lose_start(searcher, name)
        assert searcher.suggest(chr(ord(name) + 1))["number"] == first["number"]
    lose_start(searcher, "f")
    assert not searcher.will_retry("f")
    assert [trial.state for trial in trials_of(memory, plan())] == [TrialState.FAIL]
    assert searcher.suggest("g")["number"] != first["number"]


def lose_start(searcher, name):
    """What Tune does when the actor of a trial that has not begun dies."""
    trial = Trial(name)
    trial.status = Trial.PENDING
    StudyScheduler(searcher).on_trial_error(None, trial)
    searcher.on_trial_complete(name, error=True)


def test_a_trial_whose_driver_died_while_it_was_drawn_is_drawn_to_the_end(storage):
    study_plan = plan(num_trials=40)
    first = StudySearcher([study_plan], storage, Rules(seed=0))
    first.suggest("default")
    expected = first.suggest("x")
    storage_of_another = optuna.storages.InMemoryStorage()
    again = StudySearcher([study_plan], storage_of_another, Rules(seed=0))
    again.suggest("default")
    study = optuna.load_study(study_name=study_plan.name, storage=storage_of_another)
    study.ask()  # ... and was killed before it drew a setting
    reopened = StudySearcher([study_plan], storage_of_another, Rules(seed=0))
    assert reopened.suggest("default")["number"] == 0
    assert reopened.suggest("x") == expected


def test_a_trial_that_keeps_killing_its_driver_is_given_up(memory):
    first = StudySearcher([plan()], memory, Rules(seed=0))
    first.suggest("x")
    for _ in range(5):
        StudySearcher([plan()], memory, Rules(seed=0))
    survivor = StudySearcher([plan()], memory, Rules(seed=0))
    survivor.suggest("x")
    report(survivor, "x", make_row(1, 0.4))  # a row: it does not kill everyone
    for _ in range(10):
        last = StudySearcher([plan()], memory, Rules(seed=0))
    assert trials_of(memory, plan())[0].state == TrialState.RUNNING
    assert last.counts("cell").failed == 0
    StudySearcher([plan()], memory, Rules(seed=0))
    (trial,) = trials_of(memory, plan())
    assert (trial.state, trial.user_attrs["failure"]) == (
        TrialState.FAIL,
        "its driver died 10 times without a row of it",
    )


def test_what_the_budget_has_no_room_for_any_more_does_not_stay_running(memory):
    first = StudySearcher([plan(num_trials=2)], memory, Rules(seed=0))
    run_trial(first, "done", [0.5] * EPOCHS)
    first.suggest("x")
    smaller = StudySearcher([plan(num_trials=1)], memory, Rules(seed=0))
    assert smaller.suggest("y") == Searcher.FINISHED
    assert [trial.state for trial in trials_of(memory, plan())] == [TrialState.COMPLETE, TrialState.FAIL]


def test_an_interrupted_trial_does_not_compete_with_itself(memory):
    for value, is_stopped in ((0.5, False), (0.2, True)):
        plans = [plan(f"cell{value}", num_trials=20)]
        first = StudySearcher(plans, memory, Rules(seed=0, transfer=False, make_pruner=early))
        for index, other in enumerate([0.9, 0.4, 0.3]):
            run_trial(first, f"t{index}", [other] * EPOCHS)
        for driver in range(4):  # killed at the same epoch again and again
            searcher = StudySearcher(plans, memory, Rules(seed=driver, transfer=False, make_pruner=early))
            searcher.suggest("x")
            assert (report(searcher, "x", make_row(1, value)) == "STOP") is is_stopped


def test_a_run_that_lost_its_folder_is_judged_where_it_is_not_where_it_was(memory):
    first = StudySearcher([plan(num_trials=20)], memory, Rules(seed=0, transfer=False, make_pruner=early))
    for index in range(3):
        run_trial(first, f"t{index}", [0.9] * EPOCHS)
    first.suggest("x")
    values = {1: 0.95, 2: 0.1, 3: 0.1}
    for epoch, value in values.items():
        first.on_trial_result("x", make_row(epoch, value))
    reopened = StudySearcher([plan(num_trials=20)], memory, Rules(seed=0, transfer=False, make_pruner=early))
    number = reopened.suggest("x")["number"]
    assert [report(reopened, "x", make_row(*each)) for each in values.items()] == ["CONTINUE", "CONTINUE", "STOP"]
    reopened.on_trial_complete("x", make_row(3, 0.1))
    trial = trials_of(memory, plan())[number]
    assert (trial.state, trial.intermediate_values) == (TrialState.PRUNED, values)


def test_a_finished_study_asks_for_nothing_and_a_raised_budget_goes_on(storage):
    searcher = StudySearcher([plan(num_trials=2)], storage, Rules(seed=0, transfer=False))
    for index in range(2):
        run_trial(searcher, f"t{index}", [0.5] * EPOCHS)
    assert searcher.suggest("none") == Searcher.FINISHED
    assert (
        StudySearcher([plan(num_trials=2)], storage, Rules(seed=0, transfer=False)).suggest("none") == Searcher.FINISHED
    )
    more = StudySearcher([plan(num_trials=3)], storage, Rules(seed=0, transfer=False))
    assert more.remaining("cell") == 1
    assert more.suggest("t")["number"] == 2


def points(searcher, count):
    suggestions = [searcher.suggest(f"t{index}") for index in range(count)]
    for index in range(count):
        searcher.on_trial_complete(f"t{index}", make_row(EPOCHS, 0.5))
    return [each["config"] for each in suggestions]


def test_points_follow_from_the_seed_and_a_continued_study_draws_new_ones():
    def search(seed, key="cell"):
        storage = optuna.storages.InMemoryStorage()
        # a budget with ten random first trials: two of them are drawn before, the others after the interruption
        interrupted = points(StudySearcher([plan(key, num_trials=40)], storage, Rules(seed=seed, transfer=False)), 3)
        return interrupted, points(
            StudySearcher([plan(key, num_trials=40)], storage, Rules(seed=seed, transfer=False)), 4
        )

    first, continued = search(0)
    assert search(0) == (first, continued)
    assert not [config for config in continued if config in first]
    assert search(1)[0][1:] != first[1:]
    assert search(0, "other cell")[0][1:] != first[1:]


def test_two_studies_in_one_storage_do_not_see_each_other(memory):
    low, high = plan("low", num_trials=9), plan("high", num_trials=9)
    both = StudySearcher([high, low], memory, Rules(seed=0, transfer=False, pruner="halving"))
    index = 0
    while isinstance(suggestion := both.suggest(f"t{index}"), dict):
        level = 0.9 if suggestion["cell"] == "high" else 0.2
        for epoch in range(1, EPOCHS + 1):
            last = make_row(epoch, level - 0.01 * suggestion["number"])
            if report(both, f"t{index}", last) == "STOP":
                break
        both.on_trial_complete(f"t{index}", last)
        index += 1
    for key in ("low", "high"):
        counts = both.counts(key)
        assert counts.done == 9
        assert counts.pruned
        assert counts.complete >= 3
    assert [t.state for t in trials_of(memory, low)] == [t.state for t in trials_of(memory, high)]
    assert both.best("low").value == pytest.approx(0.2)
    assert both.best("high").value == pytest.approx(0.9)


def test_plans_need_names_of_their_own(memory):
    with pytest.raises(ValueError, match="key"):
        StudySearcher([plan(), plan()], memory, Rules(seed=0, transfer=False))


def test_what_tune_pickles_holds_no_storage(storage, tmp_path):
    searcher = StudySearcher([plan()], storage, Rules(seed=0, transfer=False))
    searcher.save_to_dir(str(tmp_path / "missing"), "session")
    assert b"sqlite" not in pickle.dumps(StudyScheduler(searcher))
    with pytest.raises(RuntimeError, match="start the search again"):
        searcher.restore_from_dir(str(tmp_path))


@pytest.mark.parametrize("url", ["sqlite:////missing/folder/studies.db", "studies", "nosuchserver://u:secret@host/db"])
def test_a_storage_that_cannot_be_reached_is_the_users_to_change(url):
    with pytest.raises(UserError, match="study_storage") as caught:
        open_storage(url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_pruner_keeps_a_third_and_whoever_equals_it():
    pruner = HalvingPruner((2, 6), reduction=3)
    study = optuna.create_study(direction="maximize", pruner=pruner)

    def is_pruned(value, state=None, epochs=(1, 2)):
        trial = study.ask()
        for epoch in epochs:
            trial.report(value, epoch)
        answer = trial.should_prune()
        if state is not None:
            study.tell(trial, state=state)
        return answer

    assert [is_pruned(value) for value in (0.5, 0.4, 0.3)] == [False] * 3  # too few to judge by
    for _ in range(5):
        assert not is_pruned(0.9, TrialState.FAIL, epochs=(1, 2, 3))  # they do not count
    assert is_pruned(0.35)  # third of 4, two go on
    assert not is_pruned(0.4)  # shares the second place of 5
    assert not is_pruned(0.0, epochs=(1,))
    assert not is_pruned(0.0, epochs=(1, 2, 3))
