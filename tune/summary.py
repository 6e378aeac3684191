"""What a search found: the same numbers as a table, as `summary.json` and on MLflow's parent run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from refilled.config import RunConfig, ScheduleConfig
from refilled.export import TOLERANCE
from refilled.methods import SHORT_VANILLA, VANILLA, composition
from refilled.stages import place_of, stages_of, term_config
from refilled.statistics import mean_and_ci95
from tune.plan import Plan
from tune.studies.cells import Cell, Place
from tune.studies.space import Edge, searched_of

_SYMBOLS = {"temperature": "τ", "distill_weight": "λ", "max_negatives": "K̂"}


@dataclass
class Refits:
    """The refits of one winner, in the order of their seeds; a run that MLflow does not have yet has no id."""

    run: RunConfig
    seeds: list[int] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    run_keys: list[str] = field(default_factory=list)
    run_ids: list[str | None] = field(default_factory=list)

    def add(self, seed: int, test_accuracy: float, run_key: str, run_id: str | None) -> None:
        """Take one refit."""
        self.seeds.append(seed)
        self.test_accuracy.append(test_accuracy)
        self.run_keys.append(run_key)
        self.run_ids.append(run_id)


@dataclass(frozen=True)
class MethodResult:
    """All that is known of one method in one cell at the end.

    Attributes:
        cell: The method and where it was searched.
        val_accuracy: The winner's.
        trial: The winner's number in its study.
        trial_run_key: Its key in MLflow.
        trial_run_id: Its id, none where MLflow has not taken it yet.
        counts: How the study's trials ended.
        refits: The winner's refits.
        short: Refits of a vanilla student with the classifier stage's epochs alone; none where there are none.
        edges: Settings of the winner at an end of their range.
        student: Of the first refit what its `student.json` says, and its `folder` in the storage, `seed`, and whether
            it is an `mlflow_model`; none before its files are written.
        registered: The names under which it is the champion, by the cell of the grid in which it is the best.
    """

    cell: Cell
    val_accuracy: float
    trial: int
    trial_run_key: str
    trial_run_id: str | None
    counts: dict[str, int]
    refits: Refits
    short: Refits | None
    edges: list[Edge]
    student: Mapping[str, Any] | None = None
    registered: Mapping[Place, str] = field(default_factory=dict)


def rows(plan: Plan, results: Sequence[MethodResult]) -> list[dict[str, Any]]:
    """The objects of `summary.json`, one a cell of the grid and method; accuracies are shares in [0, 1].

    A vanilla student, which is searched once for all teachers, is a row in the cell of each. The fields that begin with
    `baseline` are of the vanilla student in the same cell; null where none was searched, and its own in its own row.
    """
    by_name = {result.cell.name: result for result in results}
    found = []
    for place in plan.places:
        beside = {method: by_name[cell.name] for method, cell in plan.at(place).items() if cell.name in by_name}
        found += [_row(plan, place, result, beside) for result in beside.values()]
    return found


def _row(plan: Plan, place: Place, result: MethodResult, beside: Mapping[str, MethodResult]) -> dict[str, Any]:
    """One object of `summary.json`; `beside` are the results of the cell's methods, this one among them.

    A run's key is its tag `run_key` in MLflow; its id is null where MLflow had not taken it yet.
    """
    cell, refits, baseline = result.cell, result.refits, beside.get(VANILLA)
    mean, ci95 = mean_and_ci95(refits.test_accuracy)
    difference, difference_ci95 = (None, None) if baseline is None else paired(refits, baseline.refits)
    return {
        "overlap": place.overlap,
        "teacher": place.teacher,
        "student": place.student,
        "images_per_class": place.images_per_class,
        "method": cell.method,
        "terms": composition(cell.method),
        "teacher_classes": list(cell.spaces.teacher),
        "student_classes": list(cell.spaces.student),
        "data_digest": cell.data_digest,
        "config": refits.run.to_dict(),
        "trial": result.trial,
        "trials": result.counts,
        "val_accuracy": result.val_accuracy,
        "seeds": refits.seeds,
        "test_accuracy": refits.test_accuracy,
        "test_accuracy_mean": mean,
        "test_accuracy_ci95": ci95,
        **_baseline(baseline),
        "difference_mean": difference,
        "difference_ci95": difference_ci95,
        "differences": {
            method: dict(zip(("mean", "ci95"), paired(refits, other.refits), strict=True))
            for method, other in beside.items()
            if other is not result
        },
        "at_edge": [asdict(edge) for edge in result.edges],
        **_student(plan, place, result),
        "run_ids": refits.run_ids,
        "run_keys": refits.run_keys,
        "trial_run_id": result.trial_run_id,
        "trial_run_key": result.trial_run_key,
    }


def _student(plan: Plan, place: Place, result: MethodResult) -> dict[str, Any]:
    """The files of the first refit's student, and what was asked to be exported of it."""
    if result.student is None:
        return {"student_file": None, "export": {}}
    sizes = {name: result.student[name] for name in ("parameters", "multiply_adds", "file_bytes", "mlflow_model")}
    file = {"folder": result.student["folder"], "file": "student.safetensors", "seed": result.student["seed"], **sizes}
    return {
        "student_file": file | {"registered_as": result.registered.get(place)},
        "export": {form: result.student["export"][form] for form in plan.search.export},
    }


