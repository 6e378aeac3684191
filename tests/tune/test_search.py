"""The command itself, as a process, on real images."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

ROOT = Path(__file__).parents[2]
SMALL = {"trials": "3", "seeds": "2", "epochs": "3 4", "teacher-epochs": "6", "overlaps": "0 1"}

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def run_command(command: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    return subprocess.run(
        [sys.executable, str(ROOT / command), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )


def search(storage: Path, **changes: str) -> list[dict[str, Any]]:
    flags = SMALL | {name.replace("_", "-"): value for name, value in changes.items()}
    arguments = [word for name, value in flags.items() for word in (f"--{name}", *value.split())]
    done = run_command("tune/search.py", *arguments, "--storage", str(storage))
    assert done.returncode == 0, done.stderr
    summary: list[dict[str, Any]] = json.loads((storage / "summary.json").read_text())
    for each in summary:
        assert f"{100 * each['val_accuracy']:.2f}" in done.stdout
        assert f"{100 * each['test_accuracy_mean']:.2f}" in done.stdout
        assert f"{100 * each['baseline_test_accuracy_mean']:.2f}" in done.stdout
        assert each["method"] == "student" or f"{100 * each['difference_mean']:+.2f}" in done.stdout
    return summary


def trials_of(storage: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Every study's trials: state, parameters, values by epoch."""
    url = f"sqlite:///{storage / 'studies.db'}"
    found = {}
    for name in optuna.get_all_study_names(url):
        study = optuna.load_study(study_name=name, storage=url)
        found[study.user_attrs["cell"]] = sorted(
            (trial.state.name, json.dumps(trial.params, sort_keys=True), tuple(trial.intermediate_values.items()))
            for trial in study.trials
        )
    return found


