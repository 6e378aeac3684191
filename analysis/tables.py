"""Cells as Markdown: accuracy over overlap, and where every number comes from."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from refilled.data.text import shown

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
        A Markdown table: for every teacher and student the methods, then the vanilla student; a line below it says
        what the numbers are.

    Raises:
        ValueError: The cells are of several searches, whose numbers are not comparable.
    """
    require_one_search(cells)
    columns: list[tuple[str, dict[float, str]]] = []
    for (teacher, student), pair in cells.groupby(["teacher", "student"], sort=True):
        title = f"{escape_markdown(teacher)} → {escape_markdown(student)}"
        for method, of_method in pair.groupby("method", sort=True):
            columns.append((f"{title}: {escape_markdown(method)}", _by_overlap(of_method, "")))
        for name, prefix in (
            ("vanilla student", "baseline_"),
            ("vanilla student, classifier epochs only", "baseline_short_"),
        ):
            texts = _by_overlap(pair, prefix)
            if prefix == "baseline_" or set(texts.values()) != {_MISSING}:
                columns.append((f"{title}: {name}", texts))
    header = ["overlap", *(title for title, _ in columns)]
    overlaps = sorted(set(cells["overlap"]))
    rows = [[_overlap_text(overlap), *(texts.get(overlap, _MISSING) for _, texts in columns)] for overlap in overlaps]
    note = (
        "Test accuracy in per cent: mean ± half width of the 95 % confidence interval (Student's t) over n seeds of "
        "the refitted winner; one seed has no interval."
    )
    return f"{_markdown(header, rows)}\n\n{note}\n"


def details_table(cells: pd.DataFrame) -> str:
    """What stands behind each cell: validation accuracy, trials, the paired difference, and the run ids."""
    header = [
        *("overlap", "teacher", "student", "method", "validation accuracy"),
        *("difference to vanilla student, paired by seed", "trials (pruned, failed)", "runs", "vanilla student's runs"),
    ]
    rows = [
        [
            _overlap_text(cell["overlap"]),
            *(escape_markdown(cell[name]) for name in ("teacher", "student", "method")),
            percent(cell["val_accuracy"]),
            mean_with_interval(cell["difference_mean"], cell["difference_ci95"], cell["num_pairs"], signed=True),
            f"{cell['num_trials']} ({cell['num_pruned']}, {cell['num_failed']})",
            " ".join(cell["run_ids"]) or _MISSING,
            " ".join(cell["baseline_run_ids"]) or _MISSING,
        ]
        for _, cell in cells.iterrows()
    ]
    note = "Accuracies in per cent. Runs: the winning trial, then its refits."
    return f"{_markdown(header, rows)}\n\n{note}\n"


def document(cells: pd.DataFrame, experiment: str) -> str:
    """The whole Markdown file: both tables, and which search, code and data they are of."""
    origin = [f"Search {escape_markdown(require_one_search(cells))}"]
    for name, column in (("code version", "code_versions"), ("data digest", "data_digests")):
        values = sorted({value for of_cell in cells[column] for value in of_cell})
        if values:
            origin.append(f"{name} {', '.join(escape_markdown(value) for value in values)}")
    parts = [
        f"# {escape_markdown(experiment)}",
        "## Accuracy over overlap",
        overlap_table(cells).rstrip(),
        "## Behind the numbers",
        details_table(cells).rstrip(),
        "; ".join(origin) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def require_one_search(cells: pd.DataFrame) -> str:
    """The key of the only search in the cells.

    Raises:
        ValueError: There are several.
    """
    keys: list[str] = sorted(set(cells["search_key"]))
    if len(keys) != 1:
        raise ValueError(f"cells of one search are needed, not of {len(keys)}")
    return keys[0]


def _by_overlap(cells: pd.DataFrame, prefix: str) -> dict[float, str]:
    texts = {}
    for _, cell in cells.iterrows():
        num_seeds = len(cell[f"{prefix}test_accuracy"])
        texts[float(cell["overlap"])] = mean_with_interval(cell[f"{prefix}mean"], cell[f"{prefix}ci95"], num_seeds)
    return texts


def _overlap_text(overlap: float) -> str:
    return f"{100 * overlap:g} %"


def _markdown(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
