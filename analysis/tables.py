"""Cells as Markdown: accuracy over overlap and images a class, what stands behind it, and how methods differ."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from analysis.summary import CELL, as_images, differences, in_order, numbers_of_images
from refilled.data.text import shown
from refilled.methods import NO_TEACHER, SHORT_VANILLA, VANILLA

if TYPE_CHECKING:
    import pandas as pd

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$])")
_MISSING = "-"
_IMAGES = "images a class"
_NOTE = (
    "Test accuracy in per cent: mean ± half width of the 95 % confidence interval (Student's t) over n seeds of "
    "the refitted winner; one seed has no interval."
)
_NOTE_OF_DIFFERENCES = (
    "Differences of test accuracy in percentage points, paired by seed: mean ± half width of the 95 % confidence "
    "interval over n seeds. Each interval is of its pair alone: of many pairs, some exclude 0 by chance."
)


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
        what the numbers are. Where students have numbers of images a class, the rows of a number stand together.

    Raises:
        ValueError: The cells are of several searches, whose numbers are not comparable.
    """
    require_one_search(cells)
    columns: list[tuple[str, dict[tuple[float, int | None], str]]] = []
    for (teacher, student), pair in cells.groupby(["teacher", "student"], sort=True):
        for method in in_order(pair["method"]):
            title = f"{escape_markdown(pair_name(teacher, student))}: {escape_markdown(method)}"
            of_method = pair[pair["method"] == method].to_dict("records")
            columns.append((title, {(cell["overlap"], _images(cell)): _accuracy(cell) for cell in of_method}))
    has_images = numbers_of_images(cells) != [None]
    header = [*([_IMAGES] if has_images else []), "overlap", *(title for title, _ in columns)]
    rows = [
        [
            *([images_text(images)] if has_images else []),
            overlap_text(overlap),
            *(texts.get((overlap, images), _MISSING) for _, texts in columns),
        ]
        for images in numbers_of_images(cells)
        for overlap in sorted({overlap for _, texts in columns for overlap, number in texts if number == images})
    ]
    return f"{markdown(header, rows)}\n\n{_NOTE}\n"


def images_tables(cells: pd.DataFrame) -> str:
    """Test accuracy over images a class, as Figure 6b of the paper draws it.

    Args:
        cells: What `analysis.summary.summarise` returns, of one search.

    Returns:
        A Markdown table for every overlap, teacher and student, under a heading: one row a number, all images last, one
        column a method; a line below them. Empty where all students have the same number.

    Raises:
        ValueError: The cells are of several searches.
    """
    require_one_search(cells)
    tables = []
    for title, group in _over_images(cells):
        methods = in_order(group["method"])
        texts = {(_images(cell), cell["method"]): _accuracy(cell) for cell in group.to_dict("records")}
        rows = [
            [images_text(images), *(texts.get((images, method), _MISSING) for method in methods)]
            for images in numbers_of_images(group)
        ]
        tables.append(f"{title}\n\n{markdown([_IMAGES, *map(escape_markdown, methods)], rows)}\n\n")
    return f"{''.join(tables)}{_NOTE}\n" if tables else ""


