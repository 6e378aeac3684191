from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from refilled.errors import UserError
from refilled.presets import smoke
from refilled.stages import stages_of
from refilled.timing import Timed, image_part, step_part
from tune.backend.cluster import Resources
from tune.forecast import measure as measuring
from tune.forecast.measure import TIMINGS, Timings, _keep, _key, _with_estimates, measure
from tune.forecast.workload import Workload
from tune.plan import Plan, make_plan

RESOURCES = Resources(num_workers=1, cpus_per_worker=1.0, gpus_per_worker=0.0, slots=2, slots_now=2)


def planned(storage: Path, **run: Any) -> Plan:
    search = dataclasses.replace(smoke(), overlaps=(0.0, 1.0), storage=str(storage))
    return make_plan(dataclasses.replace(search, run=dataclasses.replace(search.run, **run)))


def manifests(storage: Path) -> list[Path]:
    """One of each timing that is kept."""
    return sorted((storage / "cache" / TIMINGS.name).glob("*/manifest.json"))


def measured(plan: Plan, resources: Resources = RESOURCES, said: list[str] | None = None) -> Timings:
    return measure(plan, Workload(plan, 1).calls(), resources, [].append if said is None else said.append)


def test_parts_that_are_not_timed_go_at_the_pace_of_their_network() -> None:
    run = smoke().run
    wide = dataclasses.replace(run, student="convnet-16")
    (mine,), (other,) = (stages_of(dataclasses.replace(each, method="student")) for each in (run, wide))
    step, image, others = step_part(run, mine), image_part(run), step_part(wide, other)
    work = {step: 6.0, image: 2.0, others: 24.0, image_part(wide): 8.0}
    found = _with_estimates(work, {step: Timed(3.0), image_part(wide): Timed(8.0)})
    assert found == {step: 3.0, image: 1.0, others: 24.0, image_part(wide): 8.0}
    (embedding, _) = stages_of(dataclasses.replace(run, method="rkd"))
    both = _with_estimates(work | {step_part(run, embedding): 12.0}, {step: Timed(3.0), image: Timed(8.0)})
    assert both[step_part(run, embedding)] == 6.0  # as the other step, not as the evaluation
    assert _with_estimates(work, {}) == {}
    assert _with_estimates(work, {image: Timed(1.0)})[others] == 12.0  # of another network, where there is no better


@pytest.mark.ray
def test_every_part_is_timed_once_and_kept(local_ray: None, tmp_path: Path) -> None:
    plan, said = planned(tmp_path), list[str]()
    first = measured(plan, said=said)
    calls = Workload(plan, 1).calls()
    assert set(first.seconds) == set(calls)
    assert len(calls) == 8  # of two overlaps and two methods: 4 kinds of steps, and image and epoch of two networks
    timed = [part.name for part in calls if part.name not in first.estimated]
    assert len([line for line in said if line.startswith("Timing convnet-")]) == len(timed) >= 3
    assert all(seconds > 0 for seconds in first.seconds.values())
    assert first.worker_start_s > 0
    assert first.took_s > 0
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert len(manifests(tmp_path)) == len(timed)


@pytest.mark.ray
def test_what_is_known_is_not_timed_again(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "FLOOR_S", 60.0)  # enough for all
    said = list[str]()
    first = measured(planned(tmp_path))
    assert first.estimated == ()
    again = measured(planned(tmp_path, epochs=(3, 3), seed=5), said=said)  # which change no step
    assert again == dataclasses.replace(first, took_s=0.0)
    assert said == []
    other = measured(planned(tmp_path, global_batch_size=32))
    assert other.took_s > 0
    manifests(tmp_path)[0].write_text("{")
    assert measured(planned(tmp_path)).took_s + measured(planned(tmp_path, global_batch_size=32)).took_s > 0


@pytest.mark.ray
def test_timing_stops_where_its_share_is_spent(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "FLOOR_S", 0.0)
    monkeypatch.setattr(measuring, "SHARE", 0.0)
    plan, said = planned(tmp_path), list[str]()
    found = measured(plan, said=said)
    calls = Workload(plan, 1).calls()
    # Checkpoints, and the steps that the search spends most on; these are what nothing else tells.
    assert len(found.estimated) == 8 - 3
    assert sum("checkpoint" in line for line in said) == 2
    assert set(found.seconds) == set(calls)
    assert all(seconds > 0 for seconds in found.seconds.values())


@pytest.mark.ray
def test_networks_of_the_users_are_timed(local_ray: None, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from refilled.models import build_model\n"
        "def small(dropout, **shape):\n"
        "    return build_model('convnet-8', seed=0, **shape)\n"
    )
    name = f"{tmp_path}/own.py:small"
    search = dataclasses.replace(smoke(), overlaps=(1.0,), teachers=(name,), students=(name,), storage=str(tmp_path))
    assert all(seconds > 0 for seconds in measured(make_plan(search)).seconds.values())


@pytest.mark.ray
def test_runs_that_do_not_fit_a_gpu_together_are_refused(local_ray: None, tmp_path: Path) -> None:
    """Nothing is timed: the timings are there already."""
    resources = dataclasses.replace(RESOURCES, gpus_per_worker=0.5)

    def kept(name: str, *, last_gib: int) -> Plan:
        plan = planned(tmp_path / name)
        *parts, last = Workload(plan, 1).calls()
        for part, gib in [*((each, 13) for each in parts), (last, last_gib)]:
            timed = Timed(1.0, peak_bytes=5 * 2**30, total_bytes=gib * 2**30)
            record = {"part": part.name, "timed": dataclasses.asdict(timed), "worker_start_s": 1.0}
            _keep(plan.storage, _key(part, resources), record)
        return plan

    assert measured(kept("fitting", last_gib=13), resources).worker_start_s == 1.0  # 6 GiB each
    with pytest.raises(UserError, match=r"0.5 puts 2 workers on one GPU, .* 11.00 GiB, which holds 1"):
        measured(kept("too small", last_gib=11), resources)
