"""What searches on recorded curves came to, as tables to read."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from replay.table import Table

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


def line(name: str, results: Sequence[Result], reference: Sequence[Result] | None) -> str:
    """One strategy's row of the printed table."""
    epochs = [each.epochs for each in results]
    low, high = interval(epochs)
    missed = sum(not each.found for each in results)
    best_low, best_high = interval([each.best for each in results])
    parts = [
        f"{name:<36} {statistics.median(epochs):>7.0f} {statistics.mean(epochs):>7.0f} [{low:>5.0f}, {high:>5.0f}]",
        f"{missed:>6}",
        f"{statistics.mean(each.time for each in results):>9.1f}",
        f"{statistics.mean(each.best for each in results):>7.4f} [{best_low:.4f}, {best_high:.4f}]",
    ]
    if reference is not None:
        others = [each.epochs for each in reference]
        ratio_low, ratio_high = ratio_interval(others, epochs)
        parts.append(f"{statistics.mean(others) / statistics.mean(epochs):>6.2f} [{ratio_low:.2f}, {ratio_high:.2f}]")
    return " ".join(parts)


HEADER = (
    f"{'':<36} {'median':>7} {'mean':>7} {'95 %':>14} {'missed':>6} {'time':>9} {'best':>7} {'95 %':>16} "
    f"{'ratio':>6} {'95 %':>12}"
)


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
    return f"  rank correlation of an epoch's values with the final ones: {', '.join(found)}"


def comparison(found: Mapping[str, Mapping[str, Sequence[Result]]], reference: str) -> str:
    """Every table's rows, and of several tables the epochs of all together.

    Args:
        found: by strategy and table, a result a seed.
        reference: the strategy whose mean is divided by the others'.
    """
    lines = []
    tables = list(found[reference])
    for table in tables:
        lines += [table, HEADER]
        lines += [
            line(name, by_table[table], None if name == reference else found[reference][table])
            for name, by_table in found.items()
        ]
    if len(tables) > 1:
        lines.append("epochs of all tables")
        sums = {
            name: [sum(each.epochs for each in of_seed) for of_seed in zip(*by_table.values(), strict=True)]
            for name, by_table in found.items()
        }
        for name, epochs in sums.items():
            low, high = ratio_interval(sums[reference], epochs)
            ratio = statistics.mean(sums[reference]) / statistics.mean(epochs)
            lines.append(f"{name:<36} {statistics.mean(epochs):>7.0f} {ratio:>6.2f} [{low:.2f}, {high:.2f}]")
    return "\n".join(lines)
