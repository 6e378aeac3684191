from __future__ import annotations

import dataclasses
import io
import json
import random
from pathlib import Path
from typing import Any

import optuna
import pytest
from outcomes import row_of
from rich.console import Console

from refilled.config import EmbeddingCacheConfig
from refilled.presets import smoke
from refilled.stages import stages_of
from refilled.teacher import pretraining_run, teacher_folder
from refilled.timing import Part, epoch_part, image_part, step_part
from tune.backend.cluster import Resources
from tune.forecast.forecast import (
    END_S,
    EXPORT_S,
    FIRST_STUDENT_S,
    ROW_S,
    START_S,
    STUDENT_S,
    TRIAL_S,
    TUNE_START_S,
    _Done,
    _pack,
    forecast,
    share_kept,
    trials_left,
)
from tune.forecast.measure import Timings
from tune.forecast.report import Comparison, format_hours
from tune.forecast.workload import TEST_SHARE, Work, Workload
from tune.plan import Plan, make_plan
from tune.studies.pruning import make_pruner

optuna.logging.set_verbosity(optuna.logging.WARNING)

# By kind and network, so that sums tell what they are made of: seconds of a step, of an image, and of an epoch's end.
STEP_S = {("convnet-8", "embedding"): 0.001, ("convnet-8", "classifier"): 0.004, ("convnet-32", "classifier"): 0.016}
IMAGE_S = {"convnet-8": 1e-5, "convnet-16": 2e-5, "convnet-32": 4e-5}
EPOCH_S = 0.032


def resources(slots: int = 1, **changes: Any) -> Resources:
    base = Resources(num_workers=1, cpus_per_worker=1.0, gpus_per_worker=0.0, slots=slots, slots_now=slots)
    return dataclasses.replace(base, **changes)


def planned(storage: Path, **changes: Any) -> Plan:
    run = dataclasses.replace(smoke().run, epochs=(2, 4), teacher_epochs=5, **changes.pop("run", {}))
    settings = {"overlaps": (1.0,), "trials": 4, "seeds": 2, "pruner": "none", "storage": str(storage)} | changes
    return make_plan(dataclasses.replace(smoke(), run=run, **settings))


def seconds_of(part: Part) -> float:
    if part.kind == "step":
        return STEP_S.get((part.run.student, str(part.stage)), 0.008)
    return IMAGE_S.get(part.run.student, 1e-5) if part.kind == "image" else EPOCH_S


def timings(plan: Plan, worker_start_s: float = 0.0, num_workers: int = 1) -> Timings:
    parts = Workload(plan, num_workers).calls()
    return Timings({part: seconds_of(part) for part in parts}, (), worker_start_s, took_s=0.0)


