import json
import logging
import math
import os
import shutil
import subprocess
import sys

import optuna
import pytest
from optuna.trial import TrialState

from refilled.config import RunConfig
from refilled.config.search import SAMPLERS
from refilled.methods import METHODS
from refilled.stages import complete
from tune.studies.samplers import make_sampler
from tune.studies.space import default_point, sample, space
from tune.studies.study_store import open_storage

NUM_TRIALS = 16
NUM_RANDOM = 4  # tpe and gp draw so many of 16 at random
optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture
def logged():
    """What Optuna says through its own logger, which pytest's warning filter does not see."""
    lines = []

    class Keep(logging.Handler):
        def emit(self, record):
            if "greenlet" not in record.getMessage():  # a package that would make gp faster
                lines.append(record.getMessage())

    handler = Keep()
    logging.getLogger("optuna").addHandler(handler)
    yield lines
    logging.getLogger("optuna").removeHandler(handler)


def ask(study, kind, run, *, trial_seed=None, study_seed=7, num_trials=NUM_TRIALS):
    """Draw one trial as the searcher does: with a sampler of its own, whose seed follows from the trial's number."""
    seed = len(study.get_trials(deepcopy=False)) if trial_seed is None else trial_seed
    study.sampler = make_sampler(kind, study_seed=study_seed, trial_seed=seed, num_trials=num_trials)
    trial = study.ask()
    sample(trial, run)
    return trial


def value_of(trial):
    """A made-up accuracy: learning rates near 0.1 are good."""
    return 1 - abs(trial.params["classifier.schedule.learning_rate"] - 0.1)


def fill(study, kind, run, *, count, running=0):
    """Run a study: the run itself first, every third trial pruned, every fifth failed, the last ones left running."""
    study.enqueue_trial(default_point(run))
    for number in range(count):
        trial = ask(study, kind, run)
        trial.report(value_of(trial), 1)
        if number >= count - running:
            continue
        if number % 5 == 4:
            study.tell(trial, state=TrialState.FAIL)
        elif number % 3 == 2:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, value_of(trial))
    return study


def new_study(kind="random"):
    return optuna.create_study(
        direction="maximize", sampler=make_sampler(kind, study_seed=0, trial_seed=0, num_trials=1)
    )


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("method", METHODS)
def test_every_trial_is_a_valid_run_and_nothing_is_warned_of(kind, method, logged):
    run = complete(RunConfig(method=method))
    # A process for a Gaussian process costs 0.1 s a trial.
    study = fill(new_study(), kind, run, count=9 if kind == "gp" else 20, running=2)
    assert study.trials[0].params == default_point(run)
    for trial in study.trials:
        drawn = set(trial.params)
        assert drawn == {entry.name for entry in space(run) if entry.is_drawn(trial.params)}
    kinds = {trial.params["classifier.schedule.kind"] for trial in study.trials}
    assert len(kinds) > 1  # conditional settings came and went
    assert logged == []


ASK_IN_ANOTHER_PROCESS = """
import json, sys
import optuna, torch
from refilled.config import RunConfig
from tune.studies.samplers import make_sampler
from tune.studies.space import sample
torch.set_num_threads(1)
study = optuna.load_study(study_name="cell", storage=sys.argv[1])
for kind in sys.argv[2:]:
    study.sampler = make_sampler(kind, study_seed=7, trial_seed=2**33 - 1, num_trials=16)
    trial = study.ask()
    sample(trial, RunConfig())
    print(json.dumps(trial.params))
"""


