"""From runs to cells: the winner's validation accuracy, test accuracies over seeds, and differences paired by seed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from refilled.errors import UserError
from refilled.methods import NO_TEACHER, SHORT_VANILLA, VANILLA
from refilled.statistics import mean_and_ci95

if TYPE_CHECKING:
    import pandas as pd

CELL = ["search_key", "overlap", "teacher", "student", "images_per_class"]
COLUMNS = (
    *CELL,
    "method",
    "val_accuracy",
    "seeds",
    "test_accuracy",
    "mean",
    "ci95",
    "num_pairs",
    "difference_mean",
    "difference_ci95",
    "num_trials",
    "num_pruned",
    "num_failed",
    "run_ids",
    "code_versions",
    "data_digests",
)
DIFFERENCE_COLUMNS = (*CELL, "method", "other", "mean", "ci95", "num_pairs")

_TYPES = {"images_per_class": "Int64"}
_KINDS = ("trial", "refit")
_ROLE_OF_SHORT = "baseline_short"
_OF_REFITS = ("params.seed", "params.val_fraction", "params.epochs")  # in which refits differ from their winner
_ROLES = ("method", _ROLE_OF_SHORT)


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a method of a cell.

    What was run without a teacher, such as the vanilla student, stands in every cell of its search, overlap, student
    and images a class, and in a cell of teacher `NO_TEACHER` where there is none. The vanilla student's refits with the
    classifier stage's epochs alone are the method `SHORT_VANILLA`. Only finished refits of the winner with a test
    accuracy count, not those of an earlier one, which a search that went on leaves behind.

    Args:
        runs: What `analysis.runs.fetch_runs` returns.

    Returns:
        The columns `COLUMNS`, accuracies in [0, 1], sorted by cell, methods as in `in_order`. `images_per_class` is a
        nullable integer; NA means all images of a class and comes last. Differences are to the
        vanilla student of the cell, between refits of the same seed; without any they are NaN, and so are the vanilla
        student's own. `run_ids` are the winning trial's and its refits'.

    Raises:
        UserError: There is no finished refit of any method.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for cell, of_cell in _placed(runs).groupby(CELL, sort=True, dropna=False):
        groups = {str(method): of_method for method, of_method in of_cell.groupby("method")}
        winners = {method: _winner(of_method) for method, of_method in groups.items()}
        winners[SHORT_VANILLA] = winners.get(VANILLA)
        methods = {method: _of_method(of_method, winners[method]) for method, of_method in groups.items()}
        for method in in_order(methods):
            place = dict(zip(CELL, cell, strict=True)) | {"method": method}
            rows.append(place | methods[method] | _to_vanilla(method, methods))
    if not any(row["test_accuracy"] for row in rows):
        raise UserError("experiment: the search has no finished refit yet, so that there is no test accuracy to report")
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(_TYPES)


def differences(cells: pd.DataFrame) -> pd.DataFrame:
    """Every pair of methods of a cell, between refits of the same seed.

    Args:
        cells: What `summarise` returns.

    Returns:
        The columns `DIFFERENCE_COLUMNS`: `mean` and `ci95` are of the test accuracy of `method` minus that of `other`,
        which is the earlier one as in `in_order`. A pair without a common seed has no numbers.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for cell, of_cell in cells.groupby(CELL, sort=True, dropna=False):
        methods = {str(row["method"]): row for row in of_cell.to_dict("records")}
        for other, method in itertools.combinations(in_order(methods), 2):
            names = dict(zip(CELL, cell, strict=True)) | {"method": method, "other": other}
            mean, ci95, num_pairs = _paired_difference(methods[method], methods[other])
            rows.append(names | {"mean": mean, "ci95": ci95, "num_pairs": num_pairs})
    return pd.DataFrame(rows, columns=list(DIFFERENCE_COLUMNS)).astype(_TYPES)


def in_order(methods: Iterable[str]) -> list[str]:
    """Different methods as tables and figures list them: the vanilla student, then by name."""
    return sorted(set(methods), key=lambda method: (method != VANILLA, method != SHORT_VANILLA, method))


def as_images(value: object) -> int | None:
    """A number of images a class as tables hold it; None: all of them."""
    import pandas as pd

    return None if pd.isna(value) else int(value)  # type: ignore[call-overload]  # whatever number a column has


def numbers_of_images(cells: pd.DataFrame) -> list[int | None]:
    """The different numbers of images a class, in ascending order, None (all of them) last."""
    found = {as_images(value) for value in cells["images_per_class"]}
    return sorted(found, key=lambda images: math.inf if images is None else images)


