"""Several methods of one search side by side, from tables made by hand."""

import math

import pandas as pd
import pytest
from analysis_runs import KD, REFILLED, STUDENT, cells_of, runs_of

from analysis.plots import accuracy_over_overlap
from analysis.report import write_report
from analysis.summary import COLUMNS, DIFFERENCE_COLUMNS, differences
from analysis.tables import details_table, differences_table, document, escape_markdown, overlap_table
from refilled.methods import NO_TEACHER, SHORT_VANILLA

T2, T1 = 4.302653, 12.706205  # 97.5 % quantiles of Student's t with 2 and with 1 degrees of freedom


def of(table, **wanted):
    """The only row that has these values."""
    for name, value in wanted.items():
        table = table[table[name] == value]
    (row,) = table.to_dict("records")
    return row


def pairs_of(table):
    return list(zip(table["method"], table["other"], strict=True))


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_three_methods_are_compared_by_seed():
    cells = cells_of(runs_of("refilled", REFILLED), runs_of("kd", KD), runs_of("student", STUDENT))
    assert tuple(cells.columns) == COLUMNS
    assert cells["method"].tolist() == ["student", "kd", "refilled"]
    assert cells["difference_mean"].tolist()[1:] == pytest.approx([0.02, 0.05])
    assert cells["difference_ci95"].tolist()[1:] == pytest.approx([T2 * 0.01 / math.sqrt(3)] * 2, abs=1e-7)
    assert math.isnan(cells["difference_mean"][0])
    assert cells["num_pairs"].tolist() == [0, 3, 3]
    table = differences(cells)
    assert tuple(table.columns) == DIFFERENCE_COLUMNS
    assert pairs_of(table) == [("kd", "student"), ("refilled", "student"), ("refilled", "kd")]
    # refilled - kd: 0.04, 0.01, 0.04; mean 0.03, standard deviation sqrt(0.0003)
    assert table["mean"].tolist() == pytest.approx([0.02, 0.05, 0.03])
    assert table["ci95"].tolist()[2] == pytest.approx(T2 * 0.01, abs=1e-7)
    assert table["num_pairs"].tolist() == [3, 3, 3]
    lines = differences_table(cells).splitlines()
    assert lines[0] == "| teacher → student | method | minus | 0 % |"
    assert lines[2:5] == [
        "| big → small | kd | student | +2.00 ± 2.48 (n = 3) |",
        "| big → small | refilled | student | +5.00 ± 2.48 (n = 3) |",
        "| big → small | refilled | kd | +3.00 ± 4.30 (n = 3) |",
    ]
    assert "## Differences between methods" in document(cells, "exp")


def test_only_seeds_that_both_methods_have_are_compared():
    cells = cells_of(
        runs_of("student", STUDENT), runs_of("kd", {3: 0.9, 2: 0.66, 1: 0.65}), runs_of("rkd", {3: 0.8, 4: 0.1})
    )
    kd = of(cells, method="kd")
    assert kd["seeds"] == [1, 2, 3]
    assert (kd["num_pairs"], kd["difference_mean"]) == (2, pytest.approx(0.025))  # 0.03 and 0.02
    assert kd["difference_ci95"] == pytest.approx(T1 * 0.005, abs=1e-7)
    rkd = of(cells, method="rkd")
    assert (rkd["num_pairs"], math.isnan(rkd["difference_mean"])) == (0, True)
    to_kd = of(differences(cells), method="rkd", other="kd")
    assert (to_kd["num_pairs"], to_kd["mean"], math.isnan(to_kd["ci95"])) == (1, pytest.approx(-0.1), True)
    table = differences_table(cells)
    assert "| rkd | student | - |" in table
    assert "| rkd | kd | -10.00 (one seed) |" in table


def test_without_a_student_there_is_nothing_to_differ_from_but_each_other():
    cells = cells_of(runs_of("kd", KD), runs_of("refilled", REFILLED), runs_of("rkd", {}))
    assert cells["method"].tolist() == ["kd", "refilled", "rkd"]
    assert cells["num_pairs"].tolist() == [0, 0, 0]
    assert cells["difference_mean"].isna().all()
    assert pairs_of(differences(cells)) == [("refilled", "kd"), ("rkd", "kd"), ("rkd", "refilled")]
    assert "| kd | 50.00 | 64.00 ± 6.57 (n = 3) | - | 1 (0, 0) |" in details_table(cells)
    assert legend_of(accuracy_over_overlap(cells)) == ["kd", "refilled"]  # rkd has no point


