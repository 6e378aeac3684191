import optuna
import pytest

from refilled.config import RunConfig
from tune.studies.reuse import EmbeddingChoice
from tune.studies.searcher import Budget, Rules, StudyPlan, StudySearcher

RUN = RunConfig(method="refilled", epochs=(4, 2))
PLAN = StudyPlan(key="a", name="s", run=RUN, num_trials=60, num_epochs=6)
optuna.logging.set_verbosity(optuna.logging.WARNING)


def run_all(value_of, num_trials=60, rules=None, budget=Budget()):  # noqa: B008  # frozen
    """Trials one after the other; a trial that re-uses repeats its stage's rows as shared ones."""
    storage = optuna.storages.InMemoryStorage()
    plan = StudyPlan(key="a", name="s", run=RUN, num_trials=num_trials, num_epochs=6)
    searcher = StudySearcher([plan], storage, rules or Rules(share_embeddings=True, pruner="none"), budget)
    index = 0
    while isinstance(suggestion := searcher.suggest(str(index)), dict):
        for epoch in range(1, 7):
            value = value_of(suggestion)
            row = {"epoch": epoch, "val_accuracy": value, "finished": epoch == 6}
            if epoch > 4:
                row |= {"best_val_accuracy": value, "best_epoch": epoch}
            elif suggestion["origin"] == "reuse":
                row["shared"] = True
            searcher.should_prune(str(index), row)
        searcher.on_trial_complete(str(index), row)
        index += 1
    return searcher


def embedding_of(trial):
    return {k: v for k, v in trial.params.items() if k.startswith("embedding") or k == "optimizer.weight_decay"}


def test_a_trial_that_reuses_has_the_stage_of_an_earlier_one_and_a_classifier_of_its_own():
    searcher = run_all(lambda each: 0.5)
    trials = searcher.trials("a")
    reused = [trial for trial in trials if trial.user_attrs.get("origin") == "reuse"]
    assert reused
    assert len(reused) < len(trials) - 4
    for trial in reused:
        source = trials[trial.user_attrs["from"]]
        assert source.number < trial.number
        assert embedding_of(trial) == embedding_of(source)
        assert trial.params != source.params
        assert trial.user_attrs["epochs_shared"] == 4
    counts = searcher.counts("a")
    assert counts.epochs_shared == 4 * len(reused)
    assert counts.epochs + counts.epochs_shared == 6 * 60


def test_shared_epochs_cost_nothing_of_the_budget():
    counts = run_all(lambda each: 0.5, budget=Budget(max_epochs_total=150)).counts("a")
    assert 150 - 6 < counts.epochs <= 150
    assert counts.epochs_shared > 0


def test_the_better_way_is_taken_more_often():
    by_classifier = run_all(lambda each: each["number"] / 100 if each["origin"] == "reuse" else 0.01)
    by_embedding = run_all(lambda each: each["number"] / 100 if each["origin"] != "reuse" else 0.01)
    numbers = [
        sum(trial.user_attrs.get("origin") == "reuse" for trial in each.trials("a"))
        for each in (by_classifier, by_embedding)
    ]
    assert numbers[0] > 40
    assert numbers[1] < 20


def test_good_stages_are_chosen_more_often_than_bad_ones():
    study = optuna.create_study(direction="maximize")
    for value in (0.1, 0.2, 0.9, 0.3):
        trial = study.ask()
        trial.suggest_float("embedding.temperature", 0.1, 4.0)
        trial.suggest_float("classifier.temperature", 0.1, 4.0)
        for epoch in range(6):
            trial.report(value, epoch)
        study.tell(trial, value)
    chosen = [EmbeddingChoice(PLAN).choose(study.trials, seed) for seed in range(200)]
    share = sum(point.number == 2 for point in chosen) / 200
    assert share == pytest.approx(1 / (1 + 1 / 4 + 1 / 9 + 1 / 16), abs=0.1)
    assert {tuple(point.params) for point in chosen} == {("embedding.temperature",)}
    assert EmbeddingChoice(PLAN).choose(study.trials, 7) == EmbeddingChoice(PLAN).choose(study.trials, 7)


def test_nothing_is_reused_before_a_few_trials_are_whole_or_unless_asked():
    assert "reuse" not in {trial.user_attrs.get("origin") for trial in run_all(lambda each: 0.5, 4).trials("a")}
    plain = run_all(lambda each: 0.5, 20, Rules(pruner="none"))
    assert "reuse" not in {trial.user_attrs.get("origin") for trial in plain.trials("a")}
