"""Accuracy over overlap, drawn as in Figure 5 of the paper; takes tables, asks nobody, touches no global state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.tables import plain_text, require_one_search

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LONGEST_NAME = 24  # characters in a title or legend
_PANELS_A_ROW = 4
_PANEL_SIZE = (3.2, 2.9)  # inches
_METHOD_COLOURS = ("#0b5fa5", "#c2410c", "#15803d", "#7e22ce")
_BASELINE_COLOUR = "#6b7280"
_BASELINE = "vanilla student"


def accuracy_over_overlap(cells: pd.DataFrame) -> Figure:
    """One panel a teacher and student, one line a method and one for the vanilla student.

    Args:
        cells: What `analysis.summary.summarise` returns, of one search.

    Returns:
        A figure with 95 % error bars (none at a point of one seed), overlap and accuracy in per cent. Lines carry
        their name as label.

    Raises:
        ValueError: The cells are of several searches, or there are none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    require_one_search(cells)
    pairs = list(cells.groupby(["teacher", "student"], sort=True))
    columns = min(len(pairs), _PANELS_A_ROW)
    rows = math.ceil(len(pairs) / columns)
    figure = Figure(figsize=(columns * _PANEL_SIZE[0], rows * _PANEL_SIZE[1]), layout="constrained")
    FigureCanvasAgg(figure)
    for place, ((teacher, student), pair) in enumerate(pairs, start=1):
        axes = figure.add_subplot(rows, columns, place)
        _draw_pair(axes, pair)
        axes.set_title(f"{_plain(teacher)} → {_plain(student)}", fontsize=9)
        if place > len(pairs) - columns:
            axes.set_xlabel("overlap ratio (%)")
        if (place - 1) % columns == 0:
            axes.set_ylabel("test accuracy (%)")
    return figure


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem.png` and `stem.pdf`, the same bytes for the same data; returns both paths."""
    png, pdf = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".pdf")
    figure.savefig(png, dpi=200)
    figure.savefig(pdf, metadata={"CreationDate": None})
    return [png, pdf]


def _draw_pair(axes: Axes, pair: pd.DataFrame) -> None:
    for place, (method, of_method) in enumerate(pair.groupby("method", sort=True)):
        colour = _METHOD_COLOURS[place % len(_METHOD_COLOURS)]
        _draw_line(axes, of_method, "", label=_plain(method), colour=colour, marker="o")
    # The vanilla student is the same beside every method of the pair.
    baseline = pair.drop_duplicates("overlap")
    _draw_line(axes, baseline, "baseline_", label=_BASELINE, colour=_BASELINE_COLOUR, marker="s")
    axes.set_xticks([100 * overlap for overlap in sorted(set(pair["overlap"]))])
    axes.grid(axis="y", linewidth=0.5, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(fontsize=8, frameon=False)


def _draw_line(axes: Axes, cells: pd.DataFrame, prefix: str, *, label: str, colour: str, marker: str) -> None:
    known = cells[cells[f"{prefix}mean"].notna()].sort_values("overlap")
    if known.empty:
        return
    axes.errorbar(
        _in_percent(known["overlap"]),
        _in_percent(known[f"{prefix}mean"]),
        yerr=_in_percent(known[f"{prefix}ci95"]),
        label=label,
        color=colour,
        marker=marker,
        markersize=4,
        linewidth=1.3,
        capsize=2.5,
        linestyle="--" if prefix else "-",
    )


def _in_percent(fractions: Iterable[float]) -> list[float]:
    return [100 * fraction for fraction in fractions]


def _plain(text: object) -> str:
    """Text from outside without matplotlib's formula markup, short enough for a panel."""
    plain = plain_text(text)
    short = plain if len(plain) <= _LONGEST_NAME else f"{plain[: _LONGEST_NAME - 1]}…"
    return short.replace("$", r"\$")
