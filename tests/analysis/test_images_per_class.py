"""Searches over several numbers of the student's training images of each class (Figure 6b)."""

import csv
import math

import pandas as pd
import pytest
from analysis_runs import KD, REFILLED, STUDENT, Search, cells_of, runs_of

from analysis.plots import accuracy_over_images, accuracy_over_overlap
from analysis.report import app, write_report
from analysis.runs import fetch_runs
from analysis.summary import differences, numbers_of_images, summarise
from analysis.tables import (
    details_table,
    differences_table,
    document,
    images_differences_tables,
    images_tables,
    overlap_table,
)
from refilled.command import run_app
from refilled.methods import NO_TEACHER, SHORT_VANILLA
from refilled.storage import Storage
from tune.tracking.tracker import Tracker, resolve_tracking_uri

NUMBERS = (None, 25, 10)  # of the grid; None: all
FIGURE = {"accuracy_over_images.png", "accuracy_over_images.pdf"}


def grid(*, methods=("kd", "refilled"), numbers=NUMBERS, overlaps=(0.0, 0.4), teachers=("big",), gain=0.1):
    """Every method with all numbers of images; one that is all images is better by `gain`, at overlap 0.4 by 0.01."""
    groups = []
    for overlap in overlaps:
        for number in numbers:
            more = (0.0 if number else gain) + (0.01 if overlap else 0.0)
            common = {"overlap": overlap, "images_per_class": number}
            tests = {"kd": KD, "refilled": REFILLED}
            for teacher in teachers:
                for method in methods:
                    of_method = {seed: value + more for seed, value in tests[method].items()}
                    groups.append(runs_of(method, of_method, teacher=teacher, **common))
            groups.append(runs_of("student", STUDENT, **common))
    return groups


@pytest.fixture(scope="module")
def cells():
    return cells_of(*grid())


def numbers_in(table):
    return [None if pd.isna(value) else value for value in table["images_per_class"]]


def test_the_number_is_part_of_the_cell_and_all_images_come_last(cells):
    assert str(cells["images_per_class"].dtype) == "Int64"
    assert numbers_in(cells) == 2 * [10, 10, 10, 25, 25, 25, None, None, None]
    assert cells["method"].tolist() == 6 * ["student", "kd", "refilled"]
    assert numbers_of_images(cells) == [10, 25, None]
    refilled = cells[(cells["method"] == "refilled") & (cells["overlap"] == 0.0)]
    assert refilled["mean"].tolist() == pytest.approx([0.67, 0.67, 0.77])
    table = differences(cells)
    assert numbers_in(table) == 2 * [10, 10, 10, 25, 25, 25, None, None, None]
    to_kd = table[(table["other"] == "kd") & (table["overlap"] == 0.0)]
    assert to_kd["mean"].tolist() == pytest.approx([0.03] * 3)


def test_teachers_share_the_student_of_their_own_number_alone():
    groups = [
        runs_of("kd", {0: 0.7}, teacher="big", images_per_class=10),
        runs_of("kd", {0: 0.7}, teacher="huge", images_per_class=10),
        runs_of("kd", {0: 0.9}, teacher="big"),
        runs_of("student", {0: 0.5}, images_per_class=10),
        runs_of("student", {0: 0.4}, num_trials=0, role="baseline_short", images_per_class=10),
        runs_of("student", {0: 0.6}),
        runs_of("student", {0: 0.3}, images_per_class=25),  # beside which no teacher was asked
    ]
    cells = cells_of(*groups)
    students = cells[cells["method"] == "student"]
    assert list(zip(students["teacher"], numbers_in(students), students["mean"], strict=True)) == [
        ("big", 10, 0.5),
        ("big", None, 0.6),
        ("huge", 10, 0.5),
        (NO_TEACHER, 25, 0.3),
    ]
    short = cells[cells["method"] == SHORT_VANILLA]
    assert list(zip(short["teacher"], numbers_in(short), strict=True)) == [("big", 10), ("huge", 10)]
    kd = cells[cells["method"] == "kd"]
    assert kd["difference_mean"].tolist() == pytest.approx([0.2, 0.3, 0.2])