def test_a_student_alone_has_no_teacher(tmp_path):
    cells = cells_of(runs_of("student", STUDENT))
    assert of(cells, method="student")["teacher"] == NO_TEACHER
    assert overlap_table(cells).startswith("| overlap | small: student |\n")
    assert accuracy_over_overlap(cells).axes[0].get_title() == "small"
    assert differences_table(cells) == ""
    assert "Differences between methods" not in document(cells, "exp")
    write_report(cells, "exp", tmp_path)
    header = ",".join(name for name in DIFFERENCE_COLUMNS if name != "images_per_class")
    assert (tmp_path / "differences.csv").read_text() == f"{header}\n"


def test_teachers_share_the_student_of_their_overlap_and_size():
    shared = runs_of("student", STUDENT, num_trials=3)
    short = runs_of("student", {0: 0.55}, num_trials=0, role="baseline_short")
    cells = cells_of(
        *(runs_of("kd", {0: value}, teacher=teacher) for teacher, value in (("big", 0.7), ("huge", 0.8))),
        runs_of("kd", {0: 0.1}, teacher="of tiny", student="tiny"),
        runs_of("kd", {0: 0.2}, teacher="of 0.4", overlap=0.4),
        runs_of("kd", {0: 0.3}, teacher="of another", search_key="another"),
        shared,
        short,
    )
    students = cells[cells["method"] == "student"]
    assert students["teacher"].tolist() == ["big", "huge"]
    ids = [row["run_id"] for row in shared]
    assert students["run_ids"].tolist() == [ids[2:]] * 2
    assert students["num_trials"].tolist() == [3, 3]
    assert cells[cells["method"] == SHORT_VANILLA]["teacher"].tolist() == ["big", "huge"]
    kd = cells[cells["method"] == "kd"].set_index(["search_key", "overlap", "teacher", "student"])
    assert kd.loc[("s", 0.0, "big", "small"), "difference_mean"] == pytest.approx(0.1)
    assert kd.loc[("s", 0.0, "huge", "small"), "difference_mean"] == pytest.approx(0.2)
    assert kd["num_pairs"].sum() == 2
    here = cells[(cells["search_key"] == "s") & (cells["student"] == "small") & (cells["overlap"] == 0.0)]
    assert "beside every teacher" in details_table(here)
    assert NO_TEACHER not in set(cells["teacher"])


def test_a_student_with_other_epochs_makes_no_third_method():
    short = runs_of("student", {0: 0.55}, num_trials=0, role="baseline_short")
    two = [runs_of("student", STUDENT), runs_of("kd", KD), short]
    assert differences_table(cells_of(*two)) == ""
    three = [*two, runs_of("refilled", REFILLED)]
    few = [runs_of(method, tests, overlap=0.4) for method, tests in (("student", STUDENT), ("kd", KD))]
    lines = differences_table(cells_of(*three, *few)).splitlines()
    assert lines[0].endswith("| minus | 0 % |")  # overlap 0.4 has two methods
    assert f"| big → small | kd | {SHORT_VANILLA} | +6.00 (one seed) |" in lines


def test_names_from_outside_are_escaped():
    name = "<script>|a_b*\n# `x` [l](u) & $y$ \\"
    shown = escape_markdown(name)
    assert shown == r"&lt;script&gt;\|a\_b\* \# \`x\` \[l\]\(u\) &amp; \$y\$ \\"
    odd = cells_of(runs_of("$a$ $b", KD, teacher=name))
    header = overlap_table(odd).splitlines()[0]
    assert shown in header
    assert "<script>" not in header
    figure = accuracy_over_overlap(odd.assign(teacher="$y$\n<b>"))
    assert figure.axes[0].get_title() == r"\$y\$ <b> → small"
    assert figure.legends[0].get_texts()[0].get_text() == r"\$a\$ \$b"


