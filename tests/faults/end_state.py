"""What a command leaves behind that must not depend on what happened to it on the way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

TIMING = {"images_per_second", "epoch_s"}


def end_state(storage: Path) -> dict[str, Any]:
    """Studies, rows of every run and every run in MLflow, in a form that can be compared by ==.

    Args:
        storage: of a search or a training that is over.

    Returns:
        By kind of record and name: trials with number, state, settings, values by epoch and value; rows by epoch;
        MLflow's runs with status and every logged value by epoch; test accuracies. Times and MLflow's ids are left out.
    """
    return {
        "trials": _trials(storage),
        "rows": {str(path.parent.relative_to(storage)): _rows(path) for path in storage.glob("*/*/metrics.jsonl")},
        "tests": {path.parent.name: json.loads(path.read_text()) for path in storage.glob("runs/*/test.json")},
        "mlflow": _mlflow(storage),
    }


def differences(expected: Any, found: Any, tolerance: float = 0.0, place: str = "") -> list[str]:
    """Where two end states differ, one line each; numbers by more than `tolerance`, relative to the larger."""
    if isinstance(expected, dict) and isinstance(found, dict):
        lines = [f"{place}/{key}: only in one" for key in sorted(expected.keys() ^ found.keys(), key=str)]
        for key in expected.keys() & found.keys():
            lines += differences(expected[key], found[key], tolerance, f"{place}/{key}")
        return lines
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        return [line for index, (a, b) in pairs for line in differences(a, b, tolerance, f"{place}/{index}")]
    if isinstance(expected, float) and isinstance(found, float):
        is_equal = math.isclose(expected, found, rel_tol=tolerance) or (math.isnan(expected) and math.isnan(found))
    else:
        is_equal = expected == found
    return [] if is_equal else [f"{place}: {expected!r:.80} became {found!r:.80}"]


def _trials(storage: Path) -> dict[str, list[dict[str, Any]]]:
    import optuna

    if not (storage / "studies.db").exists():  # a training, not a search
        return {}
    url = f"sqlite:///{storage / 'studies.db'}"
    found = {}
    for name in optuna.get_all_study_names(url):
        study = optuna.load_study(study_name=name, storage=url)
        found[study.user_attrs["cell"]] = [
            {
                "number": trial.number,
                "state": trial.state.name,
                "params": trial.params,
                "values": {str(epoch): value for epoch, value in trial.intermediate_values.items()},
                "value": trial.value,
                "origin": trial.user_attrs.get("origin"),
            }
            for trial in study.trials
        ]
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


def _mlflow(storage: Path) -> dict[str, list[dict[str, Any]]]:
    """By key, every run that has it, so that one too many is a difference."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    experiments = [each.experiment_id for each in client.search_experiments()]
    found: dict[str, list[dict[str, Any]]] = {}
    for run in client.search_runs(experiments, max_results=5000):
        # A search's own run says how long it took.
        kind = run.data.tags["kind"]
        names = [] if kind == "search" else [name for name in run.data.metrics if name not in TIMING]
        history = {name: client.get_metric_history(run.info.run_id, name) for name in names}
        of_run = {
            "status": run.info.status,
            "winner": run.data.tags.get("winner"),
            "kind": kind,
            "metrics": {name: sorted(_point(each) for each in logged) for name, logged in history.items()},
        }
        found.setdefault(run.data.tags["run_key"], []).append(of_run)
    return found


def _point(metric: Any) -> list[float]:
    return [metric.step, metric.value]