def test_two_processes_at_the_same_state_of_a_study_draw_the_same_point(tmp_path):
    # This process drew with other samplers before; the others have nothing but what the storage holds.
    study = fill(new_study(), "qmc", RunConfig(), count=14, running=2)
    storage = open_storage(f"sqlite:///{tmp_path}/studies.db")
    stored = optuna.create_study(study_name="cell", storage=storage, direction="maximize")
    stored.add_trials(study.trials)
    for name, value in study._storage.get_study_system_attrs(study._study_id).items():  # where the sequence is
        storage.set_study_system_attr(stored._study_id, name, value)
    storage.engine.dispose()
    processes = []
    for hash_seed in ("1", "2"):
        copy = tmp_path / f"copy{hash_seed}.db"
        shutil.copy(tmp_path / "studies.db", copy)
        processes.append(
            subprocess.Popen(
                [sys.executable, "-W", "error", "-c", ASK_IN_ANOTHER_PROCESS, f"sqlite:///{copy}", *SAMPLERS],
                env=os.environ | {"PYTHONHASHSEED": hash_seed},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    answers = [process.communicate(timeout=120)[0] for process in processes]
    here = [json.dumps(ask(study, kind, RunConfig(), trial_seed=2**33 - 1).params) for kind in SAMPLERS]
    assert [answer.splitlines() for answer in answers] == [here, here]


@pytest.mark.parametrize("kind", SAMPLERS)
def test_different_trial_seeds_draw_different_points(kind):
    run = RunConfig()

    def drawn(seed, count):
        study = fill(new_study(), "random", run, count=count)
        return ask(study, kind, run, trial_seed=seed).params

    for count in (1, 12):  # in the random start and after it
        points = [drawn(seed, count) for seed in (1, 1, 2, 3)]
        assert points[0] == points[1]
        # With qmc the trial's seed decides conditional settings only: what the first trial had follows the sequence.
        if kind != "qmc":
            assert all(point != other for index, point in enumerate(points[1:]) for other in points[index + 2 :])


@pytest.mark.parametrize("kind", ["tpe", "gp"])
def test_a_search_learns_after_its_random_start(kind):
    run = RunConfig(method="student")
    own, random = {}, {}
    for num_told, is_random in ((NUM_RANDOM - 1, True), (12, False)):
        for name, found in ((kind, own), ("random", random)):
            study = new_study()
            for _ in range(num_told):
                trial = ask(study, "random", run)
                study.tell(trial, value_of(trial))
            found[num_told] = ask(study, name, run, trial_seed=3).params
        assert (own[num_told] == random[num_told]) is is_random


@pytest.mark.parametrize("kind", ["tpe", "gp"])
def test_trials_that_are_drawn_together_differ(kind):
    run = RunConfig(method="student")
    study = fill(new_study(), "random", run, count=12)
    together = [ask(study, kind, run, trial_seed=seed).params for seed in (100, 101, 102, 103)]
    rates = {point["classifier.schedule.learning_rate"] for point in together}
    assert len(rates) == 4


def stratification(study, name, low, high):
    """How many of as many equal parts of [low, high] hold a value of this setting, in its logarithm."""
    values = [trial.params[name] for trial in study.trials[1:]]
    parts = {int(len(values) * math.log(value / low) / math.log(high / low)) for value in values}
    return len(parts) / len(values)


def test_qmc_is_one_sequence_a_study_whatever_becomes_of_its_first_trials():
    run = RunConfig(method="student")

    def points(study_seed, *, first=TrialState.COMPLETE, told=True):
        study = new_study()
        study.enqueue_trial(default_point(run))
        for number in range(17):
            trial = ask(study, "qmc", run, trial_seed=number, study_seed=study_seed)
            if number == 0 and first is not None:
                study.tell(trial, 0.5 if first == TrialState.COMPLETE else None, state=first)
            elif told:
                study.tell(trial, 0.5)
        return study

    study = points(0)
    drawn = [trial.params for trial in study.trials]
    assert [trial.params for trial in points(0, first=TrialState.FAIL).trials] == drawn
    assert [trial.params for trial in points(0, first=None, told=False).trials] == drawn
    assert [trial.params for trial in points(1).trials[1:]] != drawn[1:]
    # 16 points of the sequence: one in every sixteenth of every setting that the first trial had
    assert stratification(study, "classifier.schedule.learning_rate", 0.01, 2.0) == 1
    assert stratification(study, "optimizer.weight_decay", 1e-5, 5e-3) == 1
    # What it had not is drawn independently, by every trial anew.
    name = "classifier.schedule.decay"
    decays = [trial.params[name] for trial in study.trials if name in trial.params]
    assert len(set(decays)) == len(decays) >= 5
    kinds = [trial.params["classifier.schedule.kind"] for trial in study.trials[1:]]
    assert {kinds.count(kind) for kind in set(kinds)} <= {5, 6}
