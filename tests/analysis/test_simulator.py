import optuna
import pytest
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from analysis.simulate import main
from analysis.simulator.simulation import Contender, simulate
from analysis.simulator.strategies import EARLY, ours, random_search, ray_default
from analysis.simulator.table import Answers, Curve, Table, point_of
from refilled.config import RunConfig
from refilled.errors import UserError
from tune.studies.space import as_data, sample

optuna.logging.set_verbosity(optuna.logging.WARNING)
RUN = RunConfig(method="student", epochs=(0, 4))
COSINE = {
    "optimizer.weight_decay": 1e-4,
    "classifier.schedule.kind": "cosine",
    "classifier.schedule.learning_rate": 0.1,
}
CURVES = {0.02: (0.1, 0.5, 0.4, 0.3), 0.1: (0.2, 0.3, 0.6, 0.7), 0.4: (0.3,)}


def point(rate):
    return COSINE | {"classifier.schedule.learning_rate": rate, "classifier.schedule.final_fraction": 0.01}


def tiny(is_weighted=False):
    """Three curves that differ in their learning rate; the last one's loss was not finite in epoch 2."""
    curves = [Curve(point(rate), "c" * len(values), values, {"classifier": 2.0}) for rate, values in CURVES.items()]
    return Table("tiny", RUN, as_data(RUN), curves, is_weighted=is_weighted)


class Listed(Searcher):
    """Suggests these learning rates and writes down what it is called with."""

    def __init__(self, rates, calls):
        super().__init__()
        self.rates, self.calls, self.number = list(rates), calls, {}

    def suggest(self, trial_id):
        if not self.rates:
            return Searcher.FINISHED
        self.number[trial_id] = len(self.number)
        self.calls.append(("suggest", self.number[trial_id]))
        return {"rate": self.rates.pop(0)}

    def on_trial_result(self, trial_id, result):
        self.calls.append(("searcher row", self.number[trial_id], result["epoch"]))

    def on_trial_complete(self, trial_id, result=None, error=False):
        epoch = result["epoch"] if result else None
        self.calls.append(("searcher end", self.number[trial_id], epoch, error))

    def save(self, checkpoint_path):
        pass

    def restore(self, checkpoint_path):
        raise NotImplementedError


class Cutting(FIFOScheduler):
    """Stops everyone whose second value is 0.5, and writes down what it is called with."""

    def __init__(self, searcher):
        super().__init__()
        self.number, self.calls = searcher.number, searcher.calls

    def on_trial_add(self, tune_controller, trial):
        self.calls.append(("scheduler add", self.number[trial.trial_id]))

    def on_trial_result(self, tune_controller, trial, result):
        self.calls.append(("scheduler row", self.number[trial.trial_id], result["epoch"]))
        is_cut = (result["epoch"], result["val_accuracy"]) == (2, 0.5)
        return TrialScheduler.STOP if is_cut else TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller, trial, result):
        self.calls.append(("scheduler end", self.number[trial.trial_id], result["epoch"]))

    def on_trial_error(self, tune_controller, trial):
        self.calls.append(("scheduler error", self.number[trial.trial_id]))


def listed(rates):
    searcher = Listed(rates, [])
    return Contender(searcher, Cutting(searcher), lambda suggestion: ("tiny", point(suggestion["rate"])))


def run(contender, **more):
    table = tiny()
    return simulate(contender, {"tiny": table}, **{"slots": 1, "is_over": lambda outcome: False} | more)


def test_a_pruned_a_whole_and_a_failed_trial_are_simulated_row_by_row():
    contender = listed([0.02, 0.1, 0.4])
    outcome = run(contender)
    assert contender.searcher.calls == [
        ("suggest", 0),
        ("scheduler add", 0),
        ("scheduler row", 0, 1),
        ("searcher row", 0, 1),
        ("scheduler row", 0, 2),
        ("scheduler end", 0, 2),
        ("searcher end", 0, 2, False),
        ("suggest", 1),
        ("scheduler add", 1),
        *[(who, 1, epoch) for epoch in (1, 2, 3, 4) for who in ("scheduler row", "searcher row")],
        ("scheduler end", 1, 4),
        ("searcher end", 1, 4, False),
        ("suggest", 2),
        ("scheduler add", 2),
        ("scheduler row", 2, 1),
        ("searcher row", 2, 1),
        ("scheduler error", 2),
        ("searcher end", 2, None, True),
    ]
    (whole,) = outcome.whole
    assert (whole.value, whole.epochs, whole.all_epochs, whole.time) == (0.7, 6, 6, 6.0)
    assert (outcome.num_epochs, outcome.pruned, outcome.failed, outcome.time) == (7, 1, 1, 8.0)
    assert outcome.first_at("tiny", 0.7) == whole
    assert outcome.first_at("tiny", 0.71) is None
    assert outcome.best_within("tiny", 6) == 0.7
    assert outcome.best_within("tiny", 5) == 0