def test_tables_of_accuracy_over_overlap_and_over_images(cells):
    lines = overlap_table(cells).splitlines()
    assert lines[0] == "| images a class | overlap | big → small: student | big → small: kd | big → small: refilled |"
    assert [line.split(" | ")[:2] for line in lines[2:8]] == [
        [f"| {number}", overlap] for number in ("10", "25", "all") for overlap in ("0 %", "40 %")
    ]
    assert lines[7].endswith("| 62.00 ± 4.97 (n = 3) | 75.00 ± 6.57 (n = 3) | 78.00 ± 6.57 (n = 3) |")
    text = images_tables(cells)
    titles = ["### big → small, overlap 0 %", "### big → small, overlap 40 %"]
    assert [line for line in text.splitlines() if line.startswith("#")] == titles
    assert text.splitlines()[2:7] == [
        "| images a class | student | kd | refilled |",
        "| --- | --- | --- | --- |",
        "| 10 | 62.00 ± 4.97 (n = 3) | 64.00 ± 6.57 (n = 3) | 67.00 ± 6.57 (n = 3) |",
        "| 25 | 62.00 ± 4.97 (n = 3) | 64.00 ± 6.57 (n = 3) | 67.00 ± 6.57 (n = 3) |",
        "| all | 62.00 ± 4.97 (n = 3) | 74.00 ± 6.57 (n = 3) | 77.00 ± 6.57 (n = 3) |",
    ]
    assert "| 0 % | big | small | all | kd | 50.00 | 74.00 ±" in details_table(cells)
    assert text.count("Student's t") == 1
    assert "## Accuracy over images a class\n\n### big" in document(cells, "exp")


def test_tables_of_differences_over_overlap_and_over_images(cells):
    lines = differences_table(cells).splitlines()
    assert lines[0] == "| teacher → student | images a class | method | minus | 0 % | 40 % |"
    assert lines[2] == "| big → small | 10 | kd | student | +2.00 ± 2.48 (n = 3) | +3.00 ± 2.48 (n = 3) |"
    assert lines[10] == "| big → small | all | refilled | kd | +3.00 ± 4.30 (n = 3) | +3.00 ± 4.30 (n = 3) |"
    text = images_differences_tables(cells)
    assert text.splitlines()[:6] == [
        "### big → small, overlap 0 %",
        "",
        "| method | minus | 10 images a class | 25 images a class | all images |",
        "| --- | --- | --- | --- | --- |",
        "| kd | student | +2.00 ± 2.48 (n = 3) | +2.00 ± 2.48 (n = 3) | +12.00 ± 2.48 (n = 3) |",
        "| refilled | student | +5.00 ± 2.48 (n = 3) | +5.00 ± 2.48 (n = 3) | +15.00 ± 2.48 (n = 3) |",
    ]
    assert "## Differences over images a class\n\n### big" in document(cells, "exp")
    two = cells_of(*grid(methods=("kd",)))  # the gap to the student alone is worth a look over images
    assert differences_table(two) == ""
    assert "| kd | student | +2.00 ± 2.48 (n = 3) |" in images_differences_tables(two)
    assert images_differences_tables(cells_of(*grid(methods=()))) == ""


def test_what_was_not_searched_at_a_number_is_a_gap():
    cells = cells_of(*grid(overlaps=(0.0,)), runs_of("rkd", KD, images_per_class=25))
    assert images_tables(cells).splitlines()[4].endswith("| 67.00 ± 6.57 (n = 3) | - |")
    assert "| rkd | student | - | +2.00 ± 2.48 (n = 3) | - |" in images_differences_tables(cells)
    bars = {bar.get_label(): bar.lines[0] for bar in accuracy_over_images(cells).axes[0].containers}
    assert len(bars["rkd"].get_xdata()) == 1
    assert len(bars["kd"].get_xdata()) == 3


def test_the_figure_has_numbers_on_a_logarithmic_axis_and_all_images_to_their_right(cells):
    figure = accuracy_over_images(cells)
    assert [axes.get_title() for axes in figure.axes] == ["big → small\noverlap 0 %", "big → small\noverlap 40 %"]
    for axes in figure.axes:
        assert axes.get_xscale() == "log"
        assert axes.get_xticks().tolist() == pytest.approx([10, 25, 62.5])  # one step further than 25
        assert [label.get_text() for label in axes.get_xticklabels()] == ["10", "25", "all"]
        assert axes.get_xticks(minor=True).tolist() == []
        assert axes.get_xlabel() == "training images a class (all: not to scale)"
        student, kd, refilled = axes.containers
        assert [bar.get_label() for bar in axes.containers] == ["student", "kd", "refilled"]
        # Side by side, 4 % of the factor between two numbers apart.
        assert list(student.lines[0].get_xdata()) == pytest.approx([number / 2.5**0.04 for number in (10, 25, 62.5)])
        assert list(kd.lines[0].get_xdata()) == pytest.approx([10, 25, 62.5])
        assert list(refilled.lines[0].get_xdata()) == pytest.approx([number * 2.5**0.04 for number in (10, 25, 62.5)])
    assert list(figure.axes[0].containers[2].lines[0].get_ydata()) == pytest.approx([67, 67, 77])
    bar = figure.axes[0].containers[2].lines[2][0].get_segments()[0]
    assert [point[1] for point in bar] == pytest.approx([67 - 6.572, 67 + 6.572], abs=1e-3)
    over_overlap = accuracy_over_overlap(cells)
    titles = [axes.get_title() for axes in over_overlap.axes]
    assert titles == [f"big → small\n{images}" for images in ("10 images a class", "25 images a class", "all images")]

    def looks(drawn):
        return [(bar.lines[0].get_color(), bar.lines[0].get_linestyle()) for bar in drawn.axes[0].containers]

    assert looks(figure) == looks(over_overlap)