def _placed(runs: pd.DataFrame) -> pd.DataFrame:
    """Trials and refits under the cells and methods that show them; one without a teacher may be under several."""
    import pandas as pd

    placed = runs[runs["kind"].isin(_KINDS) & runs["role"].isin(_ROLES)]
    images = placed["images_per_class"].astype("Int64").fillna(0)  # a missing value is no key; no run has 0 images
    keys = list(zip(placed["search_key"], placed["overlap"], placed["student"], images, strict=True))
    beside: dict[tuple[Any, ...], set[str]] = {}
    for key, teacher in zip(keys, placed["teacher"], strict=True):
        if teacher != NO_TEACHER:
            beside.setdefault(key, set()).add(teacher)
    teachers = [
        sorted(beside.get(key, {NO_TEACHER})) if teacher == NO_TEACHER else [teacher]
        for key, teacher in zip(keys, placed["teacher"], strict=True)
    ]
    methods = placed["method"].mask(placed["role"] == _ROLE_OF_SHORT, SHORT_VANILLA)
    listed = placed.assign(teacher=pd.Series(teachers, index=placed.index, dtype=object), method=methods)
    return listed.explode("teacher", ignore_index=True)


def _winner(runs: pd.DataFrame) -> pd.Series[Any] | None:
    """The winning trial of one method in one cell."""
    winners = runs[(runs["kind"] == "trial") & runs["winner"]]
    best = winners.sort_values("val_accuracy", ascending=False, kind="stable").head(1)
    return best.iloc[0] if len(best) else None


def _of_method(runs: pd.DataFrame, winner: pd.Series[Any] | None) -> dict[str, Any]:
    """What the runs of one method in one cell say, and the winner, which `SHORT_VANILLA` has of another."""
    trials = runs[runs["kind"] == "trial"]
    own_winner = [] if winner is None or winner["run_id"] not in set(trials["run_id"]) else [winner["run_id"]]
    refits = _finished_refits(runs, winner)
    values = refits["test_accuracy"].tolist()
    mean, ci95 = _mean_and_ci95(values)
    shown = runs[runs["run_id"].isin([*own_winner, *refits["run_id"]])]
    return {
        "val_accuracy": winner["val_accuracy"] if winner is not None and own_winner else math.nan,
        "seeds": refits["seed"].tolist(),
        "test_accuracy": values,
        "mean": mean,
        "ci95": ci95,
        "num_trials": len(trials),
        "num_pruned": int((trials["status"] == "KILLED").sum()),
        "num_failed": int((trials["status"] == "FAILED").sum()),
        "run_ids": [*own_winner, *refits["run_id"]],
        "code_versions": sorted(set(shown["code_version"]) - {""}),
        "data_digests": sorted(set(shown["data_digest"]) - {""}),
    }


def _finished_refits(runs: pd.DataFrame, winner: pd.Series[Any] | None) -> pd.DataFrame:
    """Those of the winner: a search that went on may have refits of an earlier one, which no mean may mix in."""
    import pandas as pd

    done = runs[(runs["kind"] == "refit") & (runs["status"] == "FINISHED") & runs["test_accuracy"].notna()]
    if winner is not None:
        names = [name for name in map(str, runs.columns) if name.startswith("params.") and name not in _OF_REFITS]
        for name in names:  # a setting that an older version did not record is told by no run of it
            if not pd.isna(winner[name]):
                done = done[(done[name] == winner[name]) | done[name].isna()]
    latest = done.sort_values("start_time", kind="stable").drop_duplicates("seed", keep="last")
    return latest.sort_values("seed", kind="stable")


def _to_vanilla(method: str, methods: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    mean, ci95, num_pairs = math.nan, math.nan, 0
    if method != VANILLA and VANILLA in methods:
        mean, ci95, num_pairs = _paired_difference(methods[method], methods[VANILLA])
    return {"num_pairs": num_pairs, "difference_mean": mean, "difference_ci95": ci95}


def _paired_difference(row: Mapping[Any, Any], other: Mapping[Any, Any]) -> tuple[float, float, int]:
    """Mean, 95 % interval and number of the differences `row` minus `other` at the seeds that both have."""
    of_other = dict(zip(other["seeds"], other["test_accuracy"], strict=True))
    values = [
        value - of_other[seed]
        for seed, value in zip(row["seeds"], row["test_accuracy"], strict=True)
        if seed in of_other
    ]
    return *_mean_and_ci95(values), len(values)


def _mean_and_ci95(values: list[float]) -> tuple[float, float]:
    """As columns of a table have it: NaN where there is nothing to say."""
    mean, ci95 = mean_and_ci95(values) if values else (math.nan, None)
    return mean, math.nan if ci95 is None else ci95
