from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from refilled.errors import UserError
from refilled.presets import smoke
from refilled.storage.store import write_json
from refilled.timing import StepTimes, measure
from refilled.training.compute import Compute
from tune.backend.cluster import Resources
from tune.forecast.measure import _path, _records, _rounds, _share, kind_of, measure_all
from tune.plan import Plan, make_plan


def planned(storage: Path, **run: Any) -> Plan:
    search = dataclasses.replace(smoke(), overlaps=(0.0, 1.0), storage=str(storage))
    return make_plan(dataclasses.replace(search, run=dataclasses.replace(search.run, **run)))


def test_rounds_are_full() -> None:
    assert list(_rounds(["a", "b", "c"], 2)) == [["a", "b"], ["c", "c"]]
    assert list(_rounds(["a", "b"], 5)) == [["a", "b", "a", "b", "a"]]
    assert list(_rounds([], 2)) == []


def test_a_worker_of_several_measures_its_share_of_the_batches() -> None:
    run = smoke().run
    assert _share(run, 1) == run
    share = _share(run, 4)
    assert (share.global_batch_size, share.pretraining.global_batch_size) == (16, 16)


def test_of_a_round_the_median_is_kept_and_the_most_memory_and_what_was_seen_alone() -> None:
    def answer(seconds: float, alone: float, peak_bytes: int, start_s: float) -> dict[str, Any]:
        times = {"classifier_bank_s": seconds, "alone": alone, "peak_bytes": peak_bytes, "total_bytes": 100}
        return {"times": times, "worker_start_s": start_s}

    answers = [answer(1, 0.5, 7, 3.0), answer(5, 1, 9, 2.0), answer(2, 1, 8, 4.0), answer(9, 1, 2, 1.0)]
    records = _records(["a", "b", "a", "a"], answers)
    assert records["a"]["times"] == {"classifier_bank_s": 2, "alone": 0.5, "peak_bytes": 8, "total_bytes": 100}
    assert records["b"]["times"] == {"classifier_bank_s": 5, "alone": 0.5, "peak_bytes": 9, "total_bytes": 100}
    assert [record["worker_start_s"] for record in records.values()] == [4.0, 4.0]


def test_networks_of_the_users_are_measured(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from refilled.models import build_model\n"
        "def small(dropout, **shape):\n"
        "    return build_model('convnet-8', seed=0, **shape)\n"
    )
    name = f"{tmp_path}/own.py:small"
    search = dataclasses.replace(smoke(), overlaps=(1.0,), teachers=(name,), students=(name,), storage=str(tmp_path))
    cell = make_plan(search).cells[1]
    times = measure(cell.run, tmp_path, Compute(torch.device("cpu"), "float32"), budget_s=0.1)
    assert times.embedding_live_s > 0


@pytest.mark.ray
def test_every_kind_is_measured_once_and_kept(local_ray: None, tmp_path: Path) -> None:
    resources = Resources(num_workers=1, cpus_per_worker=1.0, gpus_per_worker=0.0, slots=2, slots_now=2)
    plan = planned(tmp_path)
    first = measure_all(plan, resources)
    assert set(first.kinds) == {kind_of(cell) for cell in plan.cells}
    assert len(first.kinds) == 2  # of two overlaps
    assert first.kinds["convnet-32>convnet-8 refilled"].embedding_live_s > 0
    assert first.kinds["none>convnet-8 student"].embedding_live_s == 0
    assert {0 < times.alone <= 1 for times in first.kinds.values()} == {True}
    assert len({times.alone for times in first.kinds.values()}) == 1  # of the round, not of the kind
    assert first.worker_start_s > 0
    assert first.took_s > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "timings"]
    assert len(list((tmp_path / "timings").iterdir())) == 2

    again = measure_all(planned(tmp_path, epochs=(3, 3), seed=5), resources)  # which change no step
    assert again == dataclasses.replace(first, took_s=0.0)
    other = measure_all(planned(tmp_path, global_batch_size=32), resources)
    assert other.took_s > 0
    assert len(list((tmp_path / "timings").iterdir())) == 4


@pytest.mark.ray
def test_runs_that_do_not_fit_a_gpu_together_are_refused(local_ray: None, tmp_path: Path) -> None:
    """Nothing is measured: the timings are there already."""
    resources = Resources(num_workers=1, cpus_per_worker=1.0, gpus_per_worker=0.5, slots=2, slots_now=2)
    plan = planned(tmp_path)
    times = {field.name: 0.0 for field in dataclasses.fields(StepTimes)} | {"peak_bytes": 5 * 2**30}
    paths = [_path(plan, cell.run, resources) for cell in plan.cells]
    paths[0].parent.mkdir()
    for path in paths:
        write_json(path, {"times": times | {"total_bytes": 13 * 2**30}, "worker_start_s": 1.0})
    assert measure_all(plan, resources).worker_start_s == 1.0  # 6 GiB each
    write_json(paths[-1], {"times": times | {"total_bytes": 11 * 2**30}, "worker_start_s": 1.0})
    with pytest.raises(UserError, match=r"0.5 puts 2 workers on one GPU, .* 11.00 GiB, which holds 1"):
        measure_all(plan, resources)