def test_a_trial_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    workload = Workload(plan, 1)
    student, refilled = plan.cells
    train, validation, means_of = workload._images(refilled.run)
    assert (train + validation, means_of) == (676, 5 * 50)
    steps = -(-train // 64)
    embedding, classifier = (step_part(refilled.run, stage) for stage in stages_of(refilled.run))
    forward = image_part(refilled.run)
    an_epoch = workload.an_epoch(refilled)
    assert an_epoch["embedding"] == pytest.approx({embedding: steps, forward: validation + means_of})
    assert an_epoch["classifier"] == pytest.approx({classifier: steps, forward: validation})
    method = workload.trial(refilled)
    assert method.num_epochs == 6
    assert method.calls == pytest.approx(
        {
            embedding: 2 * steps,
            classifier: 4 * steps,
            forward: 6 * validation + 2 * means_of,
            epoch_part(refilled.run): 6,
        }
    )
    (shared,) = workload.shared(False)  # prototypes and a cache: 4 trials of 6 epochs ask more than 9 views
    assert shared.calls == {image_part(pretraining_run(refilled.run)): 10 * train}
    assert workload.trial(student).num_epochs == 6
    assert all(part.run.student == "convnet-8" for part in workload.trial(student).calls)


def test_without_a_cache_the_teacher_runs_in_every_step_that_asks_it(tmp_path: Path) -> None:
    plan = planned(tmp_path, trials=1)  # 6 epochs ask the teacher less often than 9 views
    workload, cell = Workload(plan, 1), plan.cells[1]
    teacher, train = image_part(pretraining_run(cell.run)), workload._images(cell.run)[0]
    assert workload.trial(cell).calls[teacher] == 6 * train
    assert [work.calls for work in workload.shared(False)] == [{teacher: train}]


def test_a_method_that_needs_feature_maps_is_timed_with_the_teacher_live(tmp_path: Path) -> None:
    plan = planned(tmp_path, methods=("student", "at"), trials=100)
    workload, cell = Workload(plan, 1), plan.cells[1]
    (stage,) = stages_of(cell.run)
    assert set(workload.trial(cell).calls) == {step_part(cell.run, stage), image_part(cell.run), epoch_part(cell.run)}
    train = workload._images(cell.run)[0]
    assert [work.calls for work in workload.shared(False)] == [{image_part(pretraining_run(cell.run)): train}]


def test_methods_that_share_a_stage_share_its_part(tmp_path: Path) -> None:
    plan = planned(tmp_path, methods=("student", "refilled", "refilled_minus", "rkd", "crd"))
    steps = [part for part in Workload(plan, 1).calls() if part.kind == "step"]
    # The teacher's; comparison and rkd; cross_entropy alone and with lkd, weighted_lkd and crd.
    assert len(steps) == len({part.name for part in steps}) == 1 + 2 + 4


def test_a_worker_of_several_does_its_share(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    cell = plan.cells[1]
    train, validation, _ = Workload(plan, 1)._images(cell.run)
    calls = Workload(plan, 4).an_epoch(cell)["classifier"]
    steps = {part: count for part, count in calls.items() if part.kind == "step"}
    assert [(part.run.global_batch_size, count) for part, count in steps.items()] == [(16, -(-train // 64))]
    assert [count for part, count in calls.items() if part.kind == "image"] == [validation / 4]
    (shared,) = Workload(plan, 4).shared(False)
    assert list(shared.calls.values()) == [10 * train / 4]


def test_networks_of_the_users_are_forecast(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_NETWORK)
    name = f"{tmp_path}/own.py:small"
    plan = planned(tmp_path, teachers=(name,), students=(name,))
    assert forecast(plan, resources(), timings(plan)).total_hours > 0


OWN_NETWORK = """
from refilled.models import build_model

def small(num_classes, in_channels, image_size, dropout):
    shape = {"in_channels": in_channels, "image_size": image_size}
    return build_model("convnet-8", num_classes=num_classes, dropout=dropout, seed=0, **shape)
"""


def test_a_cache_is_built_where_the_search_would_build_it(tmp_path: Path) -> None:
    def is_built(trials: int, **cache: Any) -> bool:
        plan = planned(tmp_path, trials=trials, run={"embedding_cache": EmbeddingCacheConfig(**cache)})
        workload = Workload(plan, 1)
        (shared,) = workload.shared(False)
        return list(shared.calls.values()) == [10 * workload._images(plan.cells[1].run)[0]]

    assert not is_built(1)  # 6 epochs ask the teacher less often than 9 views
    assert is_built(2)
    assert is_built(1, mode="cached")
    assert not is_built(9, mode="live")
    assert not is_built(9, max_gib=1e-6)


def test_teachers_that_are_there_and_epochs_that_are_done_do_not_count(tmp_path: Path) -> None:
    plan = planned(tmp_path, overlaps=(0.0, 1.0), teachers=("convnet-8", "convnet-16"))
    workload = Workload(plan, 1)
    assert [work.num_epochs for work in workload.teachers(False)] == [5, 5]  # one for both overlaps
    folder = teacher_folder(plan.cells[1].run, plan.storage)  # of the first one
    folder.path.mkdir(parents=True)
    for epoch in (1, 2):
        folder.append_row(row_of(epoch))
    assert [work.num_epochs for work in workload.teachers(False)] == [3, 5]
    for epoch in (3, 4, 5):
        folder.append_row(row_of(epoch))
    folder.finish(row_of(5), {})
    assert [work.num_epochs for work in workload.teachers(False)] == [5]
    assert [work.num_epochs for work in workload.teachers(True)] == [5, 5]


def test_refits_are_of_winner_vanilla_and_short_vanilla_and_shared_by_teachers(tmp_path: Path) -> None:
    plan = planned(tmp_path, teachers=("convnet-8", "convnet-16"))
    works = Workload(plan, 1).refits()
    assert sorted(work.num_epochs for work in works) == [4, 4, 6, 6, 6, 6, 6, 6]  # 2 seeds; 4 of the two methods
    short, run = next(work for work in works if work.num_epochs == 4), plan.cells[0].run
    (stage,) = stages_of(run)
    assert short.calls == pytest.approx(  # no validation, but a test
        {step_part(run, stage): 4 * -(-676 // 64), image_part(run): TEST_SHARE * 676, epoch_part(run): 4}
    )
    alone = planned(tmp_path, methods=("student",))
    assert [work.num_epochs for work in Workload(alone, 1).refits()] == [6, 6]
    beside = planned(tmp_path, methods=("student", "kd"))  # whose one stage is no shorter
    assert [work.num_epochs for work in Workload(beside, 1).refits()] == [6, 6, 6, 6]


def test_what_is_done_is_not_forecast(tmp_path: Path) -> None:
    plan = planned(tmp_path, teachers=("convnet-8", "convnet-16"))
    student, first, second = (cell.name for cell in plan.cells)
    workload = Workload(plan, 1, {student, second})
    assert [work.num_epochs for work in workload.refits()] == [6, 6]
    assert [work.num_epochs for work in workload.teachers(True)] == [5]
    assert len(workload.shared(True)) == 1
    trials = dict.fromkeys((student, first, second), plan.search.trials)
    found = forecast(plan, resources(), timings(plan, worker_start_s=3.0), done_trials=trials, done=set(trials))
    assert found.epochs == {"teachers": 0, "trials": 0, "teachers on all images": 0, "refits": 0, "students": 0}
    assert {phase: round(3600 * hours, 6) for phase, hours in found.hours.items() if hours} == {
        "start": START_S,
        "students": END_S,
    }


def test_phases_add_up_to_the_hours_and_the_cost(tmp_path: Path) -> None:
    plan = planned(tmp_path, price_per_hour=7.2)
    timed = timings(plan, worker_start_s=3.0)
    found = forecast(plan, resources(), timed)
    assert found.epochs == {"teachers": 5, "trials": 48, "teachers on all images": 5, "refits": 32, "students": 0}
    workload = Workload(plan, 1)

    def seconds(works: list[Work]) -> float:
        return sum(timed.seconds_of(work.calls) for work in works)

    teachers_s = seconds([*workload.teachers(False), *workload.shared(False)])
    assert 3600 * found.hours["teachers"] == pytest.approx(3.0 + teachers_s)
    trials = [workload.trial(cell) for cell in plan.cells] * 4
    trials_s = seconds(trials) + 8 * TRIAL_S + 48 * ROW_S
    assert 3600 * found.hours["trials"] == pytest.approx(TUNE_START_S + 3.0 + trials_s)
    again_s = seconds([*workload.teachers(True), *workload.shared(True)])
    assert 3600 * found.hours["teachers on all images"] == pytest.approx(3.0 + again_s)
    assert 3600 * found.hours["refits"] == pytest.approx(seconds(workload.refits()))
    assert 3600 * found.hours["students"] == pytest.approx(END_S + FIRST_STUDENT_S + 2 * STUDENT_S)
    exporting = dataclasses.replace(plan, search=dataclasses.replace(plan.search, export=("onnx", "torch")))
    longer = forecast(exporting, resources(), timed).hours["students"] - found.hours["students"]
    assert 3600 * longer == pytest.approx(2 * 2 * EXPORT_S)
    assert 3600 * found.hours["start"] == START_S
    assert found.total_hours == pytest.approx(sum(found.hours.values()))
    assert found.cost == pytest.approx(7.2 * found.total_hours)
    assert forecast(planned(tmp_path), resources(), timings(plan)).cost is None
    assert 3600 * forecast(plan, resources(), timings(plan), elapsed_s=40.0).hours["start"] == pytest.approx(40.0)
    (stage_s,) = found.epoch_s[plan.cells[0].name].values()
    train, validation, _ = workload._images(plan.cells[0].run)
    assert stage_s == pytest.approx(-(-train // 64) * 0.004 + validation * 1e-5)


def test_more_slots_take_less_time_and_no_fewer_epochs(tmp_path: Path) -> None:
    plan = planned(tmp_path, run={"embedding_cache": EmbeddingCacheConfig(mode="live")})
    one, four = (forecast(plan, resources(slots), timings(plan)) for slots in (1, 4))
    assert one.epochs == four.epochs
    started = TUNE_START_S / 3600
    assert four.hours["trials"] - started < 0.5 * (one.hours["trials"] - started)
    assert four.hours["teachers"] == one.hours["teachers"]  # there is but one
    growing = forecast(plan, resources(4, slots_now=0), timings(plan))
    assert growing.hours == one.hours
    assert any("may grow to 4" in sentence for sentence in growing.assumptions)


def test_work_goes_to_the_slot_that_is_free_first() -> None:
    works = [(4.0, 1.0), (1.0, 1.0), (1.0, 1.0), (5.0, 1.0)]
    assert _pack(works, 2, 0.0) == _Done(wall_s=7.0, busy_s=11.0, epochs=4)  # by division 5.5
    assert _pack(works, 9, 2.0).wall_s == 7.0
    assert _pack([], 2, 0.0) == _Done()


def test_the_share_that_halving_leaves_is_about_that_of_its_pruner() -> None:
    draw, trials, epochs = random.Random(0), 16, 24
    pruner = make_pruner("halving", epochs)
    trained = 0
    for _ in range(40):
        study = optuna.create_study(direction="maximize", pruner=pruner)
        for _ in range(trials):
            trial, value = study.ask(), draw.random()
            trained += next((each for each in range(1, epochs) if _stops(trial, value, each)), epochs)
    assert share_kept("halving", epochs, trials) == pytest.approx(trained / (40 * trials * epochs), abs=0.02)
    # Of 8 trials 1/4, 1/5, 1/6, 1/7 and 1/4 stop after 18 epochs, and of the 7 that are left the first four after 20.
    first, second = 1 / 4 + 1 / 5 + 1 / 6 + 1 / 7 + 1 / 4, 1 / 4 + 1 / 5 + 1 / 6 + 1 / 7
    assert share_kept("halving", epochs, 8) == pytest.approx(1 - (6 * first + 4 * second) / (8 * epochs))
    assert share_kept("halving", epochs, 3) == share_kept("none", epochs, 16) == 1.0


def _stops(trial: optuna.Trial, value: float, epoch: int) -> bool:
    trial.report(value, epoch)
    return trial.should_prune()


def test_gpu_hours_are_those_of_busy_slots(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    found = forecast(plan, resources(4, num_workers=2, gpus_per_worker=0.5), timings(plan, num_workers=2))
    assert found.gpu_hours == pytest.approx(found.busy_hours)
    assert forecast(plan, resources(4), timings(plan)).gpu_hours == 0


def test_limits_and_done_trials_leave_less(tmp_path: Path) -> None:
    def epochs(done: dict[str, int] | None = None, **search: Any) -> int:
        plan = planned(tmp_path, **search)
        return forecast(plan, resources(), timings(plan), done_trials=done).epochs["trials"]

    vanilla, name = (cell.name for cell in planned(tmp_path).cells)
    assert epochs() == 48
    assert epochs(max_epochs_total=20) == 20
    assert epochs({name: 2, vanilla: 1}, max_epochs_total=20) == 2  # 18 are spent
    assert epochs({name: 3, vanilla: 1}) == 24
    assert epochs({name: 4, vanilla: 4}) == 0
    assert 0 < epochs(max_hours=8.0 / 3600) < 48
    assert epochs(pruner="halving", trials=8, run={"val_fraction": 0.2}) < 96


def test_done_trials_beyond_a_cells_share_are_taken_from_those_that_lag(tmp_path: Path) -> None:
    cells = planned(tmp_path).cells
    first, second = (cell.name for cell in cells)
    assert trials_left(cells, 4, {}) == {first: 4, second: 4}
    assert trials_left(cells, 4, {first: 6}) == {first: 0, second: 2}
    assert trials_left(cells, 4, {first: 6, second: 6}) == {first: 0, second: 0}


def printed(table: Any) -> str:
    text = io.StringIO()
    Console(file=text, width=200).print(table)
    return text.getvalue()


def test_a_comparison_says_both_and_how_far_apart(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    found = forecast(plan, resources(), timings(plan))
    assert "trials" in printed(found.table())
    assert "1 trials side by side" in printed(found.table())
    hours = {phase: 2 * value for phase, value in found.hours.items() if phase != "start"}
    compared = Comparison(found, found.at_pace(3.0), {"trials": 45}, hours)
    assert compared.hours_ratio == pytest.approx(0.5)  # of the phases that were counted
    assert "-50 %" in printed(compared.table())
    assert " 48 " in printed(compared.table())
    assert " 45 " in printed(compared.table())
    record = json.loads(json.dumps(compared.to_json()))
    assert record["forecast"]["total_hours"] == found.total_hours
    assert record["actual"]["epochs"] == {"trials": 45}
    assert record["corrected"]["hours"]["refits"] == pytest.approx(3 * found.hours["refits"])
    assert record["corrected"]["hours"]["teachers"] == found.hours["teachers"]
    assert Comparison(found, None, {}, {}).hours_ratio is None


def test_times_are_said_in_words() -> None:
    assert [format_hours(seconds / 3600) for seconds in (0, 40, 119, 121, 7100, 7300)] == [
        "0 s",
        "40 s",
        "119 s",
        "3 min",
        "119 min",
        "2 h 2 min",
    ]