def _baseline(baseline: MethodResult | None) -> dict[str, Any]:
    """The vanilla student's fields in a row of its cell."""
    if baseline is None:
        of_baseline = ("config", "val_accuracy", "test_accuracy", "test_accuracy_mean", "test_accuracy_ci95")
        of_runs = ("short_test_accuracy", "run_ids", "run_keys", "short_run_ids", "short_run_keys")
        return {f"baseline_{name}": None for name in (*of_baseline, *of_runs)}
    refits, short = baseline.refits, baseline.short or baseline.refits
    mean, ci95 = mean_and_ci95(refits.test_accuracy)
    return {
        "baseline_config": refits.run.to_dict(),
        "baseline_val_accuracy": baseline.val_accuracy,
        "baseline_test_accuracy": refits.test_accuracy,
        "baseline_test_accuracy_mean": mean,
        "baseline_test_accuracy_ci95": ci95,
        "baseline_short_test_accuracy": short.test_accuracy,
        "baseline_run_ids": refits.run_ids,
        "baseline_run_keys": refits.run_keys,
        "baseline_short_run_ids": short.run_ids,
        "baseline_short_run_keys": short.run_keys,
    }


def paired(one: Refits, other: Refits) -> tuple[float, float | None]:
    """Mean difference of test accuracies over equal seeds, and the half width of its 95 % interval."""
    return mean_and_ci95([a - b for a, b in zip(one.test_accuracy, other.test_accuracy, strict=True)])


def table(results: Sequence[dict[str, Any]], seeds: int) -> Table:
    """The objects of `summary.json` as a table for people, a line a method, cell by cell; accuracies in per cent."""
    of = f"mean ± 95 % interval over {seeds} seeds" if seeds > 1 else "one seed, so no interval"
    shown = Table(title=f"Accuracy in %; test: {of}; differences are paired by seed")
    has_images = any(each["images_per_class"] is not None for each in results)
    for name, justify in (
        ("overlap", "right"),
        ("teacher > student", "left"),
        *([("images a class", "right")] if has_images else []),
        ("method", "left"),
        ("winner's settings", "left"),
        ("trials", "right"),
        ("validation", "right"),
        ("test", "right"),
        ("minus vanilla student", "right"),
    ):
        # A composition or a path is folded: its end is what tells it from others.
        shown.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]  # rich's literal
    for place, group in _by_place(results).items():
        where = [f"{place.overlap:g}", f"{place.teacher} > {place.student}"]
        if has_images:
            where.append("all" if place.images_per_class is None else str(place.images_per_class))
        for each in group:
            shown.add_row(*where, *_cells(each))
            if each["method"] == VANILLA and each["baseline_short_run_keys"] != each["run_keys"]:
                short = _interval(each["baseline_short_test_accuracy"])
                shown.add_row(*("" for _ in where), SHORT_VANILLA, "", "", "", short, "")
        shown.add_section()
    return shown


def _by_place(results: Sequence[dict[str, Any]]) -> dict[Place, list[dict[str, Any]]]:
    """Rows by their cell of the grid, in the order of the search, but the images of a class ascending, all last."""
    found: dict[Place, list[dict[str, Any]]] = {}
    for row in results:
        found.setdefault(_place(row), []).append(row)
    networks = list(dict.fromkeys(place[:3] for place in found))
    order = sorted(found, key=lambda place: (networks.index(place[:3]), place.images_per_class or math.inf))
    return {place: found[place] for place in order}


