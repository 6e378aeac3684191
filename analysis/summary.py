"""From runs to cells: the winner's validation accuracy, test accuracies over seeds, and paired differences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from refilled.errors import UserError
from refilled.statistics import mean_and_ci95

if TYPE_CHECKING:
    import pandas as pd

CELL = ["search_key", "overlap", "teacher", "student", "method"]
COLUMNS = (
    *CELL,
    "val_accuracy",
    "seeds",
    "test_accuracy",
    "mean",
    "ci95",
    "baseline_seeds",
    "baseline_test_accuracy",
    "baseline_mean",
    "baseline_ci95",
    "baseline_short_test_accuracy",
    "baseline_short_mean",
    "baseline_short_ci95",
    "num_pairs",
    "difference_mean",
    "difference_ci95",
    "num_trials",
    "num_pruned",
    "num_failed",
    "run_ids",
    "baseline_run_ids",
    "baseline_short_run_ids",
    "code_versions",
    "data_digests",
)


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a cell and method.

    A vanilla student is shared by all teachers: it is looked up by overlap and student. Only finished refits with a
    test accuracy count; of two with the same seed (the search went on and found another winner) the later one.
    Differences are taken between refits of the same seed.

    Args:
        runs: What `analysis.runs.fetch_runs` returns.

    Returns:
        The columns `COLUMNS`, accuracies in [0, 1], sorted by cell.

    Raises:
        UserError: There is no finished refit of any method.
    """
    import pandas as pd

    refits = _finished_refits(runs)
    if refits[refits["role"] == "method"].empty:
        raise UserError("experiment: the search has no finished refit yet, so that there is no test accuracy to report")
    methods = runs[runs["role"] == "method"]
    rows = [
        dict(zip(CELL, cell, strict=True)) | _cell(cell_runs, runs, refits)
        for cell, cell_runs in methods.groupby(CELL, sort=True)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _finished_refits(runs: pd.DataFrame) -> pd.DataFrame:
    done = runs[(runs["kind"] == "refit") & (runs["status"] == "FINISHED") & runs["test_accuracy"].notna()]
    done = done.sort_values("start_time", kind="stable")
    return done.drop_duplicates([*CELL, "role", "seed"], keep="last").sort_values("seed", kind="stable")


def _cell(cell_runs: pd.DataFrame, runs: pd.DataFrame, refits: pd.DataFrame) -> dict[str, Any]:
    first = cell_runs.iloc[0]
    trials = cell_runs[cell_runs["kind"] == "trial"]
    winners = trials[trials["winner"]].sort_values("val_accuracy", ascending=False, kind="stable")
    own = refits[refits.index.isin(cell_runs.index)]
    beside = refits[
        (refits["search_key"] == first["search_key"])
        & (refits["overlap"] == first["overlap"])
        & (refits["student"] == first["student"])
    ]
    baseline, short = (beside[beside["role"] == role] for role in ("baseline", "baseline_short"))
    pairs = own.merge(baseline, on="seed", suffixes=("", "_baseline"))
    differences = (pairs["test_accuracy"] - pairs["test_accuracy_baseline"]).tolist()
    difference_mean, difference_ci95 = _mean_and_ci95(differences)
    used = runs[runs["run_id"].isin([*own["run_id"], *baseline["run_id"], *short["run_id"]])]
    return (
        {"val_accuracy": winners["val_accuracy"].iloc[0] if len(winners) else math.nan}
        | {"seeds": own["seed"].tolist(), "baseline_seeds": baseline["seed"].tolist()}
        | _accuracies("", own)
        | _accuracies("baseline_", baseline)
        | _accuracies("baseline_short_", short)
        | {"num_pairs": len(differences), "difference_mean": difference_mean, "difference_ci95": difference_ci95}
        | {
            "num_trials": len(trials),
            "num_pruned": int((trials["status"] == "KILLED").sum()),
            "num_failed": int((trials["status"] == "FAILED").sum()),
            "run_ids": [*winners["run_id"].head(1), *own["run_id"]],
            "code_versions": sorted(set(used["code_version"]) - {""}),
            "data_digests": sorted(set(used["data_digest"]) - {""}),
        }
    )


def _accuracies(prefix: str, refits: pd.DataFrame) -> dict[str, Any]:
    values = refits["test_accuracy"].tolist()
    mean, ci95 = _mean_and_ci95(values)
    named = {"test_accuracy": values, "mean": mean, "ci95": ci95, "run_ids": refits["run_id"].tolist()}
    return {f"{prefix}{name}": value for name, value in named.items()}


def _mean_and_ci95(values: list[float]) -> tuple[float, float]:
    """As columns of a table have it: NaN where there is nothing to say."""
    mean, ci95 = mean_and_ci95(values) if values else (math.nan, None)
    return mean, math.nan if ci95 is None else ci95
