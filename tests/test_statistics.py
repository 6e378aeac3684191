from __future__ import annotations

import pytest

from refilled.statistics import mean_and_ci95


def test_mean_and_ci95_by_hand() -> None:
    # t(0.975, 2) = 4.302653; the standard deviation of 1, 2, 3 is 1, so that half the width is 4.302653 / sqrt(3).
    mean, half_width = mean_and_ci95([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half_width == pytest.approx(2.484138, abs=1e-6)
    # Two values: t(0.975, 1) = 12.706205, standard error 0.5.
    assert mean_and_ci95([1.0, 2.0]) == pytest.approx((1.5, 6.353102), abs=1e-6)
    assert mean_and_ci95([0.8])[0] == 0.8
    assert mean_and_ci95([0.8])[1] is None


def test_no_values_have_no_mean() -> None:
    with pytest.raises(ValueError, match="at least one"):
        mean_and_ci95([])