@pytest.fixture(scope="module")
def digits_search(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    storage = tmp_path_factory.mktemp("search")
    return storage, search(storage)


def test_summary_has_every_cell_and_all_it_promises(digits_search: tuple[Path, list[dict[str, Any]]]) -> None:
    _, summary = digits_search
    rows = [(each["overlap"], each["method"]) for each in summary]
    assert rows == [(0.0, "student"), (0.0, "refilled"), (1.0, "student"), (1.0, "refilled")]
    for each in summary:
        assert (each["teacher"], each["student"]) == ("convnet-32", "convnet-8")
        assert len(each["test_accuracy"]) == len(each["baseline_test_accuracy"]) == len(each["run_ids"]) == 2
        assert each["test_accuracy_mean"] == pytest.approx(sum(each["test_accuracy"]) / 2)
        # two values: the half width is t(0.975, 1) = 12.706 times half their distance
        half_distance = abs(each["test_accuracy"][0] - each["test_accuracy"][1]) / 2
        assert each["test_accuracy_ci95"] == pytest.approx(12.7062 * half_distance, rel=1e-4)
        assert each["config"]["epochs"] == ([0, 7] if each["method"] == "student" else [3, 4])
        assert each["baseline_config"]["epochs"] == [0, 7]
        assert len(each["baseline_short_test_accuracy"]) == 2
        assert each["config"]["val_fraction"] == 0.0
        assert len(each["teacher_classes"]) == len(each["student_classes"]) == 5
        assert each["test_accuracy_mean"] > 0.5  # chance is 0.2
    for student, refilled in (summary[:2], summary[2:]):
        differences = [a - b for a, b in zip(refilled["test_accuracy"], student["test_accuracy"], strict=True)]
        assert refilled["difference_mean"] == pytest.approx(sum(differences) / 2)
        assert refilled["differences"]["student"]["mean"] == refilled["difference_mean"]
        assert student["differences"]["refilled"]["mean"] == pytest.approx(-refilled["difference_mean"])
        assert refilled["baseline_run_ids"] == student["baseline_run_ids"] == student["run_ids"]
        assert not set(student["run_ids"]) & set(student["baseline_short_run_ids"])
    assert not set(summary[0]["teacher_classes"]) & set(summary[0]["student_classes"])
    assert summary[2]["teacher_classes"] == summary[2]["student_classes"]


def test_mlflow_agrees_with_the_summary(digits_search: tuple[Path, list[dict[str, Any]]]) -> None:
    from mlflow.tracking import MlflowClient

    storage, summary = digits_search
    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("refilled")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    parents = [run for run in runs if run.data.tags["kind"] == "search"]
    assert len(parents) == 1
    assert parents[0].info.status == "FINISHED"
    children = [run for run in runs if run is not parents[0]]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
    trials = [run for run in children if run.data.tags["kind"] == "trial"]
    refits = [run for run in children if run.data.tags["kind"] == "refit"]
    assert parents[0].data.tags["methods"] == "student, refilled"
    assert len(trials) == 2 * 2 * 3  # two cells and two vanilla students, three trials each
    assert len(refits) == 2 * 3 * 2  # winner, vanilla, vanilla at classifier epochs; two seeds
    assert {run.data.tags["role"] for run in trials} == {"method"}
    assert sorted((run.data.tags["method"], run.data.tags["role"]) for run in refits) == [
        *[("refilled", "method")] * 4,
        *[("student", "baseline_short")] * 4,
        *[("student", "method")] * 4,
    ]
    by_id = {run.info.run_id: run for run in children}
    for each in summary:
        for run_id, value in zip(each["baseline_short_run_ids"], each["baseline_short_test_accuracy"], strict=True):
            assert by_id[run_id].data.tags["role"] == "baseline_short"
            assert by_id[run_id].data.metrics["test_accuracy"] == value
        for run_id, value, seed in zip(each["run_ids"], each["test_accuracy"], each["seeds"], strict=True):
            refit = by_id[run_id]
            assert refit.data.metrics["test_accuracy"] == value
            assert refit.data.tags["seed"] == str(seed)
            assert float(refit.data.params["classifier.distill_weight"]) == pytest.approx(
                each["config"]["classifier"]["distill_weight"]
            )
            names = {item.path for item in client.list_artifacts(run_id)}
            assert {"model.pt", "config.json", "classes.json"} <= names
        winner = by_id[each["trial_run_id"]]
        assert winner.data.tags["winner"] == "true"
        assert winner.data.metrics["best/val_accuracy"] == each["val_accuracy"]
        same_cell = [run for run in trials if run.data.tags["cell"] == winner.data.tags["cell"]]
        complete = [run.data.metrics["best/val_accuracy"] for run in same_cell if run.info.status == "FINISHED"]
        assert max(complete) == each["val_accuracy"]
    assert not any("test_accuracy" in run.data.metrics for run in trials)
    states = {cell: [state for state, _, _ in found] for cell, found in trials_of(storage).items()}
    statuses = {"COMPLETE": "FINISHED", "PRUNED": "KILLED"}
    for cell, found in states.items():
        seen = sorted(run.info.status for run in trials if run.data.tags["cell"] == cell)
        assert seen == sorted(statuses[state] for state in found)
    for each in summary:
        history = client.get_metric_history(each["trial_run_id"], "val_accuracy")
        assert [point.step for point in history] == list(range(1, 8))


def test_report_is_made_from_mlflow_alone(digits_search: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    storage, summary = digits_search
    uri = f"sqlite:///{storage / 'mlflow.db'}"
    done = run_command("analysis/report.py", "--experiment", "refilled", "--tracking-uri", uri, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "overlap_table.md").read_text()
    for each in summary:
        assert f"{100 * each['test_accuracy_mean']:.2f}" in table
        assert f"{100 * each['baseline_test_accuracy_mean']:.2f}" in table
    assert (tmp_path / "accuracy_over_overlap.png").read_bytes().startswith(b"\x89PNG")


def test_same_command_again_finds_everything_and_doubles_nothing(
    digits_search: tuple[Path, list[dict[str, Any]]],
) -> None:
    from mlflow.tracking import MlflowClient

    storage, summary = digits_search
    before = trials_of(storage)
    shutil.rmtree(storage / "cache")  # which nothing that is done needs
    assert search(storage) == summary
    assert trials_of(storage) == before
    (record,) = (json.loads(path.read_text()) for path in storage.glob("searches/*/artifacts/search.json"))
    assert set(record["forecast"]["forecast"]["epochs"].values()) == {0}
    assert {path.name for path in (storage / "cache").iterdir()} <= {"images", "timings"}
    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("refilled")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    assert len(runs) == 1 + 12 + 12
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}


def _write_digits(folder: Path, *, shuffle_test_labels: bool) -> None:
    """The digits as Parquet shards with a Hugging Face image column."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    is_test = np.arange(len(digits.target)) % 4 == 0
    for part, chosen in (("train", ~is_test), ("test", is_test)):
        labels = digits.target[chosen]
        if part == "test" and shuffle_test_labels:
            labels = np.random.default_rng(0).permutation(labels)
        rows = []
        for pixels in digits.images[chosen]:
            buffer = io.BytesIO()
            Image.fromarray((pixels * 15).astype(np.uint8)).convert("RGB").save(buffer, format="png")
            rows.append({"bytes": buffer.getvalue(), "path": None})
        image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({"image": pa.array(rows, image_type), "label": pa.array(labels, pa.int64())})
        folder.mkdir(exist_ok=True)
        pq.write_table(table, folder / f"{part}-00000-of-00001.parquet")


def test_test_labels_are_out_of_the_searchs_reach(tmp_path: Path) -> None:
    """Invariant 1: with shuffled test labels the search is the same to the last bit, and only the test differs."""
    found = {}
    for name in ("true", "shuffled"):
        _write_digits(tmp_path / f"{name}-data", shuffle_test_labels=name == "shuffled")
        source = f"parquet:{tmp_path / f'{name}-data'}"
        # one trial at a time: with two, the order in which they end is the machine's, and the sampler sees it
        one_by_one = str(os.cpu_count())
        summary = search(tmp_path / name, data=source, overlaps="0.4", seeds="1", cpus_per_worker=one_by_one)
        found[name] = summary, trials_of(tmp_path / name)
    (true, trials), (shuffled, trials_of_shuffled) = found["true"], found["shuffled"]
    assert trials == trials_of_shuffled
    assert [each["method"] for each in true] == [each["method"] for each in shuffled] == ["student", "refilled"]
    for one, other in zip(true, shuffled, strict=True):
        for key in ("config", "baseline_config"):
            assert one[key].pop("data") != other[key].pop("data")  # where it lies is all that may differ
        for key in ("config", "val_accuracy", "trial", "baseline_config", "baseline_val_accuracy", "data_digest"):
            assert one[key] == other[key]
        assert one["test_accuracy"][0] > 0.5
        assert other["test_accuracy"][0] < 0.4  # chance is 0.2


def test_a_method_more_goes_on_with_the_others_studies(tmp_path: Path) -> None:
    """Four kinds of methods: without teacher, in two stages, by embeddings, by feature maps."""
    small = {"overlaps": "0.4", "trials": "4", "seeds": "1", "pruner": "halving"}
    first = search(tmp_path, methods="student rkd", **small)
    before = trials_of(tmp_path)
    methods = ["student", "rkd", "refilled_lkd", "at"]
    summary = search(tmp_path, methods=" ".join(methods), **small)
    assert [each["method"] for each in summary] == methods
    after = trials_of(tmp_path)
    assert {cell.split()[-1] for cell in after.keys() - before.keys()} == {"refilled_lkd", "at"}
    assert {cell: after[cell] for cell in before} == before
    assert len(optuna.get_all_study_names(f"sqlite:///{tmp_path / 'studies.db'}")) == len(methods)
    assert [each["trial"] for each in summary[:2]] == [each["trial"] for each in first]
    assert [each["test_accuracy"] for each in summary[:2]] == [each["test_accuracy"] for each in first]
    for each in summary:
        # The equal share of 3, and the extra trial that all of a cell get or none.
        assert (each["trials"]["complete"] + each["trials"]["pruned"], each["trials"]["failed"]) == (4, 0)
        assert list(each["differences"]) == [method for method in methods if method != each["method"]]
        assert each["differences"].get("student", {"mean": 0})["mean"] == each["difference_mean"]
        assert sum(each["config"]["epochs"]) == 7
        assert each["test_accuracy"][0] > 0.5
    assert [each["terms"] for each in summary] == [
        "cross_entropy",
        "rkd>cross_entropy",
        "cross_entropy+lkd",
        "cross_entropy+at",
    ]
    assert {each["config"]["terms"].get("at", {}).get("weight") is None for each in summary[:3]} == {True}
    assert summary[3]["config"]["terms"]["at"]["weight"] > 0


@pytest.mark.parametrize("backend", ["auto", "torch_trainer"])
def test_trials_on_two_workers(tmp_path: Path, backend: str) -> None:
    small = {"method": "student", "overlaps": "1", "trials": "2", "seeds": "1", "trial_backend": backend}
    summary = search(tmp_path, **small, workers_per_trial="2", cpus_per_worker="0.5")
    assert bool(list((tmp_path / "ray").glob("trial-*"))) == (backend == "torch_trainer")  # Ray Train's own folders
    assert summary[0]["trials"]["complete"] + summary[0]["trials"]["pruned"] == 2
    assert summary[0]["trials"]["failed"] == 0
    assert summary[0]["test_accuracy"][0] > 0.5


def test_two_searches_at_once_on_one_storage_do_not_see_each_other(tmp_path: Path) -> None:
    small = {"trials": "2", "seeds": "1", "overlaps": "1", "method": "student", "no_forecast": ""}
    flags = [
        word for name, value in (SMALL | small).items() for word in (f"--{name.replace('_', '-')}", *value.split())
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    both = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tune/search.py"), *flags, "--storage", str(tmp_path), "--experiment", name],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in ("one", "other")
    ]
    outputs = [process.communicate(timeout=280)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    studies = [optuna.load_study(study_name=name, storage=url) for name in optuna.get_all_study_names(url)]
    assert sorted(study.study_name.split()[0] for study in studies) == ["one", "other"]
    for study in studies:
        assert [trial.number for trial in study.trials] == [0, 1]
        assert all(trial.state.is_finished() for trial in study.trials)
    again = run_command("tune/search.py", *flags, "--storage", str(tmp_path), "--experiment", "one", "--no-resume")
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "resume is off, but 2 ended and 0 interrupted trials" in again.stderr
