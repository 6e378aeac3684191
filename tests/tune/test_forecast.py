from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from rich.console import Console

from refilled.config import BankConfig
from refilled.presets import smoke
from refilled.storage.run_folder import RunFolder
from refilled.teacher import teacher_folder
from refilled.timing import StepTimes
from tune.backend.cluster import Resources
from tune.forecast.forecast import END_S, START_S, TUNE_START_S, Actual, compare, forecast, say_hours, trials_left
from tune.forecast.measure import Timings, kind_of
from tune.forecast.workload import JOB_S, TEST_SHARE, TRIAL_S, Workload
from tune.plan import Plan, make_plan

optuna.logging.set_verbosity(optuna.logging.WARNING)

# Every step a power of two milliseconds, so that sums tell what they are made of.
TIMES = StepTimes(
    embedding_bank_s=0.001,
    embedding_live_s=0.002,
    classifier_bank_s=0.004,
    classifier_live_s=0.008,
    pretraining_s=0.016,
    accuracy_s=1e-5,
    nearest_mean_s=2e-5,
    teacher_s=4e-5,
    epoch_s=0.032,
    run_s=0.064,
    alone=0.5,
    peak_bytes=0,
    total_bytes=0,
)


def resources(slots: int = 1, **changes: Any) -> Resources:
    base = Resources(num_workers=1, cpus_per_worker=1.0, gpus_per_worker=0.0, slots=slots, slots_now=slots)
    return dataclasses.replace(base, **changes)


def planned(storage: Path, **changes: Any) -> Plan:
    run = dataclasses.replace(smoke().run, epochs=(2, 4), teacher_epochs=5, **changes.pop("run", {}))
    settings = {"overlaps": (1.0,), "trials": 4, "seeds": 2, "pruner": "none", "storage": str(storage)} | changes
    return make_plan(dataclasses.replace(smoke(), run=run, **settings))


def timings(plan: Plan, worker_start_s: float = 0.0) -> Timings:
    return Timings({kind_of(cell): TIMES for cell in plan.cells}, worker_start_s, took_s=0.0)


