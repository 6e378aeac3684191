"""Accuracy over overlap and over images a class, as in Figures 5 and 6b of the paper; takes tables, asks nobody.

Global state is not touched.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.summary import CELL, as_images, in_order, numbers_of_images
from analysis.tables import images_text, images_title, overlap_text, pair_name, plain_text, require_one_search
from refilled.methods import SHORT_VANILLA, VANILLA

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_LONGEST_NAME = 40  # characters of a name in a title or legend
_LONGEST_TITLE = 44  # characters of a panel's title in one line
_PANELS_A_ROW = 4
_PANEL_SIZE = (3.6, 3.0)  # inches
_PAST_ENDS = 2.0  # per cent that are drawn beyond 0 and 100, so that a point there is whole
_LEGEND_LINE = 0.19  # inches
_LEGEND_CHARACTERS = 14  # an inch
_LEGEND_SYMBOL = 7  # characters that what stands beside a name is wide
# By Okabe and Ito and by Tol, told apart by people of any colour vision as long as the marker helps. There is one
# marker less than colours, so that no two of 132 methods share both.
_COLOURS = (
    *("#0072b2", "#d55e00", "#117733", "#cc79a7", "#e69f00", "#332288"),
    *("#56b4e9", "#882255", "#44aa99", "#999933", "#aa4499", "#000000"),
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "<", "*", "X", ">", "p")
_FOLDERS = re.compile(r"[^+>]*/(?=[^+>/]*\.py:)")  # of a `path/file.py:Name` in a name


@dataclass(frozen=True)
class _Style:
    """How one method looks in all panels."""

    label: str
    colour: str
    marker: str
    line: str
    fill: str
    place: float  # among the methods at one place of the axis, 0 in the middle, as a share of the distance of places


_Draw = Callable[["Axes", "pd.DataFrame", Mapping[str, _Style]], dict[str, "Line2D"]]
"""Draws the methods of a panel; returns the lines of those that have one."""


def accuracy_over_overlap(cells: pd.DataFrame) -> Figure:
    """One panel a teacher and student, one line a method, that of the vanilla student grey and dashed.

    Methods of the same overlap ratio stand side by side, so that their error bars can be told apart. Students of
    different numbers of images a class have panels of their own.

    Args:
        cells: What `analysis.summary.summarise` returns, of one search.

    Returns:
        A figure with 95 % error bars (none at a point of one seed), overlap and accuracy in per cent. Lines carry
        their name as label; one legend is for all panels.

    Raises:
        ValueError: The cells are of several searches, or there are none.
    """
    names = _short_names([*cells["teacher"], *cells["student"]])
    has_images = numbers_of_images(cells) != [None]
    panels = []
    for (teacher, student, number), panel in cells.groupby(CELL[2:], sort=True, dropna=False):
        title = _title(names[str(teacher)], names[str(student)])
        panels.append((f"{title}\n{images_title(as_images(number))}" if has_images else title, panel))
    return _figure(cells, panels, "overlap ratio (%)", _draw_over_overlap)


def accuracy_over_images(cells: pd.DataFrame) -> Figure:
    """Accuracy over the student's training images of each class, drawn as in Figure 6b of the paper.

    One panel an overlap, teacher and student, lines as in `accuracy_over_overlap`. The axis is logarithmic; MLflow does
    not know how many all images are, so they stand one step right of the largest number. Accuracy ends at 0 and 100 %,
    whatever the intervals of few seeds reach.

    Args:
        cells: What `analysis.summary.summarise` returns, of one search.

    Returns:
        A figure as that of `accuracy_over_overlap`.

    Raises:
        ValueError: The cells are of several searches, or there are none.
    """
    names = _short_names([*cells["teacher"], *cells["student"]])
    panels = []
    for (teacher, student, _), panel in cells.groupby(["teacher", "student", "overlap"], sort=True):
        title = _title(names[str(teacher)], names[str(student)])
        panels.append((f"{title}\noverlap {overlap_text(panel['overlap'].iloc[0])}", panel))
    note = " (all: not to scale)" if None in numbers_of_images(cells) else ""
    return _figure(cells, panels, f"training images a class{note}", _draw_over_images)


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem.png` and `stem.pdf`, the same bytes for the same data; returns both paths."""
    png, pdf = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".pdf")
    figure.savefig(png, dpi=200)
    figure.savefig(pdf, metadata={"CreationDate": None})
    return [png, pdf]


def _styles(methods: Iterable[str]) -> dict[str, _Style]:
    """How each method looks, in the order of the legend."""
    order = in_order(methods)
    names = _short_names(order)
    fixed = {VANILLA: ("#6b7280", "o", "--"), SHORT_VANILLA: ("#9ca3af", "s", ":")}
    step = min(0.04, 0.5 / len(order))
    styles = {}
    number = 0
    for index, method in enumerate(order):
        colour, marker, line = fixed.get(
            method, (_COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)], "-")
        )
        number += method not in fixed
        styles[method] = _Style(
            label=names[method],
            colour=colour,
            marker=marker,
            line=line,
            fill="white" if method in fixed else colour,
            place=(index - (len(order) - 1) / 2) * step,
        )
    return styles


