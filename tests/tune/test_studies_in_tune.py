"""The searcher and the scheduler inside a real Ray Tune, with an objective that is a formula."""

import math
import sys

import optuna
import outcomes
import pytest
from optuna.trial import TrialState
from outcomes import row_of

from refilled.config import RunConfig
from refilled.metrics import TrialEnd
from tune.studies.pruning import HalvingPruner
from tune.studies.searcher import Rules, StudyPlan, StudyScheduler, StudySearcher, open_storage, overrides_of

pytestmark = pytest.mark.ray
EPOCHS = 6
LEVELS = {"high": 0.9, "low": 0.2}


def objective(sample):
    """A run whose accuracy rises to the cell's level, less what the drawn lambda costs; some trials go wrong."""
    import ray.tune

    accident = sample["accidents"].get(f"{sample['cell']} {sample['number']}")
    strength = sample["config"]["classifier"]["distill_weight"]
    best = sample["levels"][sample["cell"]] - 0.05 * abs(math.log10(strength) - 0.5)
    for epoch in range(1, EPOCHS + 1):
        if (epoch == 2 and accident == "raises") or accident == "always":
            raise ValueError("on purpose")
        if epoch == 2 and accident == "returns":
            return
        if epoch == 2 and accident == "diverges":
            ray.tune.report(TrialEnd("diverged", "The loss is nan in epoch 2.").to_dict())
            return
        value = best * epoch / EPOCHS
        row = row_of(epoch, val_accuracy=value, best_val_accuracy=value, best_epoch=epoch, finished=epoch == EPOCHS)
        ray.tune.report(row.to_dict())


def make_plan(key, num_trials):
    run = RunConfig(method="kd", epochs=(0, EPOCHS))
    return StudyPlan(key=key, name=f"study-{key}", run=run, num_trials=num_trials, num_epochs=EPOCHS)


def tune_until_it_ends(searcher, folder, accidents):
    import ray.cloudpickle
    import ray.tune

    for module in (sys.modules[__name__], outcomes):  # workers cannot import a test module
        ray.cloudpickle.register_pickle_by_value(module)
    return ray.tune.Tuner(
        objective,
        param_space={"levels": LEVELS, "accidents": accidents},
        tune_config=ray.tune.TuneConfig(
            search_alg=searcher,
            scheduler=StudyScheduler(searcher),
            num_samples=-1,
            max_concurrent_trials=2,
            reuse_actors=True,
        ),
        run_config=ray.tune.RunConfig(name="search", storage_path=str(folder), verbose=0),
    ).fit()


@pytest.fixture
def storage(tmp_path):
    return open_storage(f"sqlite:///{tmp_path}/studies.db")


def trials_of(storage, key):
    return optuna.load_study(study_name=f"study-{key}", storage=storage).trials


def test_a_search_fills_every_cell_and_ends_whatever_trials_do(local_ray, tmp_path, storage):
    plans = [make_plan("high", 7), make_plan("low", 7)]
    accidents = {"low 1": "raises", "high 2": "diverges", "high 4": "returns", "low 3": "diverges"}
    # half goes on, of random trials: a sampler that learns would draw nothing to stop
    rules = Rules(seed=0, sampler="random", make_pruner=lambda plan, visible: HalvingPruner((4, 5), reduction=2))
    searcher = StudySearcher(plans, storage, rules)
    results = tune_until_it_ends(searcher, tmp_path, accidents)

    fails = {"high": {2, 4}, "low": {1, 3}}
    for key in LEVELS:
        trials = trials_of(storage, key)
        counts = searcher.counts(key)
        assert (counts.done, counts.failed, counts.running) == (7, 2, 0)
        assert {trial.number for trial in trials if trial.state == TrialState.FAIL} == fails[key]
        assert counts.pruned
        assert counts.complete  # the low cell too: the high one's values are no measure for it
        for trial in trials:
            epochs = list(trial.intermediate_values)
            assert epochs == list(range(1, len(epochs) + 1))
            if trial.state == TrialState.COMPLETE:
                assert len(epochs) == EPOCHS == trial.user_attrs["epoch"]
            elif trial.state == TrialState.PRUNED:
                assert epochs[-1] in (4, 5)
            assert trial.value == (None if trial.state == TrialState.FAIL else trial.intermediate_values[epochs[-1]])
        best = searcher.best(key)
        assert best.value == max(trial.value for trial in trials if trial.state == TrialState.COMPLETE)
        assert best.value == pytest.approx(LEVELS[key], abs=0.05)
    assert len(results) == 18
    assert results.num_errors == 1
    assert not any("sqlite" in path.read_text(errors="replace") for path in (tmp_path / "search").glob("*.pkl"))


def test_a_search_of_failing_trials_ends(local_ray, tmp_path, storage):
    accidents = {f"low {number}": "always" for number in range(20)}
    searcher = StudySearcher([make_plan("low", 4), make_plan("high", 1)], storage, Rules(seed=0))
    tune_until_it_ends(searcher, tmp_path, accidents)
    assert searcher.gave_up("low")
    assert 3 <= searcher.counts("low").failed <= 4  # above 2; one more may have been on its way
    assert searcher.counts("high").complete == 1


def test_an_interrupted_search_ends_with_exactly_its_trials_and_then_has_nothing_to_do(local_ray, tmp_path, storage):
    plans = [make_plan("high", 2), make_plan("low", 2)]
    dead = StudySearcher(plans, storage, Rules(seed=0))
    interrupted = [dead.suggest("a"), dead.suggest("b")]

    searcher = StudySearcher(plans, storage, Rules(seed=0))
    tune_until_it_ends(searcher, tmp_path, {})
    for key in LEVELS:
        counts = searcher.counts(key)
        assert (counts.done, counts.failed, counts.running) == (2, 0, 0)
    taken_over = [trials_of(storage, each["cell"])[each["number"]] for each in interrupted]
    assert [overrides_of(trial) for trial in taken_over] == [each["overrides"] for each in interrupted]

    assert len(tune_until_it_ends(StudySearcher(plans, storage, Rules(seed=0)), tmp_path / "again", {})) == 0
    assert len(trials_of(storage, "high")) == 2
