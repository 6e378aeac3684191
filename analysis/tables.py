"""Cells as Markdown: accuracy over overlap, what stands behind each number, and how methods differ."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from analysis.summary import CELL, differences, in_order
from refilled.data.text import shown
from refilled.methods import NO_TEACHER, SHORT_VANILLA, VANILLA

if TYPE_CHECKING:
    import pandas as pd

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$])")
_MISSING = "-"


def plain_text(text: object) -> str:
    """Text from outside in one line, with escapes for what cannot be printed, or turns the text around."""
    return shown(" ".join(str(text).split()))


def escape_markdown(text: object) -> str:
    """Text from outside as it reads, in one table field: no markup, no HTML, no line break."""
    flat = plain_text(text)
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", flat)


def percent(fraction: float) -> str:
    """A fraction in per cent with two decimals, as the paper's tables give it."""
    return _MISSING if math.isnan(fraction) else f"{100 * fraction:.2f}"


def mean_with_interval(mean: float, ci95: float, num_seeds: int, *, signed: bool = False) -> str:
    """For example `82.60 ± 0.31 (n = 3)`; one seed says so, since it has no interval."""
    if num_seeds == 0:
        return _MISSING
    shown = f"{100 * mean:+.2f}" if signed else percent(mean)
    return f"{shown} (one seed)" if num_seeds == 1 else f"{shown} ± {percent(ci95)} (n = {num_seeds})"


def overlap_table(cells: pd.DataFrame) -> str:
    """Test accuracy, one row an overlap ratio, as Table 19 of the paper lays it out.

    Args:
        cells: What `analysis.summary.summarise` returns, of one search.

    Returns:
        A Markdown table: for every teacher and student the methods, the vanilla student first; a line below it says
        what the numbers are.

    Raises:
        ValueError: The cells are of several searches, whose numbers are not comparable.
    """
    require_one_search(cells)
    columns: list[tuple[str, dict[float, str]]] = []
    for (teacher, student), pair in cells.groupby(["teacher", "student"], sort=True):
        for method in in_order(pair["method"]):
            title = f"{escape_markdown(pair_name(teacher, student))}: {escape_markdown(method)}"
            columns.append((title, _accuracy_by_overlap(pair[pair["method"] == method])))
    header = ["overlap", *(title for title, _ in columns)]
    overlaps = sorted(set(cells["overlap"]))
    rows = [[_overlap_text(overlap), *(texts.get(overlap, _MISSING) for _, texts in columns)] for overlap in overlaps]
    note = (
        "Test accuracy in per cent: mean ± half width of the 95 % confidence interval (Student's t) over n seeds of "
        "the refitted winner; one seed has no interval."
    )
    return f"{markdown(header, rows)}\n\n{note}\n"


def details_table(cells: pd.DataFrame) -> str:
    """What stands behind each cell and method: validation and test accuracy, the paired difference, and trials."""
    header = [
        *("overlap", "teacher", "student", "method", "validation accuracy", "test accuracy"),
        *(f"difference to {VANILLA}, paired by seed", "trials (pruned, failed)"),
    ]
    rows = [
        [
            _overlap_text(cell["overlap"]),
            *(escape_markdown(cell[name]) for name in ("teacher", "student", "method")),
            percent(cell["val_accuracy"]),
            mean_with_interval(cell["mean"], cell["ci95"], len(cell["test_accuracy"])),
            mean_with_interval(cell["difference_mean"], cell["difference_ci95"], cell["num_pairs"], signed=True),
            f"{cell['num_trials']} ({cell['num_pruned']}, {cell['num_failed']})",
        ]
        for _, cell in cells.iterrows()
    ]
    note = "Accuracies in per cent; the ids of all runs are in `cells.csv`."
    if VANILLA in set(cells["method"]) and cells["teacher"].nunique() > 1:
        note += f" The method {VANILLA} has no teacher: beside every teacher it stands with the same runs."
    return f"{markdown(header, rows)}\n\n{note}\n"


