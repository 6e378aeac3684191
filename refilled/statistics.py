"""Means with honest intervals over a few seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def mean_and_ci95(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of its 95 % interval by Student's t; one value has a mean and no interval.

    Raises:
        ValueError: For no values (`statistics.StatisticsError`).
    """
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None
    from scipy.stats import t

    quantile = float(t.ppf(0.975, df=len(values) - 1))
    return mean, quantile * statistics.stdev(values) / len(values) ** 0.5
