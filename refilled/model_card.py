"""The model card: a page about one student, for whoever is handed its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refilled.config import RunConfig
from refilled.identity import determining
from refilled.methods import NO_TEACHER, composition, is_of_package, is_users
from refilled.statistics import mean_and_ci95
from refilled.student import Student

_MOST_CLASSES = 200  # that are listed


@dataclass(frozen=True)
class Origin:
    """Where a student comes from.

    Attributes:
        run: The refit's configuration.
        run_key: The name of the refit's folder.
        teacher: The teacher's architecture; `none` of a method that asks none.
        teacher_classes: What the teacher knows.
        data_digest: Digest of all training images.
        val_accuracy: By which the method's settings were chosen, of the winning trial.
        seeds: Seeds of the method's refits; this student's is the first.
        test_accuracy: What each of them read from the test set, in the same order.
        search_key, experiment: The search in MLflow.
        code_version: Of the package that is at work.
    """

    run: RunConfig
    run_key: str
    teacher: str
    teacher_classes: tuple[str, ...]
    data_digest: str
    val_accuracy: float
    seeds: Sequence[int]
    test_accuracy: Sequence[float]
    search_key: str
    experiment: str
    code_version: str


def model_card(student: Student, origin: Origin, record: Mapping[str, Any], test: Mapping[str, Any]) -> str:
    """The card in Markdown.

    Args:
        student: The student.
        origin: Where it comes from.
        record: `parameters`, `multiply_adds`, and the `code_version` that wrote the student's files first.
        test: What `test.json` says: `num_images` and `test_digest`.
    """
    run = origin.run
    facts = {
        "Data": f"`{run.data}`, digest `{origin.data_digest}`",
        "Images": f"{' x '.join(map(str, student.image_shape))} (channels, height, width), uint8",
        "Classes": f"{len(student.classes)}, listed below",
        "Test accuracy of this student": f"{100 * origin.test_accuracy[0]:.2f} % (seed {origin.seeds[0]})",
        "Test accuracy of the method": _interval(origin),
        "Test images": f"{test.get('num_images', 'unknown')}, digest `{test.get('test_digest', 'unknown')}`",
        "Validation accuracy of the winning trial": f"{100 * origin.val_accuracy:.2f} %",
        "Teacher": _teacher(origin),
        "Method": f"`{run.method}`, that is `{composition(run.method)}`",
        "Network": f"`{run.student}`, {record['parameters']:,} parameters, {record['multiply_adds']:,} multiply-adds",
        "Precision": run.precision,
        "Run": f"`{origin.run_key}`, search `{origin.search_key}` of experiment `{origin.experiment}`",
        "Code": f"refilled {record['code_version']}",
    }
    settings = {name: value for name, value in sorted(determining(run).items()) if not name.startswith("pretraining.")}
    return "\n".join(
        [
            "---",
            "library_name: refilled",
            "pipeline_tag: image-classification",
            "tags: [knowledge-distillation, refilled]",
            "metrics: [accuracy]",
            "---",
            "",
            f"# {run.student}, distilled by {run.method}",
            "",
            *_table("what", "value", facts),
            "",
            "The settings were chosen by validation accuracy alone. The test set was read once, after that; this "
            "student is the refit with the first seed, whatever the others came to.",
            "",
            "## Use",
            "",
            *_use(student, run),
            "",
            "## Classes",
            "",
            _classes(student.classes),
            "",
            "## Settings",
            "",
            *_table("setting", "value", {f"`{name}`": f"`{value}`" for name, value in settings.items()}),
            "",
        ]
    )


def _use(student: Student, run: RunConfig) -> list[str]:
    channels, height, _ = student.image_shape
    normalization = student.normalization
    imports, more = ["from refilled.models import build_model"], ""
    for name in ("embedding", "features"):
        if (value := getattr(run, f"student_{name}")) is not None:
            more += f", {name}={value!r}"
    if is_users(run.student) or is_of_package(run.student):
        imports.append("from refilled.user_code import read_source  # finds your file by the path in the name")
        more += f', sources=read_source({run.student!r}, "student")'
    return [
        "With the package, which decodes and scales images as in training:",
        "",
        "```python",
        "import refilled",
        "",
        'student = refilled.load(".")  # this folder, or its model.pt',
        'print(student.predict(["photo.jpg"]))',
        "```",
        "",
        "The weights alone, for the network as the package builds it:",
        "",
        "```python",
        *imports,
        "from safetensors.torch import load_file",
        "",
        f'model = build_model("{run.student}", num_classes={len(student.classes)}, in_channels={channels}, '
        f"image_size={height}, seed=0{more})",
        'model.load_state_dict(load_file("student.safetensors"))',
        "```",
        "",
        "An image is decoded to RGB (to its luminance for a network of one channel), its shorter side resized to "
        f"{height} pixels (bicubic, with antialiasing), the central square taken. Of the levels in [0, 1] the mean is "
        f"subtracted, {_numbers(normalization.mean)}, and the rest divided by the deviation, "
        f"{_numbers(normalization.std)}, a channel each.",
    ]


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:.6g}" for value in values.tolist())


def _teacher(origin: Origin) -> str:
    if origin.teacher == NO_TEACHER:
        return "none: the method asks no teacher"
    classes = origin.teacher_classes
    return f"`{origin.teacher}`, {len(classes)} classes, overlap {origin.run.overlap:g} with the student's"


def _interval(origin: Origin) -> str:
    mean, ci95 = mean_and_ci95(origin.test_accuracy)
    if ci95 is None:
        return f"{100 * mean:.2f} %, of one seed, so without an interval"
    return (
        f"{100 * mean:.2f} ± {100 * ci95:.2f} % (mean and 95 % interval by Student's t over {len(origin.seeds)} seeds)"
    )


def _classes(classes: Sequence[str]) -> str:
    listed = ", ".join(f"{label}: {name}" for label, name in enumerate(classes[:_MOST_CLASSES]))
    more = len(classes) - _MOST_CLASSES
    return f"{listed}, and {more} more in `classes.json`." if more > 0 else f"{listed}."


def _table(left: str, right: str, rows: Mapping[str, str]) -> list[str]:
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    return [f"| {left} | {right} |", "| --- | --- |", *lines]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
