"""What searches on recorded curves came to, as tables to read."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.simulator.table import Table
from analysis.tables import markdown

NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Result:
    """What one search came to on one table."""

    epochs: int
    time: float
    found: bool
    best: float


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean, by bootstrap."""
    array = np.asarray(values, dtype=float)
    chosen = np.random.default_rng(seed).integers(len(array), size=(NUM_RESAMPLES, len(array)))
    low, high = np.quantile(array[chosen].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def ratio_interval(upper: Sequence[float], lower: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the ratio of two means whose values belong together in pairs, by bootstrap over the pairs."""
    above, below = np.asarray(upper, dtype=float), np.asarray(lower, dtype=float)
    chosen = np.random.default_rng(seed).integers(len(above), size=(NUM_RESAMPLES, len(above)))
    low, high = np.quantile(above[chosen].mean(axis=1) / below[chosen].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def fields(name: str, results: Sequence[Result], reference: Sequence[Result] | None) -> list[str]:
    """One strategy's row of a table."""
    epochs = [each.epochs for each in results]
    low, high = interval(epochs)
    best = [each.best for each in results]
    best_low, best_high = interval(best)
    return [
        name,
        f"{statistics.median(epochs):.0f}",
        f"{statistics.mean(epochs):.0f} [{low:.0f}, {high:.0f}]",
        str(sum(not each.found for each in results)),
        f"{statistics.mean(each.time for each in results):.1f}",
        f"{statistics.mean(best):.4f} [{best_low:.4f}, {best_high:.4f}]",
        "" if reference is None else ratio([each.epochs for each in reference], epochs),
    ]


def ratio(upper: Sequence[float], lower: Sequence[float]) -> str:
    """The ratio of two means with its interval, paired by seed."""
    low, high = ratio_interval(upper, lower)
    return f"{statistics.mean(upper) / statistics.mean(lower):.2f} [{low:.2f}, {high:.2f}]"


HEADER = ["search", "epochs, median", "epochs, mean (95 %)", "missed", "time", "best (95 %)", "ratio (95 %)"]


def describe(table: Table, share: float) -> str:
    """How hard a table is, and how much it can say."""
    values = [curve.value for curve in table.curves]
    near = sum(value >= table.target(share) for value in values)
    return (
        f"{table.name}: {len(values)} trials of {table.num_epochs} epochs, best {table.best:.4f}, median "
        f"{statistics.median(values):.4f}, default settings {values[0]:.4f}, {near} reach {share:g} of the best; "
        f"neighbours agree to {table.agreement():.2f} (rank correlation)"
    )


def rank_correlations(table: Table) -> str:
    """How well the order of trials after a part of a run says their order at the end: what a pruner has to go by."""
    from scipy.stats import spearmanr

    whole = [curve for curve in table.curves if len(curve.val_accuracy) == table.num_epochs]
    values = [curve.value for curve in whole]
    parts = {part: max(1, round(part * table.num_epochs)) for part in (1 / 8, 1 / 4, 3 / 8, 1 / 2, 2 / 3, 3 / 4, 5 / 6)}
    found = (
        f"{epoch}: {spearmanr([curve.val_accuracy[epoch - 1] for curve in whole], values).statistic:.2f}"
        for epoch in parts.values()
    )
    return f"rank correlation of an epoch's values with the final ones: {', '.join(found)}"


def aligned(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that is also to be read on a terminal."""
    widths = [max(len(text) for text in column) for column in zip(header, *rows, strict=True)]
    padded = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in rows]
    return markdown([text.ljust(width) for text, width in zip(header, widths, strict=True)], padded)


def comparison(found: Mapping[str, Mapping[str, Sequence[Result]]], reference: str) -> str:
    """Every table's rows, and of several tables the epochs of all together, as Markdown.

    Args:
        found: A result for each seed, by strategy and table.
        reference: The strategy whose mean is divided by the others'.
    """
    tables = list(found[reference])
    parts = []
    for table in tables:
        others = found[reference][table]
        rows = [
            fields(name, by_table[table], None if name == reference else others) for name, by_table in found.items()
        ]
        parts.append(f"### {table}\n\n{aligned(HEADER, rows)}")
    if len(tables) > 1:
        sums = {
            name: [sum(each.epochs for each in of_seed) for of_seed in zip(*by_table.values(), strict=True)]
            for name, by_table in found.items()
        }
        rows = [
            [name, f"{statistics.mean(epochs):.0f}", "" if name == reference else ratio(sums[reference], epochs)]
            for name, epochs in sums.items()
        ]
        parts.append(f"### all tables\n\n{aligned(['search', 'epochs, mean', 'ratio (95 %)'], rows)}")
    return "\n\n".join(parts)
