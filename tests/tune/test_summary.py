"""Rows, table and remarks of results that are made by hand."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from refilled.config import RunConfig
from refilled.methods import SHORT_VANILLA
from refilled.presets import smoke
from tune.plan import Plan, make_plan
from tune.prepare import shared_caches
from tune.refits import _registered
from tune.studies.cells import Cell
from tune.studies.space import edges
from tune.summary import MethodResult, Refits, export_table, paired, remarks, rows, settings, table

SMALL, LARGE = "convnet-16", "convnet-32"
STUDENT = "student"
IN_ONE = "rkd+comparison>cross_entropy+lkd+crd"
# Test accuracies of two seeds.
TESTED = {
    ("none", "student"): (0.50, 0.60),
    (SMALL, "refilled"): (0.60, 0.68),
    (SMALL, "rkd"): (0.55, 0.59),
    (LARGE, "refilled"): (0.70, 0.70),
    (LARGE, "rkd"): (0.48, 0.60),
}
SHORT_TESTED = (0.40, 0.44)
T = 12.7062  # of 95 % at one degree of freedom: two values have the half width T x half their distance
KEYS = {
    "images_per_class",
    *("overlap", "teacher", "student", "method", "terms", "teacher_classes", "student_classes", "data_digest"),
    *("config", "trial", "trials", "val_accuracy", "seeds"),
    *("test_accuracy", "test_accuracy_mean", "test_accuracy_ci95"),
    *("difference_mean", "difference_ci95", "differences", "at_edge"),
    *("run_ids", "run_keys", "trial_run_id", "trial_run_key"),
    *("student_file", "export"),
}
OF_BASELINE = {
    f"baseline_{name}"
    for name in (
        *("config", "val_accuracy", "test_accuracy", "test_accuracy_mean", "test_accuracy_ci95"),
        *("short_test_accuracy", "run_ids", "run_keys", "short_run_ids", "short_run_keys"),
    )
}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("summary")


def planned(storage: Path, **changes: Any) -> Plan:
    asked = {"methods": (STUDENT, "refilled", "rkd"), "overlaps": (0.4,), "teachers": (SMALL, LARGE), "seeds": 2}
    return make_plan(dataclasses.replace(smoke(), storage=str(storage), **(asked | changes)))


def refits(cell: Cell, values: tuple[float, ...], name: str) -> Refits:
    found = Refits(dataclasses.replace(cell.run, val_fraction=0.0))
    for seed, value in enumerate(values):
        found.add(seed, value, f"key {name} {seed}", None if seed else f"id {name}")
    return found


def result(cell: Cell, *, short: bool = True, **changes: Any) -> MethodResult:
    name = f"{cell.teacher} {cell.method}"
    has_short = short and cell.method == STUDENT
    made = MethodResult(
        cell=cell,
        val_accuracy=0.01 * len(name),
        trial=len(name),
        trial_run_key=f"trial key {name}",
        trial_run_id=None,
        counts={"complete": 5, "pruned": 3, "failed": 1},
        refits=refits(cell, TESTED[cell.teacher, cell.method], name),
        short=refits(cell, SHORT_TESTED, f"{name} short") if has_short else None,
        edges=[],
    )
    return dataclasses.replace(made, **changes)


def test_a_row_for_every_method_in_every_cell_of_the_grid(storage: Path) -> None:
    plan = planned(storage)
    assert len(plan.cells) == 5  # one vanilla student for both teachers
    found = rows(plan, [result(cell) for cell in plan.cells])
    assert [(each["teacher"], each["method"]) for each in found] == [
        (teacher, method) for teacher in (SMALL, LARGE) for method in (STUDENT, "refilled", "rkd")
    ]
    for each in found:
        assert each.keys() == KEYS | OF_BASELINE
        assert (each["overlap"], each["student"]) == (0.4, "convnet-8")
        owner = f"{'none' if each['method'] == STUDENT else each['teacher']} {each['method']}"
        assert (each["val_accuracy"], each["trial"]) == (0.01 * len(owner), len(owner))
        assert (each["trial_run_key"], each["trial_run_id"]) == (f"trial key {owner}", None)
        assert each["run_keys"] == [f"key {owner} 0", f"key {owner} 1"]
        assert each["run_ids"] == [f"id {owner}", None]
        assert (each["seeds"], each["trials"]) == ([0, 1], {"complete": 5, "pruned": 3, "failed": 1})
        assert each["config"]["method"] == each["method"]
        assert each["config"]["epochs"] == ((0, 30) if each["method"] == STUDENT else (10, 20))
    assert [each["terms"] for each in found[:3]] == [
        "cross_entropy",
        "comparison>cross_entropy+weighted_lkd",
        "rkd>cross_entropy",
    ]
    assert json.loads(json.dumps(found, allow_nan=False))


def test_means_and_paired_differences_by_hand(storage: Path) -> None:
    plan = planned(storage)
    by_place = {(each["teacher"], each["method"]): each for each in rows(plan, [result(cell) for cell in plan.cells])}
    refilled = by_place[SMALL, "refilled"]
    assert refilled["test_accuracy"] == [0.60, 0.68]
    assert refilled["test_accuracy_mean"] == pytest.approx(0.64)
    assert refilled["test_accuracy_ci95"] == pytest.approx(T * 0.04, rel=1e-4)
    # 0.10 and 0.08 above the vanilla student of the same seed
    assert refilled["difference_mean"] == pytest.approx(0.09)
    assert refilled["difference_ci95"] == pytest.approx(T * 0.01, rel=1e-4)
    expected = {
        (SMALL, "student"): {"refilled": (-0.09, 0.01), "rkd": (-0.02, 0.03)},
        (SMALL, "refilled"): {"student": (0.09, 0.01), "rkd": (0.07, 0.02)},
        (SMALL, "rkd"): {"student": (0.02, 0.03), "refilled": (-0.07, 0.02)},
        (LARGE, "student"): {"refilled": (-0.15, 0.05), "rkd": (0.01, 0.01)},
        (LARGE, "refilled"): {"student": (0.15, 0.05), "rkd": (0.16, 0.06)},
        (LARGE, "rkd"): {"student": (-0.01, 0.01), "refilled": (-0.16, 0.06)},
    }
    for place, differences in expected.items():
        found = by_place[place]["differences"]
        assert list(found) == list(differences)
        for method, (mean, half_distance) in differences.items():
            assert found[method]["mean"] == pytest.approx(mean)
            assert found[method]["ci95"] == pytest.approx(T * half_distance, rel=1e-4)
        if place[1] != STUDENT:
            assert by_place[place]["difference_mean"] == found[STUDENT]["mean"]
            assert by_place[place]["difference_ci95"] == found[STUDENT]["ci95"]


def test_the_vanilla_student_is_the_baseline_of_every_row_of_its_cell_its_own_included(storage: Path) -> None:
    plan = planned(storage)
    found = rows(plan, [result(cell) for cell in plan.cells])
    for each in found:
        assert each["baseline_test_accuracy"] == [0.50, 0.60]
        assert each["baseline_test_accuracy_mean"] == pytest.approx(0.55)
        assert each["baseline_test_accuracy_ci95"] == pytest.approx(T * 0.05, rel=1e-4)
        assert each["baseline_val_accuracy"] == 0.01 * len("none student")
        assert each["baseline_config"]["method"] == STUDENT
        assert each["baseline_run_keys"] == ["key none student 0", "key none student 1"]
        assert each["baseline_run_ids"] == ["id none student", None]
        assert each["baseline_short_test_accuracy"] == [0.40, 0.44]
        assert each["baseline_short_run_keys"] == ["key none student short 0", "key none student short 1"]
        assert each["baseline_short_run_ids"] == ["id none student short", None]
        if each["method"] == STUDENT:
            assert each["run_keys"] == each["baseline_run_keys"]
            assert (each["difference_mean"], each["difference_ci95"]) == (0, 0)


def test_without_two_stages_in_the_search_the_short_student_is_the_student(storage: Path) -> None:
    plan = planned(storage, methods=(STUDENT, "refilled"))
    found = rows(plan, [result(cell, short=False) for cell in plan.cells])
    for each in found:
        assert each["baseline_short_test_accuracy"] == [0.50, 0.60]
        assert each["baseline_short_run_keys"] == each["baseline_run_keys"]
    assert SHORT_VANILLA not in printed(table(found, 2))


def test_rows_have_the_order_in_which_methods_were_asked_for(storage: Path) -> None:
    plan = planned(storage, methods=("rkd", STUDENT, "refilled"))
    found = rows(plan, [result(cell) for cell in plan.cells])
    assert [each["method"] for each in found] == ["rkd", STUDENT, "refilled"] * 2


def test_where_no_student_was_searched_its_fields_are_null(storage: Path) -> None:
    plan = planned(storage, methods=("refilled", "rkd"))
    found = rows(plan, [result(cell) for cell in plan.cells])
    assert len(found) == 4
    for each in found:
        assert each.keys() == KEYS | OF_BASELINE
        assert {each[name] for name in OF_BASELINE} == {None}
        assert (each["difference_mean"], each["difference_ci95"]) == (None, None)
    assert [list(each["differences"]) for each in found] == [["rkd"], ["refilled"]] * 2
    assert found[0]["differences"]["rkd"]["mean"] == pytest.approx(0.07)
    text = printed(table(found, 2))
    assert "+" not in text.partition("minus vanilla student")[2]


def test_a_method_without_a_result_has_no_row_and_takes_no_other_with_it(storage: Path) -> None:
    plan = planned(storage)
    failed = [cell for cell in plan.cells if (cell.teacher, cell.method) != (SMALL, "refilled")]
    found = rows(plan, [result(cell) for cell in failed])
    assert [(each["teacher"], each["method"]) for each in found] == [
        (SMALL, STUDENT),
        (SMALL, "rkd"),
        (LARGE, STUDENT),
        (LARGE, "refilled"),
        (LARGE, "rkd"),
    ]
    assert list(found[0]["differences"]) == ["rkd"]
    without_student = rows(plan, [result(cell) for cell in plan.cells if cell.method != STUDENT])
    assert [each["baseline_test_accuracy"] for each in without_student] == [None] * 4


def test_one_seed_has_differences_without_intervals(storage: Path) -> None:
    (place, *_) = planned(storage).places
    cells = planned(storage).at(place)
    one, other = refits(cells["refilled"], (0.75,), "a"), refits(cells["rkd"], (0.5,), "b")
    assert paired(one, other) == (0.25, None)
    assert paired(other, one) == (-0.25, None)


def printed(content: Any) -> str:
    text = io.StringIO()
    Console(file=text, width=220).print(content)
    return text.getvalue()


def test_the_table_has_a_line_a_method(storage: Path) -> None:
    plan = planned(storage)
    text = printed(table(rows(plan, [result(cell) for cell in plan.cells]), 2))
    lines = [[part.strip() for part in line.split("│")] for line in text.splitlines() if "│" in line]
    shown = [(each[2], each[3], each[5], each[7], each[8]) for each in lines]  # without overlap, settings, validation
    networks = [f"{teacher} > convnet-8" for teacher in (SMALL, LARGE)]
    assert [each for each in shown if each[1]] == [  # a second stage has a line of settings alone
        (networks[0], "student", "8", "55.00 ± 63.53", ""),
        ("", SHORT_VANILLA, "", "42.00 ± 25.41", ""),
        (networks[0], "refilled", "8", "64.00 ± 50.82", "+9.00 ± 12.71"),
        (networks[0], "rkd", "8", "57.00 ± 25.41", "+2.00 ± 38.12"),
        (networks[1], "student", "8", "55.00 ± 63.53", ""),
        ("", SHORT_VANILLA, "", "42.00 ± 25.41", ""),
        (networks[1], "refilled", "8", "70.00 ± 0.00", "+15.00 ± 63.53"),
        (networks[1], "rkd", "8", "54.00 ± 76.24", "-1.00 ± 12.71"),
    ]
    assert "2 seeds" in text
    assert "one seed, so no interval" in printed(table(rows(plan, [result(cell) for cell in plan.cells]), 1))


def test_the_table_and_the_remarks_name_the_images_of_a_class_where_they_differ(storage: Path) -> None:
    plan = planned(storage, images_per_class=("all", 25, 10), methods=(STUDENT, "refilled"))
    assert len(plan.cells) == 9  # one vanilla student of each number, for both teachers
    unequal = {"complete": 4, "pruned": 3, "failed": 9}
    results = [
        result(
            cell,
            short=cell.images_per_class is None,
            counts=unequal if (cell.teacher, cell.images_per_class) == (LARGE, 25) else {"complete": 8, "pruned": 0},
            edges=edges({"classifier.schedule.learning_rate": 2.0}, cell.run)
            if (cell.teacher, cell.images_per_class) in ((SMALL, 10), (SMALL, None))
            else [],
        )
        for cell in plan.cells
    ]
    found = rows(plan, results)
    assert [each["images_per_class"] for each in found[:6]] == [None, None, 25, 25, 10, 10]
    text = printed(table(found, 2))
    lines = [[part.strip() for part in line.split("│")] for line in text.splitlines() if "│" in line]
    networks = [f"{teacher} > convnet-8" for teacher in (SMALL, LARGE)]
    of_a_teacher = [("10", STUDENT), ("10", "refilled"), ("25", STUDENT), ("25", "refilled"), ("all", STUDENT)]
    assert [tuple(each[2:5]) for each in lines if each[4]] == [
        ("", "", SHORT_VANILLA) if name == SHORT_VANILLA else (network, images, name)
        for network in networks
        for images, name in (*of_a_teacher, ("", SHORT_VANILLA), ("all", "refilled"))
    ]
    assert text.count("├") == 5  # six cells
    assert "images a class" in text
    better = "classifier.schedule.learning_rate 2 is at the end of its range 0.01 .. 2; a better one may lie beyond."
    assert remarks(found) == [
        f"0.4 convnet-16>convnet-8 refilled: the winner's {better}",
        f"0.4 convnet-16>convnet-8 10 a class refilled: the winner's {better}",
        "0.4 convnet-32>convnet-8 25 a class: methods had unequal numbers of trials: student 8, refilled 7.",
    ]


def test_all_images_alone_need_no_column(storage: Path) -> None:
    plan = planned(storage)
    assert "images" not in printed(table(rows(plan, [result(cell) for cell in plan.cells]), 2))


def test_champions_of_few_and_of_all_images_have_different_names(storage: Path) -> None:
    plan = planned(storage, images_per_class=(25, "all"), methods=("refilled",), teachers=(SMALL,))
    names: list[str] = []
    recorder = SimpleNamespace(register=lambda _cell, _run, name: names.append(name))
    found = _registered(plan, [result(cell, student={"mlflow_model": True}) for cell in plan.cells], recorder)  # type: ignore[arg-type]
    assert names == [f"refilled-digits-convnet-8-from-{SMALL}-overlap-0.4{few}" for few in ("-25-a-class", "")]
    assert [list(each.registered.values()) for each in found] == [[name] for name in names]


def test_settings_are_those_that_are_searched_a_line_a_stage(storage: Path) -> None:
    plan = planned(storage, methods=(STUDENT, "refilled", "rkd", IN_ONE, "rkd>cross_entropy+rkd"))
    said = {cell.method: settings(cell.run.to_dict()).splitlines() for cell in plan.cells}
    assert said[STUDENT] == ["cosine 0.1, decay 0.0005"]
    assert said["refilled"] == ["τ 0.5, K̂ ∞, cosine 0.1", "λ 1, τ 1, cosine 0.1, decay 0.0005"]
    assert said["rkd"] == ["rkd angle ratio 2, cosine 0.1", "cosine 0.1, decay 0.0005"]
    assert said[IN_ONE] == [
        "rkd angle ratio 2, weight 10, τ 0.5, K̂ ∞, cosine 0.1",
        "λ 1, τ 1, crd weight 0.8, crd τ 0.07, cosine 0.1, decay 0.0005",
    ]
    # A term that leads a stage has no weight that is searched, in another stage neither.
    assert said["rkd>cross_entropy+rkd"][1] == "rkd angle ratio 2, cosine 0.1, decay 0.0005"


def test_runs_that_would_share_an_embedding_cache_are_those_that_ask_the_same_teacher(storage: Path) -> None:
    def epochs_by_cache(**changes: Any) -> list[int]:
        plan = planned(storage, **changes)
        return [each.epochs for each in shared_caches([(cell.run, 3) for cell in plan.cells], plan.storage).values()]

    embedding, classifier = smoke().run.epochs
    of_a_pair = 3 * (embedding + classifier) + 3 * embedding  # of refilled; of rkd, whose classifier asks no teacher
    assert epochs_by_cache() == [of_a_pair] * 2  # a cache of each teacher
    assert epochs_by_cache(students=("convnet-8", "convnet-4")) == [2 * of_a_pair] * 2
    assert len(epochs_by_cache(overlaps=(0.0, 0.4))) == 4  # of other images
    assert epochs_by_cache(methods=(STUDENT, "fitnet")) == []  # which no cache can serve


def test_a_winner_at_the_end_of_a_range_is_remarked(storage: Path) -> None:
    plan = planned(storage, teachers=(LARGE,))
    student, refilled, rkd = plan.cells
    rate, ratio = "classifier.schedule.learning_rate", "terms.rkd.angle_ratio"
    results = [
        result(student, edges=edges({rate: 0.1}, student.run)),
        result(refilled, edges=edges({rate: 2.0}, refilled.run)),
        result(rkd, edges=edges({rate: 0.01, ratio: 0.5, "optimizer.weight_decay": 1e-4}, rkd.run)),
    ]
    found = rows(plan, results)
    assert found[0]["at_edge"] == []
    assert found[1]["at_edge"] == [{"name": rate, "value": 2.0, "low": 0.01, "high": 2.0}]
    assert {each["name"] for each in found[2]["at_edge"]} == {rate, ratio}
    where = "0.4 convnet-32>convnet-8"
    better = "a better one may lie beyond."
    assert sorted(remarks(found)) == [
        f"{where} refilled: the winner's {rate} 2 is at the end of its range 0.01 .. 2; {better}",
        f"{where} rkd: the winner's {rate} 0.01 is at the end of its range 0.01 .. 2; {better}",
        f"{where} rkd: the winner's {ratio} 0.5 is at the end of its range 0.5 .. 4; {better}",
    ]


def test_unequal_numbers_of_trials_are_remarked_where_they_are(storage: Path) -> None:
    plan = planned(storage)
    assert remarks(rows(plan, [result(cell) for cell in plan.cells])) == []
    fewer = {"complete": 4, "pruned": 3, "failed": 9}
    alike = {"complete": 8, "pruned": 0, "failed": 0}  # as many that count
    results = [
        result(cell, counts=fewer if cell.teacher == LARGE and cell.method == "rkd" else alike)
        if cell.method == "rkd"
        else result(cell)
        for cell in plan.cells
    ]
    assert remarks(rows(plan, results)) == [
        "0.4 convnet-32>convnet-8: methods had unequal numbers of trials: student 8, refilled 8, rkd 7."
    ]


class Names:
    """Takes what would be registered."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, str]] = []

    def register(self, cell: Cell, run: RunConfig, name: str) -> None:
        self.taken.append((name, cell.name))