def test_compositions_and_paths_keep_their_names(tmp_path):
    composed, path, odd = "rkd>cross_entropy+lkd", "my folder/loss_a.py:Mine", "_x/$n$|`*.py:Mine"
    names = [composed, path, odd, "=cmd.py:Run"]
    cells = cells_of(*(runs_of(name, KD) for name in names), runs_of("student", STUDENT))
    escaped = [r"rkd&gt;cross\_entropy\+lkd", r"my folder/loss\_a.py:Mine", r"\_x/\$n\$\|\`\*.py:Mine"]
    header = overlap_table(cells).splitlines()[0]
    assert all(f"big → small: {name} |" in header for name in escaped)
    assert all(f"| {name} |" in details_table(cells) for name in escaped)
    assert all(f"| big → small | {name} | student |" in differences_table(cells) for name in escaped)
    assert set(legend_of(accuracy_over_overlap(cells))) == {
        *("student", "rkd>cross_entropy+lkd", "loss_a.py:Mine", r"\$n\$|`*.py:Mine", "=cmd.py:Run")
    }
    write_report(cells, "exp", tmp_path)
    for file, column in (("cells.csv", "method"), ("differences.csv", "method")):
        written = set(pd.read_csv(tmp_path / file)[column])
        assert {composed, path, odd, "'=cmd.py:Run"} <= written


def test_names_in_the_figure_are_short_and_different():
    names = ["a/loss.py:Mine", "b/loss.py:Mine", "_b/c.py:N+_hidden.py:N", "_hidden.py:N", f"x_{'y' * 60}>z"]
    cells = cells_of(*(runs_of(name, KD, teacher="models/net.py:Big", student="s" * 30) for name in names))
    figure = accuracy_over_overlap(cells)
    assert figure.axes[0].get_title() == f"net.py:Big → {'s' * 30}"
    assert set(legend_of(figure)) == {
        *("a/loss.py:Mine", "b/loss.py:Mine", "c.py:N+_hidden.py:N", " _hidden.py:N", f"x_{'y' * 18}…{'y' * 17}>z")
    }
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.width < figure.bbox.width
    assert box.y0 >= 0
    assert box.y1 <= figure.axes[0].get_tightbbox().y0


def test_many_methods_look_different_and_the_same_in_every_panel():
    names = [f"m{number:02}.py:N" for number in range(30)]
    groups = [runs_of(name, KD, teacher=teacher) for teacher in ("big", "huge") for name in names]
    figure = accuracy_over_overlap(cells_of(*groups, runs_of("student", STUDENT)))
    first, second = (
        {bar.get_label(): (bar.lines[0].get_color(), bar.lines[0].get_marker()) for bar in axes.containers}
        for axes in figure.axes
    )
    assert first == second
    assert len(set(first.values())) == 31
    assert len({first[name][0] for name in names[:12]}) == 12
    figure.canvas.draw()
    assert figure.axes[0].get_window_extent().height > 2 * figure.dpi  # inches, whatever the legend takes
    vanilla = first.pop("student")
    assert vanilla[0] not in {colour for colour, _ in first.values()}


def test_one_seed_has_no_interval():
    cells = cells_of(runs_of("student", {4: 0.6}), runs_of("kd", {4: 0.7}), runs_of("rkd", {4: 0.65}))
    assert cells["ci95"].isna().all()
    assert of(cells, method="kd")["difference_mean"] == pytest.approx(0.1)
    assert differences(cells)["ci95"].isna().all()
    assert "| kd | 50.00 | 70.00 (one seed) | +10.00 (one seed) | 1 (0, 0) |" in details_table(cells)
    assert "| rkd | kd | -5.00 (one seed) |" in differences_table(cells)


def test_origin_names_all_code_and_data_of_the_rows():
    later = [row | {"code_version": "v2", "data_digest": ""} for row in runs_of("kd", KD)]
    unused = [row | {"code_version": "v3"} for row in runs_of("rkd", KD, num_trials=2) if row["trial"] == 0]
    cells = cells_of(runs_of("student", STUDENT), later, unused)
    assert cells["code_versions"].tolist() == [["v1"], ["v2"], []]
    assert document(cells, "exp").endswith("\n\nSearch s; code version v1, v2; data digest d1.\n")
