"""Trials on workers that are kept from trial to trial, in a real Tune."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import outcomes
import pytest
import torch
from outcomes import assert_close_outcome, row_of

from refilled.config import RunConfig
from refilled.execution import execute, run_folder
from refilled.metrics import END, EpochMetrics, Report, TrialEnd
from refilled.storage import Storage
from tune.backend.cluster import Resources
from tune.backend.tuner import trial_function
from tune.backend.worker_group import MAX_REPEATS

pytestmark = pytest.mark.ray
RESOURCES = Resources(num_workers=2, cpus_per_worker=1.0, gpus_per_worker=0.0, slots=1, slots_now=1)
EPOCHS = 3


@dataclass(frozen=True, kw_only=True)
class Attended(EpochMetrics):
    """A row that says who took part."""

    total: float
    pids: list[int]
    bundles: str


def body(job: str, config: Mapping[str, Any], storage: Storage, *, on_report: Report, **others: Any) -> None:
    """A run of three epochs that says who took part, keeps its epoch in a file, and has one accident."""
    import ray.util
    import torch.distributed as dist

    from refilled.distributed import agree, gather_rows, rank

    accident, marker = config["accident"], storage.root / config["name"]
    is_due = agree(accident.endswith("always") or not marker.exists())  # rank 0 says so to all
    marker.touch()
    kept = storage.root / f"{config['name']}.json"
    first = json.loads(kept.read_text()) if kept.exists() else 0
    pids = gather_rows(torch.tensor([os.getpid()])).tolist()
    for epoch in range(first + 1, EPOCHS + 1):
        if epoch == 2 and is_due:
            has_accident(accident, rank())
        total = torch.tensor([float(epoch)])
        dist.all_reduce(total)
        if rank() == 0:
            kept.write_text(str(epoch))
        bundles = ray.util.get_current_placement_group().id.hex()
        try:
            on_report(Attended(**vars(row_of(epoch)), total=total.item(), pids=pids, bundles=bundles))
        except BaseException as error:
            (storage.root / f"{config['name']} left by {rank()}").write_text(type(error).__name__)
            raise


def has_accident(accident: str, rank: int) -> None:
    """What the accident's name says, on one rank or on all."""
    import tune.backend.worker_group

    if accident == "diverges":
        raise FloatingPointError("on purpose")
    if accident == "rank 0 sleeps" and rank == 0:
        tune.backend.worker_group.STUCK_S = 0.5
        time.sleep(100)
        return
    if rank != int(not accident.startswith("rank 0 ")) and accident != "rank 0 sleeps":
        return
    if "killed" in accident or "sleeps" in accident:
        os.kill(os.getpid(), signal.SIGKILL)
    if "raises" in accident:
        tune.backend.worker_group.CAUSE_S = 1.0
        raise ValueError("on purpose")


def run_group(names_to_accidents: Mapping[str, str], folder: Path, stops: Callable[..., bool] | None = None) -> Any:
    import ray.cloudpickle
    from fixed_list import run_list

    for module in (sys.modules[__name__], outcomes):  # workers cannot import a test module
        ray.cloudpickle.register_pickle_by_value(module)
    storage = Storage.open(folder)
    function = trial_function(RESOURCES, storage, backend="auto", body=body)
    samples = [{"name": name, "config": {"name": name, "accident": each}} for name, each in names_to_accidents.items()]
    return run_list(function, samples, storage, stops or (lambda name, row: False))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def epochs(rows: list[Mapping[str, Any]]) -> list[int]:
    """Of all rows but the trial's end."""
    return [row["epoch"] for row in rows if END not in row]