def test_numbers_alone_have_no_place_for_all_images():
    axes = accuracy_over_images(cells_of(*grid(numbers=(10, 20, 80)))).axes[0]
    assert axes.get_xticks().tolist() == [10, 20, 80]
    assert axes.get_xlabel() == "training images a class"
    last = accuracy_over_images(cells_of(*grid(numbers=(10, 20, 80, None)))).axes[0]
    assert last.get_xticks().tolist() == [10, 20, 80, 320]
    one = accuracy_over_images(cells_of(*grid(numbers=(10, None)))).axes[0]
    assert one.get_xticks().tolist() == [10, 20]


def test_wide_intervals_do_not_press_the_points_together():
    tests = {0: 0.3, 1: 0.9}  # 60 ± 381
    axes = accuracy_over_images(cells_of(*(runs_of("kd", tests, images_per_class=each) for each in NUMBERS))).axes[0]
    assert axes.get_ylim() == (-2, 102)
    near = accuracy_over_images(cells_of(*grid())).axes[0]
    assert near.get_ylim()[0] > 50
    assert near.get_ylim()[1] < 90


@pytest.mark.parametrize("draw", [images_tables, images_differences_tables, accuracy_over_images])
def test_several_searches_are_not_mixed(draw):
    other = runs_of("kd", KD, search_key="other", images_per_class=25)
    with pytest.raises(ValueError, match="one search"):
        draw(cells_of(*grid(), other))


def test_all_images_alone_are_not_named(tmp_path):
    cells = cells_of(*grid(numbers=(None,)))
    write_report(cells, "exp", tmp_path)
    assert FIGURE & {path.name for path in tmp_path.iterdir()} == set()
    for name in ("overlap_table.md", "cells.csv", "differences.csv"):
        assert "images" not in (tmp_path / name).read_text()
    assert [axes.get_title() for axes in accuracy_over_overlap(cells).axes] == ["big → small"]


def test_one_number_is_named_but_nothing_is_drawn_over_it(tmp_path):
    cells = cells_of(*grid(numbers=(25,)))
    write_report(cells, "exp", tmp_path)
    assert FIGURE & {path.name for path in tmp_path.iterdir()} == set()
    text = (tmp_path / "overlap_table.md").read_text()
    assert "| 25 | 0 % |" in text
    assert "over images a class" not in text
    assert set(pd.read_csv(tmp_path / "cells.csv")["images_per_class"]) == {25}
    assert accuracy_over_overlap(cells).axes[0].get_title() == "big → small\n25 images a class"


def test_the_report_of_a_search_in_mlflow(tmp_path, capsys):
    storage = Storage.open(tmp_path / "storage")
    uri = resolve_tracking_uri(None, storage)
    with Tracker(uri, "exp", storage) as tracker:
        tracker.start_search("new", name="new", params={}, tags={"kind": "search"})
        search = Search(tracker, storage.root / "new")
        for few in ({"images_per_class": 4}, {"images_per_class": 16}, {}):  # no tag: all
            for method, accuracy in (("student", 0.5), ("refilled", 0.5 + 0.01 * few.get("images_per_class", 30))):
                search.run(kind="trial", overlap=0.0, method=method, trial=0, val=0.6, winner="true", **few)
                search.run(kind="refit", overlap=0.0, method=method, seed=0, test=accuracy, **few)
        tracker.finish_search(status="FINISHED")
        assert tracker.flush(30)
    runs = fetch_runs(uri, "exp")
    assert str(runs["images_per_class"].dtype) == "Int64"
    assert numbers_in(runs) == [4, 4, 4, 4, 16, 16, 16, 16, None, None, None, None]
    assert math.isclose(summarise(runs)["difference_mean"].iloc[3], 0.16)
    out = tmp_path / "out"
    assert run_app(app, ["--experiment", "exp", "--tracking-uri", uri, "--out", str(out)]) == 0
    assert "| 16 | 0 % | 50.00 (one seed) | 66.00 (one seed) |" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} >= FIGURE
    with (out / "cells.csv").open(newline="") as file:
        numbers = [row["images_per_class"] for row in csv.DictReader(file)]
    assert numbers == ["4", "4", "16", "16", "", ""]