@pytest.mark.ray
def test_tune_itself_makes_the_same_calls(local_ray, tmp_path):
    """What the simulation leaves out is the trial itself; here Tune runs a function that reports the same rows."""
    import ray.tune

    rows = {rate: curve.rows(4) for rate, curve in zip(CURVES, tiny().curves, strict=True)}

    def trial(config):
        for row in rows[config["rate"]]:
            ray.tune.report(row)
        if not row["finished"]:
            raise FloatingPointError("the loss")

    simulated, real = listed([0.02, 0.1, 0.4]), listed([0.02, 0.1, 0.4])
    run(simulated)
    ray.tune.Tuner(
        trial,
        tune_config=ray.tune.TuneConfig(
            search_alg=real.searcher, scheduler=real.scheduler, num_samples=-1, max_concurrent_trials=1
        ),
        run_config=ray.tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    ).fit()
    assert real.searcher.calls == simulated.searcher.calls


def test_slots_run_side_by_side_and_take_the_next_trial_when_one_ends():
    contender = listed([0.1, 0.02, 0.1])
    outcome = run(contender, slots=2, epoch_time=lambda table, row: 3.0)
    ends = [call for call in contender.searcher.calls if call[0] == "searcher end"]
    assert ends == [("searcher end", 1, 2, False), ("searcher end", 0, 4, False), ("searcher end", 2, 4, False)]
    assert [(each.time, each.all_epochs) for each in outcome.whole] == [(12.0, 7), (18.0, 10)]


def test_a_simulation_stops_when_it_is_told_to():
    assert run(listed([0.1] * 9), is_over=lambda outcome: outcome.num_epochs >= 5).num_epochs == 5


def test_the_nearest_settings_answer():
    table = tiny()
    assert [table.nearest(point(rate)) for rate in (0.01, 0.04, 0.05, 0.19, 0.21, 0.5)] == [0, 0, 1, 1, 2, 2]
    assert table.nearest(point(0.02), without=(0,)) == 1


def test_every_recorded_trial_answers_once_before_one_answers_again():
    answers, curves = Answers(tiny()), tiny().curves
    asked = (0.01, 0.02, 0.01, 0.03, 0.03, 0.05, 0.01)
    assert [answers.curve(point(rate)) for rate in asked] == [curves[index] for index in (0, 1, 0, 2, 2, 1, 0)]


def test_a_continued_search_does_not_get_what_it_got_before():
    first = run(listed([0.1]))
    assert [each.value for each in first.whole] == [0.7]
    assert [each.value for each in run(listed([0.12])).whole] == [0.7]
    continued = run(listed([0.12]), answers=first.answers)
    assert (continued.whole, continued.failed) == ([], 1)


def test_settings_of_another_kind_count_nothing_and_the_kind_itself_counts_one():
    def answer(query, *recorded):
        curves = [Curve(each, "cccc", CURVES[0.1], {"classifier": 2.0}) for each in recorded]
        return Table("kinds", RUN, as_data(RUN), curves, is_weighted=False).nearest(query)

    low, high = ({"classifier.schedule.learning_rate": rate, "optimizer.weight_decay": 1e-5} for rate in (0.01, 2.0))
    cosine = {"classifier.schedule.kind": "cosine", "classifier.schedule.final_fraction": 0.1}
    step = {"classifier.schedule.kind": "step", "classifier.schedule.decay": 0.5}
    one_cycle = {"classifier.schedule.kind": "one_cycle"}
    farther = {"optimizer.weight_decay": 3e-5}  # by a little more than the whole interval of the learning rate
    assert answer(low | step, high | farther | step, low | cosine) == 1
    assert answer(low | one_cycle, high | farther | one_cycle, low | step) == 1
    nearer = {"classifier.schedule.learning_rate": 0.4}
    assert answer(low | step, low | cosine, high | nearer | step) == 1


