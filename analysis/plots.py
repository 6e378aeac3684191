"""Accuracy over overlap, drawn as in Figure 5 of the paper; takes tables, asks nobody, touches no global state."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.summary import in_order
from analysis.tables import pair_name, plain_text, require_one_search
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
    place: float  # among the methods of one overlap ratio, 0 in the middle, as a share of the distance between ratios


def accuracy_over_overlap(cells: pd.DataFrame) -> Figure:
    """One panel a teacher and student, one line a method, that of the vanilla student grey and dashed.

    Methods of the same overlap ratio stand side by side, so that their error bars can be told apart.

    Args:
        cells: What `analysis.summary.summarise` returns, of one search.

    Returns:
        A figure with 95 % error bars (none at a point of one seed), overlap and accuracy in per cent. Lines carry
        their name as label; one legend is for all panels.

    Raises:
        ValueError: The cells are of several searches, or there are none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    require_one_search(cells)
    styles = _styles(cells["method"])
    names = _short_names([*cells["teacher"], *cells["student"]])
    pairs = list(cells.groupby(["teacher", "student"], sort=True))
    columns = min(len(pairs), _PANELS_A_ROW)
    rows = math.ceil(len(pairs) / columns)
    figure = Figure(figsize=(columns * _PANEL_SIZE[0], rows * _PANEL_SIZE[1]), layout="constrained")
    FigureCanvasAgg(figure)
    lines: dict[str, Line2D] = {}
    for place, ((teacher, student), pair) in enumerate(pairs, start=1):
        axes = figure.add_subplot(rows, columns, place)
        lines |= _draw_pair(axes, pair, styles)
        axes.set_title(_title(names[str(teacher)], names[str(student)]), fontsize=9)
        if place > len(pairs) - columns:
            axes.set_xlabel("overlap ratio (%)")
        if (place - 1) % columns == 0:
            axes.set_ylabel("test accuracy (%)")
    _add_legend(figure, {style.label: lines[method] for method, style in styles.items() if method in lines})
    return figure


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


def _draw_pair(axes: Axes, pair: pd.DataFrame, styles: Mapping[str, _Style]) -> dict[str, Line2D]:
    """Draw the methods of a teacher and student; returns the lines of those that have one."""
    overlaps = [100 * overlap for overlap in sorted(set(pair["overlap"]))]
    distance = min((b - a for a, b in itertools.pairwise(overlaps)), default=10.0)
    drawn = {}
    for method, style in styles.items():
        known = pair[(pair["method"] == method) & pair["mean"].notna()].sort_values("overlap")
        if len(known):
            drawn[method] = _draw_line(axes, known, style, shift=style.place * distance)
    axes.set_xticks(overlaps)
    axes.set_xlim(min(overlaps) - distance, max(overlaps) + distance)  # so that points of one overlap stand together
    axes.grid(axis="y", linewidth=0.5, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


def _draw_line(axes: Axes, known: pd.DataFrame, style: _Style, *, shift: float) -> Line2D:
    drawn = axes.errorbar(
        [overlap + shift for overlap in _in_percent(known["overlap"])],
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
