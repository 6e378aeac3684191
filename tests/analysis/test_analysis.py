import csv
import math
import sqlite3
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from analysis_runs import Search

from analysis.plots import accuracy_over_overlap, save_figure
from analysis.report import app
from analysis.runs import ALL_SEARCHES, fetch_runs
from analysis.summary import summarise
from analysis.tables import details_table, differences_table, mean_with_interval, overlap_table
from refilled.command import run_app
from refilled.errors import UserError
from refilled.methods import SHORT_VANILLA
from refilled.storage import Storage
from tune.tracking.tracker import Tracker, resolve_tracking_uri

REPORT = Path(__file__).parents[2] / "analysis" / "report.py"
FILES = ["accuracy_over_overlap.pdf", "accuracy_over_overlap.png", "cells.csv", "differences.csv", "overlap_table.md"]
TESTS = {
    "refilled": {0.0: [0.70, 0.72, 0.74], 0.4: [0.80]},
    "student": {0.0: [0.69, 0.70, 0.68], 0.4: [0.79]},
}


def write_search(tracker, key, folder):
    tracker.start_search(key, name=key, params={}, tags={"kind": "search"})
    search = Search(tracker, folder)
    for overlap in (0.0, 0.4):
        search.run(kind="trial", overlap=overlap, trial=0, val=0.6)
        search.run(kind="trial", overlap=overlap, trial=1, val=0.75, winner="true")
        search.run(kind="trial", overlap=overlap, trial=2, val=0.95, status="KILLED")
        search.run(kind="trial", overlap=overlap, trial=3, status="FAILED")
        for method, results in TESTS.items():
            for seed, accuracy in enumerate(results[overlap]):
                search.run(kind="refit", overlap=overlap, method=method, seed=seed, test=accuracy)
    search.run(kind="trial", overlap=0.0, method="student", trial=0, val=0.9, winner="true")
    search.run(kind="refit", overlap=0.0, method="student", role="baseline_short", seed=0, test=0.5)
    search.run(kind="refit", overlap=0.0, seed=7, test=0.1, status="KILLED")
    search.run(kind="refit", overlap=0.0, seed=8)
    search.run(kind="teacher", overlap=0.0, student="tiny", seed=0, test=0.3)  # neither a trial nor a refit
    tracker.finish_search(status="FINISHED")


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """A store with the experiment `exp|1`: an older search `old` without refits, and the search `new`."""
    storage = Storage.open(tmp_path_factory.mktemp("storage"))
    uri, folder = resolve_tracking_uri(None, storage), storage.root
    with Tracker(uri, "exp|1", storage) as tracker:
        tracker.start_search("old", name="old", params={}, tags={"kind": "search"})
        Search(tracker, folder / "old").run(kind="trial", overlap=0.0, trial=0, val=0.2)
        tracker.finish_search(status="FINISHED")
        assert tracker.flush(30)
    with Tracker(uri, "exp|1", storage) as tracker:
        write_search(tracker, "new", folder / "new")
        assert tracker.flush(30)
    Tracker(uri, "empty", storage).close()
    return uri


@pytest.fixture(scope="module")
def runs(uri):
    return fetch_runs(uri, "exp|1")


@pytest.fixture(scope="module")
def cells(runs):
    return summarise(runs)


def test_fetch_runs_is_tidy(runs):
    assert len(runs) == 21
    assert runs["run_id"].is_unique
    assert set(runs["search_key"]) == {"new"}
    assert runs["winner"].sum() == 3
    winner = runs[(runs["winner"]) & (runs["overlap"] == 0.4)].iloc[0]
    assert (winner["val_accuracy"], winner["trial"], winner["status"]) == (0.75, 1, "FINISHED")
    assert math.isnan(winner["test_accuracy"])
    assert winner["seed"] is pd.NA
    assert (winner["teacher"], winner["cell"]) == ("big|net", "0.4-big|net-small")
    assert set(runs["params.embedding.temperature"]) == {"4.0"}
    assert set(runs["params.classifier.distill_weight"]) == {"none"}
    assert str(runs["start_time"].dtype).endswith("UTC]")


