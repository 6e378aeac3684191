"""Tables and figures of a search, from what MLflow holds.

    python analysis/report.py --experiment NAME [--tracking-uri URI] [--out DIR] [--search KEY]

writes to DIR: `overlap_table.md`, `accuracy_over_overlap.png` and `.pdf`, `cells.csv` (one row a cell and method, which
leads from every number to its run ids) and `differences.csv` (every pair of methods of a cell). Of a search over
several numbers of images a class there are also `accuracy_over_images.png` and `.pdf`, and the CSV files have the
column `images_per_class`, empty where a student had all. Without a tracking URI it reads the SQLite file that a search
keeps in the folder `runs`; without a key it takes the search that was started last.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.plots import accuracy_over_images, accuracy_over_overlap, save_figure
from analysis.runs import ALL_SEARCHES, fetch_runs
from analysis.summary import differences, numbers_of_images, summarise
from analysis.tables import document, overlap_table, plain_text
from refilled.command import new_app, run_app
from refilled.errors import UserError
from refilled.storage import Storage
from tune.tracking.store import resolve_tracking_uri

if TYPE_CHECKING:
    import pandas as pd

_FORMULA = ("=", "+", "-", "@")

app = new_app("report", "Tables and figures of a search, from what MLflow holds.")


@app.default
def report(
    *,
    experiment: str = "refilled",
    tracking_uri: str | None = None,
    out: Path = Path("report"),
    search: str | None = None,
) -> None:
    """Write the report of one search and print its table.

    Args:
        experiment: MLflow experiment.
        tracking_uri: MLflow tracking URI; none: the SQLite file in the folder `runs`.
        out: Folder to write to.
        search: Key of the search (its tag `search_key`); none: the search started last.
    """
    if search == ALL_SEARCHES:
        raise UserError("search: a report shows one search; give its key, or nothing for the one started last")
    if out.exists() and not out.is_dir():
        raise UserError(f"out: must be a folder, not the file {out}")
    uri = resolve_tracking_uri(tracking_uri, Storage.at("runs"))
    cells = summarise(fetch_runs(uri, experiment, search_key=search))
    paths = write_report(cells, experiment, out)
    print(overlap_table(cells))
    for path in paths:
        print(path)


def write_report(cells: pd.DataFrame, experiment: str, out: Path) -> list[Path]:
    """Write all files of the report, or none.

    Args:
        cells: What `analysis.summary.summarise` returns, of one search.
        experiment: Name of the experiment, as title.
        out: Folder, created where missing; older files of the same names are replaced.

    Returns:
        The paths written.

    Raises:
        UserError: The folder cannot be written.
    """
    numbers = numbers_of_images(cells)
    figures = {"accuracy_over_overlap": accuracy_over_overlap(cells)}
    if len(numbers) > 1:
        figures["accuracy_over_images"] = accuracy_over_images(cells)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".report-") as temporary:
            folder = Path(temporary)
            (folder / "overlap_table.md").write_text(document(cells, experiment), encoding="utf-8")
            for name, figure in figures.items():
                save_figure(figure, folder / name)
            for name, table in (("cells.csv", cells), ("differences.csv", differences(cells))):
                told = table.drop(columns="images_per_class") if numbers == [None] else table
                _flat(told).to_csv(folder / name, index=False)
            written = sorted(folder.iterdir())
            for path in written:
                os.replace(path, out / path.name)
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error}); give a folder that can") from error
    return [out / path.name for path in written]


def _flat(cells: pd.DataFrame) -> pd.DataFrame:
    """Lists as texts with spaces between, which every reader of CSV takes, and no text that a spreadsheet computes."""

    def plain(value: object) -> object:
        if not isinstance(value, list | str):
            return value
        text = plain_text(value if isinstance(value, str) else " ".join(str(item) for item in value))
        return f"'{text}" if text.startswith(_FORMULA) else text

    return cells.map(plain)


def command(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_app(app, arguments)


if __name__ == "__main__":
    sys.exit(command())