def test_tune_leaves_no_signal_caught_behind(local_ray: None, tmp_path: Path) -> None:
    """An interruption of a later phase would pass unnoticed: Tune's handler only says that Tune ends."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGUSR1)}
    run_group({"one": ""}, tmp_path)
    assert {each: signal.getsignal(each) for each in before} == before


def test_processes_are_kept_through_ends_stops_and_divergence(local_ray: None, tmp_path: Path) -> None:
    import ray

    accidents = {"first": "", "stopped": "", "diverged": "diverges", "last": ""}
    rows, errors = run_group(accidents, tmp_path, lambda name, row: name == "stopped" and row["epoch"] == 2)
    assert not errors
    assert epochs(rows["first"]) == epochs(rows["last"]) == [1, 2, 3]
    assert epochs(rows["stopped"]) == [1, 2]
    left_by = [(tmp_path / f"stopped left by {rank}").read_text() for rank in range(2)]
    assert left_by == ["SystemExit", "_LeftByRankZero"]
    assert [row["total"] for row in rows["last"]] == [2.0, 4.0, 6.0]
    assert epochs(rows["diverged"]) == [1]
    assert TrialEnd.from_dict(rows["diverged"][-1]) == TrialEnd("diverged", "on purpose")
    whole = [row for each in rows.values() for row in each if "pids" in row]
    assert len({tuple(row["pids"]) for row in whole}) == 1  # the same two processes for all trials
    assert len(set(whole[0]["pids"])) == 2
    assert len({row["bundles"] for row in whole}) == 1  # Tune gives a reused process the same placement group
    assert wait_until(lambda: not any(is_alive(pid) for pid in whole[0]["pids"]))
    assert wait_until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])


def test_a_lost_helper_is_replaced_and_the_run_continues(local_ray: None, tmp_path: Path) -> None:
    accidents = {"killed": "killed", "raised": "raises", "hopeless": "killed always", "last": ""}
    rows, errors = run_group(accidents, tmp_path)
    assert not errors
    assert epochs(rows["killed"]) == epochs(rows["raised"]) == epochs(rows["last"]) == [1, 2, 3]
    assert len({row["pids"][0] for each in rows.values() for row in each if "pids" in row}) == 1
    for name in ("killed", "raised"):
        helpers = [row["pids"][1] for row in rows[name]]
        assert helpers[0] != helpers[1] == helpers[2]
        assert not is_alive(helpers[0])
    assert epochs(rows["hopeless"]) == [1]
    end = TrialEnd.from_dict(rows["hopeless"][-1])
    assert end.kind == "failed"
    assert end.reason.startswith(f"A worker of the trial failed {1 + MAX_REPEATS} times:")
    assert rows["last"][0]["pids"][1] != rows["hopeless"][0]["pids"][1]


def test_rank_0_is_tunes_business_and_takes_its_helpers_with_it(local_ray: None, tmp_path: Path) -> None:
    accidents = {"killed": "rank 0 killed", "stuck": "rank 0 sleeps", "raised": "rank 0 raises always", "last": ""}
    rows, errors = run_group(accidents, tmp_path)
    assert list(errors) == ["raised"]
    assert "on purpose" in errors["raised"]
    for name in ("killed", "stuck"):
        assert epochs(rows[name]) == [1, 2, 3]
        assert rows[name][0]["pids"][0] != rows[name][1]["pids"][0]
        assert wait_until(lambda name=name: not any(is_alive(pid) for pid in rows[name][0]["pids"]))
    assert epochs(rows["raised"]) == [1]  # what rank 0 does wrong is not tried again by the group
    assert epochs(rows["last"]) == [1, 2, 3]


def lose_helper(job: Any, config: Mapping[str, Any], storage: Storage, *, on_report: Report, **others: Any) -> None:
    """`work`, in which the helper is killed once, when it has the third row."""
    from refilled.distributed import rank
    from tune.backend.worker import work

    def report(row: EpochMetrics) -> None:
        on_report(row)
        marker = storage.root / "killed"
        if rank() == 1 and row.epoch == 3 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    work(job, config, storage, on_report=report, **others)


def test_two_workers_give_the_numbers_of_one_though_one_is_killed(
    local_ray: None, tmp_path: Path, digits_run: RunConfig
) -> None:
    import ray.cloudpickle
    from fixed_list import run_list

    from refilled.training.compute import Compute

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    run = dataclasses.replace(digits_run, epochs=(2, 3), teacher_epochs=2, precision="float64")
    group, alone = (Storage.open(tmp_path / name) for name in ("group", "alone"))
    execute(run, alone, Compute(torch.device("cpu"), "float64"))
    function = trial_function(RESOURCES, group, backend="auto", body=lose_helper)
    rows, errors = run_list(function, [{"name": "run", "config": run.to_dict()}], group)
    assert not errors
    assert (group.root / "killed").exists()
    assert list(dict.fromkeys(epochs(rows["run"]))) == [1, 2, 3, 4, 5]
    assert_close_outcome(run_folder(run, group), run_folder(run, alone))


def test_a_torch_trainer_needs_new_processes_and_the_dashboard(local_ray: None, tmp_path: Path) -> None:
    from fixed_list import run_list

    storage = Storage.open(tmp_path)
    trainer = trial_function(RESOURCES, storage, backend="torch_trainer")
    assert (trainer.has_trainer, trainer.reuse_actors) == (True, False)
    with pytest.raises(AssertionError):  # this Ray has no dashboard
        run_list(trainer, [], storage)