def test_a_trial_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    workload = Workload(plan, resources(), timings(plan))
    student, refilled = plan.cells
    train, validation, means_of = workload._images(refilled)
    assert (train + validation, means_of) == (676, 5 * 50)
    steps = -(-train // 64)
    method = workload.trial(refilled)
    beside_s = TIMES.epoch_s + 0.012
    ncm_s = (validation + means_of) * TIMES.nearest_mean_s + beside_s
    own_s = validation * TIMES.accuracy_s + beside_s
    (embedding, classifier) = method.stages
    assert embedding == pytest.approx((2, steps * 0.001 + ncm_s, steps * 0.002 + ncm_s))
    assert classifier == pytest.approx((4, steps * 0.004 + own_s, steps * 0.008 + own_s))
    assert method.fixed_s == pytest.approx(TIMES.run_s + TRIAL_S)
    assert method.prototypes_s == pytest.approx(train * TIMES.teacher_s)
    assert method.bank_s == pytest.approx(9 * train * TIMES.teacher_s)  # 4 trials of 6 epochs ask more than 9 views
    vanilla = workload.trial(student)
    assert vanilla.shares is None
    assert [epochs for epochs, _, _ in vanilla.stages] == [6]


def test_a_method_that_needs_feature_maps_runs_the_teacher_in_every_step(tmp_path: Path) -> None:
    plan = planned(tmp_path, methods=("student", "at"), trials=100)
    workload = Workload(plan, resources(), timings(plan))
    work = workload.trial(plan.cells[1])
    train, validation, _ = workload._images(plan.cells[1])
    epoch_s = -(-train // 64) * 0.008 + validation * TIMES.accuracy_s + TIMES.epoch_s + 0.012
    assert work.stages == (pytest.approx((6, epoch_s, epoch_s)),)
    assert work.bank_s is None


def test_networks_of_the_users_are_forecast(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_NETWORK)
    name = f"{tmp_path}/own.py:small"
    plan = planned(tmp_path, teachers=(name,), students=(name,))
    work = Workload(plan, resources(), timings(plan)).trial(plan.cells[1])
    assert work.bank_s is not None


OWN_NETWORK = """
from refilled.models import build_model

def small(num_classes, in_channels, image_size, dropout):
    shape = {"in_channels": in_channels, "image_size": image_size}
    return build_model("convnet-8", num_classes=num_classes, dropout=dropout, seed=0, **shape)
"""


def test_a_bank_is_built_where_the_search_would_build_it(tmp_path: Path) -> None:
    def bank_s(trials: int, **bank: Any) -> float | None:
        plan = planned(tmp_path, trials=trials, run={"bank": BankConfig(**bank)})
        return Workload(plan, resources(), timings(plan)).trial(plan.cells[-1]).bank_s

    assert bank_s(1) is None  # 6 epochs ask the teacher less often than 9 views
    assert bank_s(2) is not None
    assert bank_s(1, mode="bank") is not None
    assert bank_s(9, mode="live") is None
    assert bank_s(9, max_gib=1e-6) is None


def test_teachers_that_are_there_and_epochs_that_are_done_do_not_count(tmp_path: Path) -> None:
    plan = planned(tmp_path, overlaps=(0.0, 1.0), teachers=("convnet-8", "convnet-16"))
    workload = Workload(plan, resources(), timings(plan))
    assert [work.num_epochs for work in workload.teachers(on_all=False)] == [5, 5]  # one for both overlaps
    folder = teacher_folder(plan.cells[1].run, plan.storage)  # of the first one
    folder.path.mkdir(parents=True)
    for epoch in (1, 2):
        RunFolder(folder.path).append_row({"epoch": epoch})
    assert [work.num_epochs for work in workload.teachers(on_all=False)] == [3, 5]
    for epoch in (3, 4, 5):
        RunFolder(folder.path).append_row({"epoch": epoch})
    RunFolder(folder.path).finish({"epoch": 5}, {})
    assert [work.num_epochs for work in workload.teachers(on_all=False)] == [5]
    assert [work.num_epochs for work in workload.teachers(on_all=True)] == [5, 5]


def test_refits_are_of_winner_vanilla_and_short_vanilla_and_shared_by_teachers(tmp_path: Path) -> None:
    plan = planned(tmp_path, teachers=("convnet-8", "convnet-16"))
    works = Workload(plan, resources(), timings(plan)).refits()
    assert sorted(work.num_epochs for work in works) == [4, 4, 6, 6, 6, 6, 6, 6]  # 2 seeds; 4 of the two methods
    steps = -(-676 // 64)
    short = next(work for work in works if work.num_epochs == 4)
    epoch_s = steps * 0.008 + 0.032  # no validation; without a teacher a step is timed as it is, bank or not
    assert short.stages == (pytest.approx((4, epoch_s, epoch_s)),)
    assert short.fixed_s == pytest.approx(TIMES.run_s + JOB_S + TEST_SHARE * 676 * TIMES.accuracy_s)
    alone = planned(tmp_path, methods=("student",))
    assert [work.num_epochs for work in Workload(alone, resources(), timings(alone)).refits()] == [6, 6]
    beside = planned(tmp_path, methods=("student", "kd"))  # whose one stage is no shorter
    assert [work.num_epochs for work in Workload(beside, resources(), timings(beside)).refits()] == [6, 6, 6, 6]


def test_phases_add_up_to_the_hours_and_the_cost(tmp_path: Path) -> None:
    plan = planned(tmp_path, price_per_hour=7.2)
    found = forecast(plan, resources(), timings(plan, worker_start_s=3.0))
    assert found.epochs == {"teachers": 5, "trials": 48, "teachers on all images": 5, "refits": 32}
    workload = Workload(plan, resources(), timings(plan))
    (teacher,) = workload.teachers(on_all=False)
    assert 3600 * found.hours["teachers"] == pytest.approx(3.0 + teacher.fixed_s + teacher.epochs_s(5, looked_up=False))
    vanilla, method = (workload.trial(cell) for cell in plan.cells)
    trials_s = 4 * (method.fixed_s + method.epochs_s(6, looked_up=True))
    trials_s += 4 * (vanilla.fixed_s + vanilla.epochs_s(6, looked_up=True))
    assert method.bank_s is not None
    trials_s += method.prototypes_s + method.bank_s
    assert 3600 * found.hours["trials"] == pytest.approx(TUNE_START_S + 3.0 + trials_s)
    refits_s = 3600 * found.hours["refits"] - END_S
    assert refits_s == pytest.approx(
        sum(work.fixed_s + work.epochs_s(work.num_epochs, looked_up=True) for work in workload.refits())
        + workload.refits()[-1].prototypes_s
        + (workload.refits()[-1].bank_s or 0.0)
    )
    assert 3600 * found.hours["start"] == START_S
    assert found.total_hours == pytest.approx(sum(found.hours.values()))
    assert found.cost == pytest.approx(7.2 * found.total_hours)
    assert forecast(planned(tmp_path), resources(), timings(plan)).cost is None
    assert 3600 * forecast(plan, resources(), timings(plan), elapsed_s=40.0).hours["start"] == pytest.approx(40.0)


def test_more_slots_take_less_time_and_no_fewer_epochs(tmp_path: Path) -> None:
    plan = planned(tmp_path, run={"bank": BankConfig(mode="live")})
    one, four = (forecast(plan, resources(slots), timings(plan)) for slots in (1, 4))
    assert one.epochs == four.epochs
    started = TUNE_START_S / 3600
    assert four.hours["trials"] - started < 0.5 * (one.hours["trials"] - started)
    (with_all,) = Workload(plan, resources(1), timings(plan)).teachers(on_all=False)
    (by_itself,) = Workload(plan, resources(4), timings(plan)).teachers(on_all=False)
    assert by_itself.stages[0][1] == pytest.approx(0.5 * with_all.stages[0][1])  # nobody is beside it
    assert by_itself.fixed_s == with_all.fixed_s
    two = planned(tmp_path, teachers=("convnet-8", "convnet-16"))
    with_another = Workload(two, resources(3), timings(two)).teachers(on_all=False)[0]
    assert with_another.stages[0][1] == pytest.approx(0.75 * with_all.stages[0][1])
    growing = forecast(plan, resources(4, slots_now=0), timings(plan))
    assert growing.hours == one.hours
    assert any("may grow to 4" in sentence for sentence in growing.assumptions)


def test_gpu_hours_are_those_of_busy_slots(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    found = forecast(plan, resources(4, num_workers=2, gpus_per_worker=0.5), timings(plan))
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
    compared = compare(found, Actual(epochs={"trials": 45}, hours=hours))
    assert compared.hours_ratio == pytest.approx(0.5)  # of the phases that were counted
    assert "-50 %" in printed(compared.table())
    assert " 48 " in printed(compared.table())
    assert " 45 " in printed(compared.table())
    assert json.loads(json.dumps(compared.to_json()))["forecast"]["total_hours"] == found.total_hours
    assert compare(found, Actual(epochs={}, hours={})).hours_ratio is None


def test_times_are_said_in_words() -> None:
    assert [say_hours(seconds / 3600) for seconds in (0, 40, 119, 121, 7100, 7300)] == [
        "0 s",
        "40 s",
        "119 s",
        "3 min",
        "119 min",
        "2 h 2 min",
    ]
