"""How long a search still takes, told while it runs."""

from __future__ import annotations

import dataclasses
import io

import pytest
from outcomes import row_of
from rich.console import Console

from tune import progress
from tune.forecast.report import PHASES, Forecast
from tune.progress import CellProgress, Progress

FORECAST = Forecast(
    epochs={"trials": 80},
    hours=dict.fromkeys(PHASES, 100 / 3600),
    busy_hours=0.0,
    gpu_hours=0.0,
    cost=10.0,
    kept=1.0,
    slots=2,
    epoch_s={"student": {"classifier": 1.0}, "refilled": {"embedding": 4.0, "classifier": 2.0}},
    timing_s=0.0,
    assumptions=(),
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time as the test has it."""
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def started(forecast: Forecast | None, **complete: int) -> tuple[Progress, io.StringIO]:
    text = io.StringIO()
    shown = Progress(Console(file=text, width=200), forecast=forecast)
    cells = {
        name: CellProgress(num_trials=4, num_epochs=10, complete=complete.get(name, 0))
        for name in ("student", "refilled")
    }
    shown.start_trials(cells.items())
    return shown, text


def train(shown: Progress, clock: Clock, cell: str, epochs: int, epoch_s: float, stage: str = "classifier") -> None:
    for _ in range(epochs):
        clock.now_s += epoch_s
        shown.epoch_ended(cell, row_of(1, stage=stage, epoch_s=epoch_s))


def test_what_is_left_goes_at_the_pace_of_the_epochs_so_far(clock: Clock) -> None:
    shown, _ = started(FORECAST)
    clock.now_s += 50  # until the first epoch begins, which comes once
    assert shown.time_left_s() is None
    train(shown, clock, "student", 10, 2.0)
    shown.trial_ended("student", "complete", 0.5)
    # Twice as long as forecast: 30 epochs of 2 s, and 40 that were to take 3 s on average, one after another.
    assert shown.time_left_s() == pytest.approx(30 * 2 + 40 * 6)
    train(shown, clock, "refilled", 10, 5.0, "embedding")
    assert shown.time_left_s() == pytest.approx(30 * 2 + 30 * 5)


def test_trials_side_by_side_and_what_comes_between_rows_count(clock: Clock) -> None:
    shown, _ = started(FORECAST)
    for _ in range(10):
        clock.now_s += 1.5  # two slots' epochs of 1 s, and 0.5 s for their rows
        shown.epoch_ended("student", row_of(1, epoch_s=1.0))
        shown.epoch_ended("student", row_of(1, epoch_s=1.0))
    assert shown.time_left_s() == pytest.approx((20 * 1 + 40 * 3) * 14.5 / 20)


def test_without_a_forecast_all_cells_take_what_is_seen(clock: Clock) -> None:
    shown, text = started(None)
    train(shown, clock, "student", 10, 2.0)
    shown.trial_ended("student", "complete", 0.5)
    shown.trial_ended("student", "complete", 0.5)
    assert shown.time_left_s() == pytest.approx((20 + 40) * 2)
    assert shown.corrected is None
    assert "After the first" not in text.getvalue()


def test_pruned_epochs_and_trials_of_earlier_commands_are_not_left(clock: Clock) -> None:
    shown, _ = started(dataclasses.replace(FORECAST, kept=0.75), student=2)
    train(shown, clock, "student", 5, 1.0)
    assert shown.time_left_s() == pytest.approx(2 * 10 * 0.75 - 5 + 4 * 10 * 0.75 * 3)
    train(shown, clock, "student", 1, 1.0)
    shown.trial_ended("student", "pruned", 0.5)
    shown.trial_ended("student", "pruned", 0.5)
    assert shown.time_left_s() == pytest.approx(4 * 10 * 0.75 * 3)  # all of the student's have ended


def test_the_first_trials_correct_the_forecast_once(clock: Clock) -> None:
    shown, text = started(FORECAST)
    train(shown, clock, "student", 10, 2.0)
    shown.trial_ended("student", "complete", 0.5)
    assert shown.corrected is None  # two run side by side
    train(shown, clock, "student", 10, 2.0)
    shown.trial_ended("student", "complete", 0.5)
    assert shown.corrected is not None  # twice as long as forecast
    assert 3600 * shown.corrected.hours["trials"] == pytest.approx(200)
    assert 3600 * shown.corrected.hours["refits"] == pytest.approx(200)
    assert 3600 * shown.corrected.hours["teachers"] == pytest.approx(100)
    assert shown.corrected.cost == pytest.approx(10 * (300 + 3 * 200) / 600)
    assert "After the first 2 trials the forecast is" in text.getvalue()
    first = shown.corrected
    train(shown, clock, "student", 10, 9.0)
    shown.trial_ended("student", "complete", 0.5)
    assert shown.corrected is first