def _figure(cells: pd.DataFrame, panels: list[tuple[str, pd.DataFrame]], xlabel: str, draw: _Draw) -> Figure:
    """Panels with their titles side by side, and one legend below them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    require_one_search(cells)
    styles = _styles(cells["method"])
    columns = min(len(panels), _PANELS_A_ROW)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(columns * _PANEL_SIZE[0], rows * _PANEL_SIZE[1]), layout="constrained")
    FigureCanvasAgg(figure)
    lines: dict[str, Line2D] = {}
    for place, (title, panel) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, place)
        lines |= draw(axes, panel, styles)
        axes.grid(axis="y", linewidth=0.5, alpha=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(title, fontsize=9)
        if place > len(panels) - columns:
            axes.set_xlabel(xlabel)
        if (place - 1) % columns == 0:
            axes.set_ylabel("test accuracy (%)")
    _add_legend(figure, {style.label: lines[method] for method, style in styles.items() if method in lines})
    return figure


def _draw_over_overlap(axes: Axes, panel: pd.DataFrame, styles: Mapping[str, _Style]) -> dict[str, Line2D]:
    """Draw the methods of a panel; returns the lines of those that have one."""
    overlaps = [100 * overlap for overlap in sorted(set(panel["overlap"]))]
    distance = min((b - a for a, b in itertools.pairwise(overlaps)), default=10.0)
    drawn = {}
    for method, style in styles.items():
        known = panel[(panel["method"] == method) & panel["mean"].notna()].sort_values("overlap")
        if len(known):
            places = [overlap + style.place * distance for overlap in _in_percent(known["overlap"])]
            drawn[method] = _draw_line(axes, places, known, style)
    axes.set_xticks(overlaps)
    axes.set_xlim(min(overlaps) - distance, max(overlaps) + distance)  # so that points of one overlap stand together
    return drawn


def _draw_over_images(axes: Axes, panel: pd.DataFrame, styles: Mapping[str, _Style]) -> dict[str, Line2D]:
    """As `_draw_over_overlap`."""
    places, step = _places_of_images(numbers_of_images(panel))
    drawn = {}
    for method, style in styles.items():
        known = panel[(panel["method"] == method) & panel["mean"].notna()].sort_values("images_per_class")
        if len(known):
            shift = step**style.place
            drawn[method] = _draw_line(
                axes, [places[as_images(number)] * shift for number in known["images_per_class"]], known, style
            )
    axes.set_xscale("log")
    axes.set_xticks([*places.values()], [images_text(number) for number in places])
    axes.minorticks_off()
    margin = math.sqrt(step)
    axes.set_xlim(min(places.values()) / margin, max(places.values()) * margin)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -_PAST_ENDS), min(high, 100 + _PAST_ENDS))
    return drawn


def _places_of_images(numbers: Sequence[int | None]) -> tuple[dict[int | None, float], float]:
    """Where numbers of images a class stand on a logarithmic axis, and the smallest factor between two of them."""
    known = [float(number) for number in numbers if number is not None] or [1.0]
    factors = [b / a for a, b in itertools.pairwise(known)] or [2.0]
    return {number: known[-1] * factors[-1] if number is None else float(number) for number in numbers}, min(factors)


def _draw_line(axes: Axes, places: Sequence[float], known: pd.DataFrame, style: _Style) -> Line2D:
    drawn = axes.errorbar(
        places,
        _in_percent(known["mean"]),
        yerr=_in_percent(known["ci95"]),
        label=style.label,
        color=style.colour,
        marker=style.marker,
        markersize=5,
        markerfacecolor=style.fill,
        linewidth=1.3,
        elinewidth=0.9,
        capsize=2,
        linestyle=style.line,
    )
    line: Line2D = drawn.lines[0]
    return line


def _add_legend(figure: Figure, lines: Mapping[str, Line2D]) -> None:
    """One legend below all panels, for which the figure grows."""
    if not lines:
        return
    width, height = figure.get_size_inches()
    columns = int(width * _LEGEND_CHARACTERS // (max(map(len, lines)) + _LEGEND_SYMBOL))
    columns = min(max(columns, 1), len(lines))
    figure.set_size_inches(width, height + _LEGEND_LINE * math.ceil(len(lines) / columns) + 0.1)
    figure.legend([*lines.values()], [*lines], loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _in_percent(fractions: Iterable[float]) -> list[float]:
    return [100 * fraction for fraction in fractions]


def _title(teacher: str, student: str) -> str:
    title = pair_name(teacher, student)
    return title if len(title) <= _LONGEST_TITLE else title.replace(" → ", " →\n", 1)


def _short_names(texts: Iterable[str]) -> dict[str, str]:
    """Names from outside, different ones kept different: without folders and cut in the middle where that is enough.

    They have no formula markup of matplotlib's, and none starts with the underscore that hides a line from a legend.
    """
    whole = {text: plain_text(text) for text in texts}
    short = {text: _cut(_FOLDERS.sub("", name)) for text, name in whole.items()}
    counts = Counter(short.values())
    chosen = {text: name if counts[name] == 1 else whole[text] for text, name in short.items()}
    return {text: re.sub(r"^_", " _", name).replace("$", r"\$") for text, name in chosen.items()}


def _cut(name: str) -> str:
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[:half]}…{name[-half + 1 :]}"
