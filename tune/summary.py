"""What a search found: the same numbers as a table, as `summary.json` and on MLflow's parent run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from refilled.config import RunConfig
from refilled.statistics import mean_and_ci95
from tune.plan import Cell


@dataclass
class Refits:
    """The refits of one winner, in the order of their seeds; a run that MLflow does not have yet has no id."""

    run: RunConfig
    seeds: list[int] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    run_keys: list[str] = field(default_factory=list)
    run_ids: list[str | None] = field(default_factory=list)


@dataclass(frozen=True)
class CellResult:
    """All that is known of a cell at the end."""

    cell: Cell
    val_accuracy: float
    trial: int
    trial_run_key: str
    trial_run_id: str | None
    counts: dict[str, int]
    refits: Refits
    baseline: Refits
    baseline_val_accuracy: float
    baseline_short: Refits

    def to_json(self) -> dict[str, Any]:
        """One object of `summary.json`; accuracies are shares in [0, 1].

        A run's key is its tag `run_key` in MLflow; its id is null where MLflow had not taken it yet.
        """
        mean, ci95 = mean_and_ci95(self.refits.test_accuracy)
        base_mean, base_ci95 = mean_and_ci95(self.baseline.test_accuracy)
        differences = [a - b for a, b in zip(self.refits.test_accuracy, self.baseline.test_accuracy, strict=True)]
        difference, difference_ci95 = mean_and_ci95(differences)
        return {
            "overlap": self.cell.overlap,
            "teacher": self.cell.teacher,
            "student": self.cell.student,
            "method": self.cell.run.method,
            "teacher_classes": list(self.cell.spaces.teacher),
            "student_classes": list(self.cell.spaces.student),
            "data_digest": self.cell.data_digest,
            "config": self.refits.run.to_dict(),
            "trial": self.trial,
            "trials": self.counts,
            "val_accuracy": self.val_accuracy,
            "seeds": self.refits.seeds,
            "test_accuracy": self.refits.test_accuracy,
            "test_accuracy_mean": mean,
            "test_accuracy_ci95": ci95,
            "baseline_config": self.baseline.run.to_dict(),
            "baseline_val_accuracy": self.baseline_val_accuracy,
            "baseline_test_accuracy": self.baseline.test_accuracy,
            "baseline_test_accuracy_mean": base_mean,
            "baseline_test_accuracy_ci95": base_ci95,
            "baseline_short_test_accuracy": self.baseline_short.test_accuracy,
            "difference_mean": difference,
            "difference_ci95": difference_ci95,
            "run_ids": self.refits.run_ids,
            "run_keys": self.refits.run_keys,
            "trial_run_id": self.trial_run_id,
            "trial_run_key": self.trial_run_key,
            "baseline_run_ids": self.baseline.run_ids,
            "baseline_run_keys": self.baseline.run_keys,
            "baseline_short_run_ids": self.baseline_short.run_ids,
            "baseline_short_run_keys": self.baseline_short.run_keys,
        }


def table(results: Sequence[dict[str, Any]], seeds: int) -> Table:
    """The objects of `summary.json` as a table for people; accuracies in per cent."""
    of = f"mean ± 95 % interval over {seeds} seeds" if seeds > 1 else "one seed, so no interval"
    shown = Table(title=f"Accuracy in %; test: {of}", show_lines=True)
    for name, justify in (
        ("overlap", "right"),
        ("teacher > student", "left"),
        ("method, winner's settings", "left"),
        ("validation", "right"),
        ("test", "right"),
        ("vanilla student", "right"),
        ("same, classifier epochs only", "right"),
        ("difference", "right"),
    ):
        shown.add_column(name, justify=justify)  # type: ignore[arg-type]  # rich's literal, from the tuples above
    for each in results:
        shown.add_row(
            f"{each['overlap']:g}",
            f"{each['teacher']} > {each['student']}",
            f"{each['method']}\n{settings(each['config'])}",
            f"{100 * each['val_accuracy']:.2f}",
            _interval(each["test_accuracy"]),
            _interval(each["baseline_test_accuracy"]),
            _interval(each["baseline_short_test_accuracy"]),
            _interval([a - b for a, b in zip(each["test_accuracy"], each["baseline_test_accuracy"], strict=True)], "+"),
        )
    return shown


def settings(config: dict[str, Any]) -> str:
    """A winner's settings in the paper's symbols, one line a stage."""
    run = RunConfig.from_dict(config)
    lines = []
    if run.method in ("refilled_emb", "refilled_minus", "refilled"):
        stage = run.embedding
        negatives = "∞" if stage.max_negatives is None else stage.max_negatives
        lines.append(
            f"τ {stage.temperature:.3g}, K̂ {negatives}, weight {stage.weight:.3g}, {_schedule(stage.schedule)}"
        )
    classifier = [_schedule(run.classifier.schedule), f"decay {run.optimizer.weight_decay:.2g}"]
    if run.method not in ("student", "refilled_emb"):
        classifier = [f"λ {run.classifier.distill_weight:.3g}", f"τ {run.classifier.temperature:.3g}", *classifier]
    return "\n".join([*lines, ", ".join(classifier)])


def _schedule(schedule: Any) -> str:
    return f"{schedule.kind} {schedule.learning_rate:.3g}"


def _interval(values: list[float], sign: str = "") -> str:
    if not values:
        return "-"
    mean, ci95 = mean_and_ci95(values)
    return f"{100 * mean:{sign}.2f}" + ("" if ci95 is None else f" ± {100 * ci95:.2f}")