def differences_table(cells: pd.DataFrame) -> str:
    """How the methods of a cell differ in test accuracy, one row a pair of methods, one column an overlap ratio.

    Args:
        cells: What `analysis.summary.summarise` returns, of one search.

    Returns:
        A Markdown table with a line below it, of the cells that have more than two methods; empty without any. The
        vanilla student with other epochs is in the table and makes no method more.

    Raises:
        ValueError: The cells are of several searches.
    """
    require_one_search(cells)
    searched = cells["method"].where(cells["method"] != SHORT_VANILLA)
    wide = cells[searched.groupby([cells[name] for name in CELL]).transform("nunique") > 2]
    if wide.empty:
        return ""
    overlaps = sorted(set(wide["overlap"]))
    rows = []
    for (teacher, student), pair in differences(wide).groupby(["teacher", "student"], sort=True):
        names = set(zip(pair["other"], pair["method"], strict=True))
        order = in_order(pair["other"].tolist() + pair["method"].tolist())
        for other, method in sorted(names, key=lambda both: [order.index(name) for name in both]):
            texts = _difference_by_overlap(pair[(pair["method"] == method) & (pair["other"] == other)])
            title = [escape_markdown(text) for text in (pair_name(teacher, student), method, other)]
            rows.append([*title, *(texts.get(overlap, _MISSING) for overlap in overlaps)])
    header = ["teacher → student", "method", "minus", *(_overlap_text(overlap) for overlap in overlaps)]
    note = (
        "Differences of test accuracy in percentage points, paired by seed: mean ± half width of the 95 % confidence "
        "interval over n seeds. Each interval is of its pair alone: of many pairs, some exclude 0 by chance."
    )
    return f"{markdown(header, rows)}\n\n{note}\n"


def document(cells: pd.DataFrame, experiment: str) -> str:
    """The whole Markdown file: all tables, and which search, code and data they are of."""
    origin = [f"Search {escape_markdown(require_one_search(cells))}"]
    for name, column in (("code version", "code_versions"), ("data digest", "data_digests")):
        values = sorted({value for of_cell in cells[column] for value in of_cell})
        if values:
            origin.append(f"{name} {', '.join(escape_markdown(value) for value in values)}")
    sections = {
        "Accuracy over overlap": overlap_table(cells),
        "Behind the numbers": details_table(cells),
        "Differences between methods": differences_table(cells),
    }
    parts = [f"## {title}\n\n{table.rstrip()}" for title, table in sections.items() if table]
    return "\n\n".join([f"# {escape_markdown(experiment)}", *parts, "; ".join(origin) + "."]) + "\n"


def pair_name(teacher: object, student: object) -> str:
    """Names a teacher and a student together; a student that has no teacher stands alone."""
    return str(student) if teacher == NO_TEACHER else f"{teacher} → {student}"


def require_one_search(cells: pd.DataFrame) -> str:
    """The key of the only search in the cells.

    Raises:
        ValueError: There are several.
    """
    keys: list[str] = sorted(set(cells["search_key"]))
    if len(keys) != 1:
        raise ValueError(f"cells of one search are needed, not of {len(keys)}")
    return keys[0]


def _accuracy_by_overlap(cells: pd.DataFrame) -> dict[float, str]:
    return {
        cell["overlap"]: mean_with_interval(cell["mean"], cell["ci95"], len(cell["test_accuracy"]))
        for _, cell in cells.iterrows()
    }


def _difference_by_overlap(pairs: pd.DataFrame) -> dict[float, str]:
    return {
        pair["overlap"]: mean_with_interval(pair["mean"], pair["ci95"], pair["num_pairs"], signed=True)
        for _, pair in pairs.iterrows()
    }


def _overlap_text(overlap: float) -> str:
    return f"{100 * overlap:g} %"


def markdown(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
