"""From MLflow to one tidy table of runs; the only place of the analysis that asks MLflow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from refilled.errors import UserError
from tune.tracking.store import open_store, shown_uri, unusable_store

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Run

ALL_SEARCHES = "all"
_PAGE = 500
_SHOWN_NAMES = 10

COLUMNS = (
    "run_id",
    "search_key",
    "kind",
    "role",
    "cell",
    "overlap",
    "teacher",
    "student",
    "images_per_class",
    "method",
    "seed",
    "trial",
    "status",
    "winner",
    "val_accuracy",
    "test_accuracy",
    "start_time",
    "code_version",
    "data_digest",
)


def fetch_runs(tracking_uri: str, experiment: str, *, search_key: str | None = None) -> pd.DataFrame:
    """The trials and refits of a search, one row a run.

    Args:
        tracking_uri: Where MLflow is; nothing is created there.
        experiment: Name of the experiment.
        search_key: Key of one search, `ALL_SEARCHES`, or None for the one that was started last.

    Returns:
        The columns `COLUMNS`, then one column `params.NAME` for every setting, as text. `overlap`, `val_accuracy` (the
        best of the run) and `test_accuracy` are floats, `images_per_class` (NA: all), `seed` and `trial` nullable
        integers, `winner` is a bool, `start_time` a UTC time; `teacher` is `none` for a run that needs none. A search
        without runs gives an empty table.

    Raises:
        UserError: MLflow does not answer or the file does not exist; there is no such experiment or search.
    """
    client = open_store(tracking_uri, create=False)
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise _unknown_experiment(client, tracking_uri, experiment)
        searches = list(_pages(client, found.experiment_id, "tags.kind = 'search'"))
        rows = []
        for search in _chosen(searches, experiment, search_key):
            children = f"tags.`mlflow.parentRunId` = '{search.info.run_id}'"
            key = search.data.tags.get("search_key", "")
            rows += [_row(run, key) for run in _pages(client, found.experiment_id, children)]
    except MlflowException as error:
        raise unusable_store(tracking_uri, error) from error
    return _table(rows)


def _pages(client: MlflowClient, experiment_id: str, query: str) -> Iterator[Run]:
    """Runs of all pages, the one started first in front."""
    token: str | None = None
    while True:
        page = client.search_runs(
            [experiment_id],
            query,
            max_results=_PAGE,
            order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
            page_token=token,
        )
        yield from page
        token = page.token
        if not token:
            return


def _chosen(searches: list[Run], experiment: str, search_key: str | None) -> list[Run]:
    if not searches:
        raise UserError(
            f"experiment: {experiment!r} holds no search; name an experiment that tune/search.py has written"
        )
    if search_key == ALL_SEARCHES:
        return searches
    if search_key is None:
        return searches[-1:]
    # Compared here, not in MLflow's query language, which cannot escape what a user typed.
    chosen = [search for search in searches if search.data.tags.get("search_key") == search_key]
    if not chosen:
        keys = ", ".join(str(search.data.tags.get("search_key")) for search in searches[-_SHOWN_NAMES:])
        raise UserError(f"search: experiment {experiment!r} has no search {search_key!r}; it has {keys}")
    return chosen


def _unknown_experiment(client: MlflowClient, tracking_uri: str, experiment: str) -> UserError:
    names = [found.name for found in client.search_experiments(max_results=_SHOWN_NAMES + 1) if found.name != "Default"]
    there = ", ".join(repr(name) for name in names[:_SHOWN_NAMES]) + (", ..." if len(names) > _SHOWN_NAMES else "")
    where = f"MLflow at {shown_uri(tracking_uri)}"
    return UserError(f"experiment: {where} has no experiment {experiment!r}; it has {there or 'none'}")


def _row(run: Run, search_key: str) -> dict[str, Any]:
    tags, metrics = run.data.tags, run.data.metrics
    row = {name: tags.get(name, "") for name in ("kind", "role", "cell", "teacher", "student", "method")}
    return (
        row
        | {name: tags.get(name, "") for name in ("code_version", "data_digest")}
        | {
            "run_id": run.info.run_id,
            "search_key": search_key,
            "overlap": _number(tags.get("overlap")),
            "images_per_class": _number(tags.get("images_per_class")),
            "seed": _number(tags.get("seed")),
            "trial": _number(tags.get("trial")),
            "status": run.info.status,
            "winner": tags.get("winner") == "true",
            "val_accuracy": metrics.get("best/val_accuracy"),
            "test_accuracy": metrics.get("test_accuracy"),
            "start_time": run.info.start_time,
        }
        | {f"params.{name}": value for name, value in run.data.params.items()}
    )


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    settings = sorted({name for row in rows for name in row if name.startswith("params.")})
    table = pd.DataFrame(rows, columns=[*COLUMNS, *settings])
    for name in ("overlap", "val_accuracy", "test_accuracy"):
        table[name] = table[name].astype(float)
    for name in ("images_per_class", "seed", "trial"):
        table[name] = table[name].astype("Int64")
    table["winner"] = table["winner"].astype(bool)
    table["start_time"] = pd.to_datetime(table["start_time"], unit="ms", utc=True)
    return table


def _number(text: str | None) -> float | None:
    """A tag as a number; None where it has none, such as a refit's trial."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