def _place(row: Mapping[str, Any]) -> Place:
    return Place(*(row[name] for name in Place._fields))


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A line of the table from its method on."""
    baseline = row["baseline_test_accuracy"]
    difference = ""
    if baseline is not None and row["method"] != VANILLA:
        difference = _interval([a - b for a, b in zip(row["test_accuracy"], baseline, strict=True)], "+")
    return (
        row["method"],
        settings(row["config"]),
        str(row["trials"]["complete"] + row["trials"]["pruned"]),
        f"{100 * row['val_accuracy']:.2f}",
        _interval(row["test_accuracy"]),
        difference,
    )


def settings(config: dict[str, Any]) -> str:
    """A winner's searched kinds of settings, in the paper's symbols where it has some, one line a stage."""
    run = RunConfig.from_dict(config)
    lines = []
    for stage in stages_of(run):
        words = []
        for term, entry in searched_of(stage, run):
            prefix = "" if place_of(term) in ("embedding", "classifier") else f"{term.name} "
            words.append(f"{prefix}{_setting(entry.name, term_config(term, run).flat()[entry.name])}")
        words.append(_schedule(stage.schedule))
        if stage.name == "classifier":
            words.append(f"decay {run.optimizer.weight_decay:.2g}")
        lines.append(", ".join(words))
    return "\n".join(lines)


def _setting(name: str, value: Any) -> str:
    text = "∞" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
    return f"{_SYMBOLS.get(name, name.replace('_', ' '))} {text}"


def remarks(results: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader of the table should know: winners at the end of a range, and methods that had unequal trials."""
    lines = []
    for row in results:
        where = f"{_place(row).name} {row['method']}"
        for edge in row["at_edge"]:
            lines.append(
                f"{where}: the winner's {edge['name']} {edge['value']:.3g} is at the end of its range "
                f"{edge['low']:g} .. {edge['high']:g}; a better one may lie beyond."
            )
    for place, group in _by_place(results).items():
        counts = {each["method"]: each["trials"]["complete"] + each["trials"]["pruned"] for each in group}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{method} {count}" for method, count in counts.items())
            lines.append(f"{place.name}: methods had unequal numbers of trials: {said}.")
    for row in results:
        for form, each in row["export"].items():
            where = f"{_place(row).name} {row['method']}"
            if "error" in each:
                lines.append(f"{where}: {each['error']}")
            elif each["precision"] == "float32" and each["max_logit_difference"] > TOLERANCE:
                difference = f"{each['max_logit_difference']:.2g}"
                lines.append(f"{where}: scores of its {form} file differ from the student's by up to {difference}.")
    return list(dict.fromkeys(lines))


def export_table(results: Sequence[dict[str, Any]]) -> Table:
    """What was exported, a line a file; a vanilla student of several teachers has one."""
    found = {
        (row["student_file"]["folder"], form): (row, each)
        for row in results
        for form, each in row["export"].items()
        if "error" not in each
    }
    threads = sorted({each["num_threads"] for _, each in found.values()})
    machines = sorted({each["machine"] for _, each in found.values()})
    at = f"{', '.join(map(str, threads))} thread(s), {', '.join(machines)}"
    shown = Table(title=f"Exported students; milliseconds a batch, p50 / p95, {at}")
    columns = ("student", "method", "parameters", "multiply-adds", "file", "KiB", "largest difference", "test")
    for name in (*columns, "batch 1", "batch 32"):
        shown.add_column(name, justify="left" if name in ("student", "method", "file") else "right", overflow="fold")
    for (folder, _), (row, each) in found.items():
        sizes = (f"{row['student_file'][name]:,}" for name in ("parameters", "multiply_adds"))
        times = (f"{one['p50_ms']:.3g} / {one['p95_ms']:.3g}" for one in each["latency"].values())
        file = f"{folder}/\n{each['file']}"
        checked = f"{each['file_bytes'] / 1024:.0f}", f"{each['max_logit_difference']:.1e}"
        accuracy = f"{100 * each['test_accuracy']:.2f}"
        shown.add_row(row["student"], row["method"], *sizes, file, *checked, accuracy, *times)
    return shown


def _schedule(schedule: ScheduleConfig) -> str:
    return f"{schedule.kind} {schedule.learning_rate:.3g}"


def _interval(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return "-"
    mean, ci95 = mean_and_ci95(values)
    return f"{100 * mean:{sign}.2f}" + ("" if ci95 is None else f" ± {100 * ci95:.2f}")
