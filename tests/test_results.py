"""What a search returns to Python, from the rows of its summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import refilled
from refilled.errors import UserError
from refilled.presets import smoke
from refilled.results import SearchResults


def row(method: str, val_accuracy: float, test_accuracy: list[float], **changes: Any) -> dict[str, Any]:
    mean = sum(test_accuracy) / len(test_accuracy)
    found = {
        **{"overlap": 0.4, "teacher": "convnet-32", "student": "convnet-8", "images_per_class": None},
        **{"method": method, "config": smoke().run.to_dict(), "val_accuracy": val_accuracy},
        **{"test_accuracy": test_accuracy, "test_accuracy_mean": mean, "test_accuracy_ci95": None},
        **{"difference_mean": None, "difference_ci95": None, "run_keys": [f"5ea4c4-{method}-0", f"5ea4c4-{method}-1"]},
    }
    return found | changes


ROWS = [
    row("student", 0.80, [0.99, 0.99]),
    row("refilled", 0.90, [0.50, 0.60]),
    row("refilled", 0.95, [0.70, 0.70], overlap=1.0, images_per_class=25),
]


def test_a_result_is_its_row_and_leads_to_the_student(tmp_path: Path) -> None:
    results = SearchResults(ROWS, tmp_path)
    assert len(results) == 3
    second = results[1]
    assert (second.method, second.mean, second.test_accuracy) == ("refilled", pytest.approx(0.55), (0.5, 0.6))
    assert second.folder == tmp_path / "runs" / "refilled-0"
    assert second.run == smoke().run
    with pytest.raises(UserError, match="there is no student there"):
        second.load()


def test_the_best_is_chosen_by_validation(tmp_path: Path) -> None:
    results = SearchResults(ROWS, tmp_path)
    assert results.best(overlap=0.4).method == "refilled"  # although the student's test is better
    assert results.best().images_per_class == 25
    assert [each.method for each in results.of(overlap=0.4)] == ["student", "refilled"]
    with pytest.raises(UserError, match=r"no result with \{'overlap': 0\.2\}"):
        results.best(overlap=0.2)


def test_it_is_a_table_too(tmp_path: Path) -> None:
    results = SearchResults(ROWS, tmp_path)
    frame = results.to_frame()
    assert frame["test_accuracy_mean"].tolist() == pytest.approx([0.99, 0.55, 0.7])
    assert frame["folder"].iloc[0].endswith("runs/student-0")
    assert "refilled" in repr(results)
    assert [each.overlap for each in results[1:]] == [0.4, 1.0]


def test_a_setting_of_the_runs_is_told_where_it_belongs() -> None:
    with pytest.raises(UserError, match=r"^epochs is a setting of the runs; .* settings=\{'epochs': \[1, 1\]\}"):
        refilled.search("smoke", epochs=[1, 1])