def test_weights_favour_the_settings_that_matter():
    import random

    draw = random.Random(0)
    curves = []
    for _ in range(60):
        rate, decay = 0.01 * 50 ** draw.random(), 1e-5 * 500 ** draw.random()
        settings = point(rate) | {"optimizer.weight_decay": decay}
        curves.append(Curve(settings, "cccc", (0.1, 0.1, 0.1, rate), {"classifier": 1.0}))
    plain, weighted = (Table("t", RUN, as_data(RUN), curves, is_weighted=each) for each in (False, True))
    assert weighted.agreement() > plain.agreement()
    assert weighted.agreement() > 0.95


def test_milestones_become_the_parameter_they_came_from():
    drawn = {"classifier.schedule.kind": "step", "classifier.schedule.milestones": (0.4, 0.7)}
    assert point_of(drawn) == {"classifier.schedule.kind": "step", "classifier.schedule.first_milestone": 0.4}


# OptunaSearch warns of a space that takes a second, which on a busy machine drawing a point of ours may.
@pytest.mark.filterwarnings("ignore:Define-by-run function:UserWarning")
@pytest.mark.parametrize("name", ["digits-0.4", "digits-student", "cifar-0.4"])
def test_real_searches_run_on_recorded_tables(name):
    table = Table.load(name)
    assert [entry["name"] for entry in table.space] == [entry["name"] for entry in as_data(table.run)]
    most = 8 * table.num_epochs
    for strategy in (ours(make_pruner=EARLY), random_search, ray_default):
        outcome = simulate(
            strategy([table], 0),
            {name: table},
            slots=2,
            is_over=lambda outcome: outcome.num_epochs >= most,
        )
        assert outcome.num_epochs == most
        assert outcome.whole
        assert (outcome.pruned == 0) == (strategy is random_search)


@pytest.mark.filterwarnings("ignore:Define-by-run function:UserWarning")  # see above
def test_our_sampler_needs_fewer_epochs_than_random_search():
    table = Table.load("digits-student")
    target, most = table.target(0.99), 40 * table.num_epochs

    def epochs(strategy, seed):
        outcome = simulate(
            strategy([table], seed),
            {table.name: table},
            slots=2,
            is_over=lambda outcome: outcome.num_epochs >= most or outcome.first_at(table.name, target) is not None,
        )
        first = outcome.first_at(table.name, target)
        return most if first is None else first.epochs

    needed, needed_at_random = ([epochs(strategy, seed) for seed in range(20)] for strategy in (ours(), random_search))
    assert sum(needed) < 0.8 * sum(needed_at_random)


def test_in_a_grid_the_same_settings_are_answered_by_the_same_recorded_ones():
    names = ["digits-0", "digits-1"]
    grid = Table.load_grid(names)
    assert [table.name for table in grid] == names
    drawn = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    points = []
    for _ in range(40):
        trial = drawn.ask()
        sample(trial, grid[0].run)
        points.append(trial.params)
    rows = [[table.nearest(each) for each in points] for table in grid]
    assert rows[0] == rows[1]
    alone = [[Table.load(name).nearest(each) for each in points] for name in names]
    assert alone[0] != alone[1]
    with pytest.raises(UserError, match="recorded at the same settings in a grid, got digits-0, digits-student"):
        Table.load_grid(["digits-0", "digits-student"])


@pytest.mark.filterwarnings("ignore:Define-by-run function:UserWarning")  # see above
def test_the_command_compares_searches_and_goes_on_where_it_was(tmp_path, capfd):
    report, kept = tmp_path / "report.md", tmp_path / "kept.jsonl"
    common = ["--tables", "digits-student", "--groups", "determinism", "--against", "ours", "--processes", "1"]
    small = ["--seeds", "2", "--cap", "3", "--budget", "1", "--out", str(report), "--keep", str(kept)]
    assert main([*common, *small]) == 0
    text = report.read_text()
    assert text.strip() == capfd.readouterr().out.strip()
    assert "digits-student: 600 trials of 30 epochs" in text
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows[2:]] == ["ours", "as trials end", "by batches of 4", "by batches of 8"]
    assert rows[2][1:-1] == rows[3][1:-1]  # the same search under two names
    assert rows[3][-1].strip() == "1.00 [1.00, 1.00]"
    searches = kept.read_text()
    assert len(searches.splitlines()) == 8
    assert main([*common, *small]) == 0
    assert report.read_text() == text
    assert kept.read_text() == searches


def test_a_table_that_is_not_there_is_one_sentence(capsys):
    assert main(["--tables", "digits-0.3"]) == 2
    assert "simulate: tables must be recorded ones in" in capsys.readouterr().err