def test_fetch_runs_chooses_the_search(uri, monkeypatch):
    assert len(fetch_runs(uri, "exp|1", search_key="old")) == 1
    monkeypatch.setattr("analysis.runs._PAGE", 4)  # several pages
    assert len(fetch_runs(uri, "exp|1", search_key=ALL_SEARCHES)) == 22


@pytest.mark.parametrize(
    ("experiment", "search", "sentence"),
    [
        ("exp", None, "has no experiment 'exp'; it has 'empty', 'exp|1'"),
        ('it\'s "this"', None, "has no experiment"),
        ("exp|1", "x' OR '1", "has no search \"x' OR '1\"; it has old, new"),
        ("empty", None, "holds no search"),
    ],
)
def test_fetch_runs_names_what_there_is(uri, experiment, search, sentence):
    with pytest.raises(UserError) as caught:
        fetch_runs(uri, experiment, search_key=search)
    assert sentence in str(caught.value).replace("'exp|1', 'empty'", "'empty', 'exp|1'")


def test_reading_creates_nothing(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        fetch_runs(f"sqlite:///{tmp_path}/none/mlflow.db", "e")
    other = tmp_path / "other.db"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE studies (id INTEGER)")
    connection.close()
    content = other.read_bytes()
    with pytest.raises(UserError, match="holds no MLflow tables"):
        fetch_runs(f"sqlite:///{other}", "e")
    assert other.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["other.db"]


def test_summarise_one_row_a_method_of_a_cell(cells, runs):
    assert cells["overlap"].tolist() == [0.0, 0.0, 0.0, 0.4, 0.4]
    assert cells["method"].tolist() == ["student", SHORT_VANILLA, "refilled", "student", "refilled"]
    assert set(zip(cells["teacher"], cells["student"], strict=True)) == {("big|net", "small")}
    student, short, low, _, high = (row for _, row in cells.iterrows())
    assert low["val_accuracy"] == 0.75
    assert low["test_accuracy"] == [0.70, 0.72, 0.74]
    assert low["seeds"] == [0, 1, 2]
    assert low["mean"] == pytest.approx(0.72)
    assert low["ci95"] == pytest.approx(0.02 * 2.484138, abs=1e-7)
    # Pairs by seed: 0.01, 0.02, 0.06; mean 0.03, standard deviation sqrt(0.0007).
    assert low["num_pairs"] == 3
    assert low["difference_mean"] == pytest.approx(0.03)
    assert low["difference_ci95"] == pytest.approx(4.302653 * math.sqrt(0.0007 / 3), abs=1e-7)
    assert (low["num_trials"], low["num_pruned"], low["num_failed"]) == (4, 1, 1)
    by_id = runs.set_index("run_id")
    assert by_id.loc[low["run_ids"], "kind"].tolist() == ["trial", "refit", "refit", "refit"]
    assert by_id.loc[low["run_ids"][0], "winner"]
    assert (low["code_versions"], low["data_digests"]) == (["abc"], ["d1"])
    assert (student["val_accuracy"], student["mean"]) == (0.9, pytest.approx(0.69))
    assert (student["num_trials"], student["num_pairs"]) == (1, 0)
    assert by_id.loc[student["run_ids"][1:], "test_accuracy"].tolist() == [0.69, 0.70, 0.68]
    assert (short["test_accuracy"], short["num_trials"], short["num_pairs"]) == ([0.5], 0, 1)
    assert short["difference_mean"] == pytest.approx(-0.19)
    assert math.isnan(short["val_accuracy"])
    assert high["difference_mean"] == pytest.approx(0.01)
    assert math.isnan(high["ci95"])
    assert math.isnan(high["difference_ci95"])


def test_pairs_are_by_seed_and_a_later_refit_replaces_an_earlier_one(runs):
    shuffled = runs.sample(frac=1.0, random_state=0)
    pd.testing.assert_frame_equal(summarise(shuffled), summarise(runs))
    refits = (runs["kind"] == "refit") & (runs["overlap"] == 0.4) & (runs["method"] == "refilled")
    again = runs[refits].assign(
        run_id="later", test_accuracy=0.9, start_time=lambda table: table["start_time"] + pd.Timedelta(seconds=1)
    )
    cells = summarise(pd.concat([again, runs], ignore_index=True))
    assert cells["test_accuracy"].tolist()[4] == [0.9]
    assert cells["run_ids"].tolist()[4][1:] == ["later"]
    assert cells["difference_mean"].tolist()[4] == pytest.approx(0.11)


def test_refits_of_an_earlier_winner_are_in_no_mean(runs):
    """A search that went on found another winner, which was refitted with fewer seeds; as summary.json says it."""
    of_cell = (runs["overlap"] == 0.0) & (runs["method"] == "refilled")
    earlier = runs[of_cell & (runs["kind"] == "refit")].assign(**{"params.embedding.temperature": "0.5"})
    both = pd.concat([runs[~(of_cell & (runs["kind"] == "refit") & (runs["seed"] > 0))], earlier], ignore_index=True)
    low = summarise(both).query("overlap == 0.0 and method == 'refilled'").iloc[0]
    assert low["test_accuracy"] == [0.70]
    assert low["seeds"] == [0]
    assert low["num_pairs"] == 1
    older = both.assign(**{"params.new_setting": [None] * len(both)})
    older.loc[older["winner"], "params.new_setting"] = "1"  # of refits by a version that had no such setting
    assert summarise(older)["test_accuracy"].tolist() == summarise(both)["test_accuracy"].tolist()


def test_refits_of_the_short_vanilla_student_are_those_of_its_winner(runs):
    short = runs["role"] == "baseline_short"
    other = runs[short].assign(**{"params.embedding.temperature": "0.5", "test_accuracy": 0.1, "run_id": "other"})
    cells = summarise(pd.concat([runs, other], ignore_index=True))
    assert cells[cells["method"] == SHORT_VANILLA]["test_accuracy"].tolist() == [[0.5]]


def test_cells_without_a_finished_refit_stay_visible(runs):
    missing = runs[~((runs["overlap"] == 0.4) & (runs["kind"] == "refit"))]
    cells = summarise(missing)
    assert cells["test_accuracy"].tolist()[3] == []
    assert "| 40 % | - | - | - |" in overlap_table(cells)
    with pytest.raises(UserError, match="no finished refit"):
        summarise(runs[runs["kind"] == "trial"])
    with pytest.raises(UserError, match="no finished refit"):
        summarise(runs.head(0))


def test_overlap_table(cells):
    lines = overlap_table(cells).splitlines()
    assert lines[0] == (
        r"| overlap | big\|net → small: student | big\|net → small: student, classifier epochs only "
        r"| big\|net → small: refilled |"
    )
    assert lines[2] == "| 0 % | 69.00 ± 2.48 (n = 3) | 50.00 (one seed) | 72.00 ± 4.97 (n = 3) |"
    assert lines[3] == "| 40 % | 79.00 (one seed) | - | 80.00 (one seed) |"
    details = details_table(cells)
    assert "| refilled | 75.00 | 72.00 ± 4.97 (n = 3) | +3.00 ± 6.57 (n = 3) | 4 (1, 1) |" in details
    assert "| student | 90.00 | 69.00 ± 2.48 (n = 3) | - | 1 (0, 0) |" in details
    assert mean_with_interval(-0.01, 0.002, 2, signed=True) == "-1.00 ± 0.20 (n = 2)"


def test_several_searches_are_not_mixed(uri, runs):
    both = fetch_runs(uri, "exp|1", search_key=ALL_SEARCHES)
    cells = summarise(both)
    assert cells["search_key"].tolist() == ["new"] * 5 + ["old"]
    for draw in (overlap_table, differences_table, accuracy_over_overlap):
        with pytest.raises(ValueError, match="one search"):
            draw(cells)


def test_the_figure_carries_the_data(cells, tmp_path):
    other = cells.assign(student="tiny", mean=[0.5, 0.4, 0.6, 0.5, 0.7])
    figure = accuracy_over_overlap(pd.concat([cells, other], ignore_index=True))
    first, second = figure.axes
    assert (first.get_title(), second.get_title()) == ("big|net → small", "big|net → tiny")
    assert list(first.get_xticks()) == pytest.approx([0.0, 40.0])
    vanilla, short, method = first.containers
    assert [line.get_label() for line in first.containers] == ["student", SHORT_VANILLA, "refilled"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["student", SHORT_VANILLA, "refilled"]
    # Three methods side by side, 4 % of the 40 between ratios apart.
    assert list(vanilla.lines[0].get_xdata()) == pytest.approx([-1.6, 38.4])
    assert list(short.lines[0].get_xdata()) == pytest.approx([0.0])
    assert list(method.lines[0].get_xdata()) == pytest.approx([1.6, 41.6])
    assert list(method.lines[0].get_ydata()) == pytest.approx([72.0, 80.0])
    assert list(vanilla.lines[0].get_ydata()) == pytest.approx([69.0, 79.0])
    assert list(second.containers[2].lines[0].get_ydata()) == pytest.approx([60.0, 70.0])
    assert (vanilla.lines[0].get_linestyle(), method.lines[0].get_linestyle()) == ("--", "-")
    bar = method.lines[2][0].get_segments()[0]
    assert [point[1] for point in bar] == pytest.approx([72.0 - 4.968276, 72.0 + 4.968276], abs=1e-5)
    png, pdf = save_figure(figure, tmp_path / "figure.v1")
    assert (png.name, pdf.name) == ("figure.v1.png", "figure.v1.pdf")
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert pdf.read_bytes()[:4] == b"%PDF"
    content = pdf.read_bytes()
    assert b"CreationDate" not in content
    save_figure(figure, tmp_path / "figure.v1")
    assert pdf.read_bytes() == content


def test_report_command(uri, tmp_path, runs):
    """As a user calls it: the file by its path."""
    out = tmp_path / "out"
    command = [sys.executable, str(REPORT), "--experiment", "exp|1", "--tracking-uri", uri, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "72.00 ± 4.97 (n = 3)" in done.stdout
    assert all(str(out / name) in done.stdout for name in FILES)
    assert sorted(path.name for path in out.iterdir()) == FILES
    text = (out / "overlap_table.md").read_text()
    assert text.startswith("# exp\\|1\n")
    assert "Search new; code version abc; data digest d1." in text
    with (out / "cells.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["student", SHORT_VANILLA, "refilled", "student", "refilled"]
    low = rows[2]
    assert low["test_accuracy"] == "0.7 0.72 0.74"
    assert set(low["run_ids"].split()) <= set(runs["run_id"])
    with (out / "differences.csv").open(newline="") as file:
        pairs = [(row["overlap"], row["method"], row["other"], row["num_pairs"]) for row in csv.DictReader(file)]
    assert pairs == [
        ("0.0", SHORT_VANILLA, "student", "1"),
        ("0.0", "refilled", "student", "3"),
        ("0.0", "refilled", SHORT_VANILLA, "1"),
        ("0.4", "refilled", "student", "1"),
    ]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--experiment", "other"], "has no experiment 'other'"),
        (["--search", "old"], "no finished refit"),
        (["--search", "nothing"], "has no search 'nothing'"),
        (["--search", "all"], "a report shows one search"),
        (["--tracking-uri", "http://127.0.0.1:9"], "tracking_uri: MLflow at http://127.0.0.1:9"),
        (["--tracking-uri", "sqlite:///none.db"], "there is no file none.db"),
        (["--out", "file"], "out: must be a folder"),
        (["--out", "file/inner"], "out: file/inner cannot be written"),
        (["--wrong", "option"], "--wrong"),
    ],
)
def test_report_errors_are_one_sentence_and_nothing_is_written(uri, tmp_path, monkeypatch, capsys, options, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    given = {"--experiment": "exp|1", "--tracking-uri": uri, "--out": "out"} | dict([options])
    assert run_app(app, [part for option in given.items() for part in option]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert sentence in shown.err
    assert shown.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