def details_table(cells: pd.DataFrame) -> str:
    """What stands behind each cell and method: validation and test accuracy, the paired difference, and trials."""
    has_images = numbers_of_images(cells) != [None]
    header = [
        *("overlap", "teacher", "student", *([_IMAGES] if has_images else []), "method"),
        *("validation accuracy", "test accuracy"),
        *(f"difference to {VANILLA}, paired by seed", "trials (pruned, failed)"),
    ]
    rows = [
        [
            overlap_text(cell["overlap"]),
            *(escape_markdown(cell[name]) for name in ("teacher", "student")),
            *([images_text(_images(cell))] if has_images else []),
            escape_markdown(cell["method"]),
            percent(cell["val_accuracy"]),
            _accuracy(cell),
            mean_with_interval(cell["difference_mean"], cell["difference_ci95"], cell["num_pairs"], signed=True),
            f"{cell['num_trials']} ({cell['num_pruned']}, {cell['num_failed']})",
        ]
        for cell in cells.to_dict("records")
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
    wide = cells[searched.groupby([cells[name] for name in CELL], dropna=False).transform("nunique") > 2]
    if wide.empty:
        return ""
    overlaps = sorted(set(wide["overlap"]))
    has_images = numbers_of_images(cells) != [None]
    rows = []
    for (teacher, student, number), group in differences(wide).groupby(CELL[2:], sort=True, dropna=False):
        title = [
            escape_markdown(pair_name(teacher, student)),
            *([images_text(as_images(number))] if has_images else []),
        ]
        rows += [[*title, *row] for row in _difference_rows(group, "overlap", overlaps)]
    titles = ["teacher → student", *([_IMAGES] if has_images else []), "method", "minus"]
    header = [*titles, *map(overlap_text, overlaps)]
    return f"{markdown(header, rows)}\n\n{_NOTE_OF_DIFFERENCES}\n"


def images_differences_tables(cells: pd.DataFrame) -> str:
    """How the methods of a cell differ in test accuracy over images a class.

    Args:
        cells: What `analysis.summary.summarise` returns, of one search.

    Returns:
        A Markdown table for every overlap, teacher and student, under a heading: one row a pair of methods, one column
        a number, all images last; a line below them. Empty where all students have the same number, or one method.

    Raises:
        ValueError: The cells are of several searches.
    """
    require_one_search(cells)
    tables = []
    for title, group in _over_images(cells):
        numbers = numbers_of_images(group)
        rows = _difference_rows(differences(group), "images_per_class", numbers)
        header = ["method", "minus", *map(images_title, numbers)]
        if rows:
            tables.append(f"{title}\n\n{markdown(header, rows)}\n\n")
    return f"{''.join(tables)}{_NOTE_OF_DIFFERENCES}\n" if tables else ""


def document(cells: pd.DataFrame, experiment: str) -> str:
    """The whole Markdown file: all tables, and which search, code and data they are of."""
    origin = [f"Search {escape_markdown(require_one_search(cells))}"]
    for name, column in (("code version", "code_versions"), ("data digest", "data_digests")):
        values = sorted({value for of_cell in cells[column] for value in of_cell})
        if values:
            origin.append(f"{name} {', '.join(escape_markdown(value) for value in values)}")
    sections = {
        "Accuracy over overlap": overlap_table(cells),
        "Accuracy over images a class": images_tables(cells),
        "Behind the numbers": details_table(cells),
        "Differences between methods": differences_table(cells),
        "Differences over images a class": images_differences_tables(cells),
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


def overlap_text(overlap: float) -> str:
    """An overlap ratio in per cent."""
    return f"{100 * overlap:g} %"


def images_text(images: int | None) -> str:
    """A number of images a class, none being all."""
    return "all" if images is None else str(images)


def images_title(images: int | None) -> str:
    """The same where nothing beside it says what the number is."""
    return "all images" if images is None else f"{images} {_IMAGES}"


def _images(cell: Mapping[Any, Any]) -> int | None:
    return as_images(cell["images_per_class"])


def _accuracy(cell: Mapping[Any, Any]) -> str:
    return mean_with_interval(cell["mean"], cell["ci95"], len(cell["test_accuracy"]))


def _over_images(cells: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Cells that differ in images a class alone, under their heading; nothing where no two numbers are there."""
    if len(numbers_of_images(cells)) > 1:
        for (_, teacher, student), group in cells.groupby(["overlap", "teacher", "student"], sort=True):
            overlap = overlap_text(group["overlap"].iloc[0])
            yield f"### {escape_markdown(pair_name(teacher, student))}, overlap {overlap}", group


def _difference_rows(pairs: pd.DataFrame, over: str, values: Sequence[float | None]) -> list[list[str]]:
    """One row a pair of methods, their names and the difference at each value of a column."""
    order = in_order(pairs["other"].tolist() + pairs["method"].tolist())
    found: dict[tuple[str, str], dict[float | None, str]] = {}
    for pair in pairs.to_dict("records"):
        at = as_images(pair[over]) if over == "images_per_class" else pair[over]
        text = mean_with_interval(pair["mean"], pair["ci95"], pair["num_pairs"], signed=True)
        found.setdefault((pair["other"], pair["method"]), {})[at] = text
    return [
        [escape_markdown(method), escape_markdown(other), *(found[other, method].get(at, _MISSING) for at in values)]
        for other, method in sorted(found, key=lambda both: [order.index(name) for name in both])
    ]


def markdown(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