def test_the_champion_of_a_cell_is_the_best_by_validation_whatever_the_test_says(storage: Path) -> None:
    plan, names = planned(storage), Names()
    best = {"none student": 0.8, f"{SMALL} rkd": 0.7, f"{LARGE} rkd": 0.9}
    tested = {**TESTED, (LARGE, "rkd"): (0.01, 0.01)}
    results = []
    for cell in plan.cells:
        where = f"{cell.teacher} {cell.method}"
        of_cell = refits(cell, tested[cell.teacher, cell.method], where)
        student = {"mlflow_model": True}
        results.append(result(cell, val_accuracy=best.get(where, 0.1), refits=of_cell, student=student))
    found = _registered(plan, results, names)  # type: ignore[arg-type]
    of_large, of_small = (f"refilled-digits-convnet-8-from-{teacher}-overlap-0.4" for teacher in (LARGE, SMALL))
    assert names.taken == [(of_small, "0.4 none>convnet-8 student"), (of_large, f"0.4 {LARGE}>convnet-8 rkd")]
    said = {each.cell.name: {place.teacher: name for place, name in each.registered.items()} for each in found}
    assert {name: each for name, each in said.items() if each} == {
        "0.4 none>convnet-8 student": {SMALL: of_small},
        f"0.4 {LARGE}>convnet-8 rkd": {LARGE: of_large},
    }
    without = [dataclasses.replace(each, student={"mlflow_model": False}) for each in results]
    assert all(not each.registered for each in _registered(plan, without, names))  # type: ignore[arg-type]
    assert len(names.taken) == 2


def test_an_exported_file_that_differs_is_remarked_and_in_the_table(storage: Path) -> None:
    plan = planned(storage, export=("torch", "onnx"))
    latency = {size: {"p50_ms": 1.25, "p95_ms": 2.5, "num_rounds": 20} for size in ("1", "32")}
    file = {"file": "student.pt2", "precision": "float32", "file_bytes": 2048, "test_accuracy": 0.875}
    file |= {"max_logit_difference": 0.5, "latency": latency, "num_threads": 3, "machine": "abacus"}
    sizes = {"parameters": 1234, "multiply_adds": 5678, "file_bytes": 99}
    of_run = {"folder": "runs/abc-0", "seed": 0, "mlflow_model": True}
    exported = {"torch": file, "onnx": {"error": "The network cannot be exported to onnx (a reason)."}}
    cell = next(cell for cell in plan.cells if cell.teacher == LARGE)
    (row,) = rows(plan, [result(cell, student={**sizes, **of_run, "export": exported})])
    assert row["student_file"] | sizes == row["student_file"]
    assert row["export"] == exported
    said = "\n".join(remarks([row]))
    assert "scores of its torch file differ from the student's by up to 0.5" in said
    assert "refilled: The network cannot be exported to onnx (a reason)." in said
    close = file | {"max_logit_difference": 5e-5}
    assert not remarks([row | {"export": {"torch": close}}])
    assert not remarks([row | {"export": {"torch": file | {"precision": "bfloat16"}}}])
    stream = io.StringIO()
    Console(file=stream, width=200).print(export_table([row]))
    for words in ("1,234", "5,678", "87.50", "1.25 / 2.5", "3 thread(s), abacus", "student.pt2", "5.0e-01"):
        assert words in stream.getvalue()
