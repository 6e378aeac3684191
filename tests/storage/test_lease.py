"""Locks in an object store, and their law: machines without a common folder make everything once."""

from __future__ import annotations

import datetime
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch
from machines import Machines
from object_store import ObjectStore
from obstore.store import from_url

from refilled.config import RunConfig
from refilled.embedding_cache import EMBEDDINGS, ROWS
from refilled.execution import embed_once, pretrain_once
from refilled.storage import Storage, lease
from refilled.storage.lease import Lease
from refilled.storage.object_storage import WORK_FOLDER
from refilled.teacher import teacher_folder
from refilled.training.compute import Compute

RENEW_S, LOST_S = 0.4, 2.0


@pytest.fixture(autouse=True)
def _in_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", RENEW_S)
    monkeypatch.setattr(lease, "LOST_S", LOST_S)


@pytest.fixture
def objects(machines: Machines) -> Any:
    """The folder in the store."""
    return connect(machines.url)


def connect(url: str, timeout_s: float = 60.0) -> Any:
    """What gives up at once if the store does not answer in time."""
    options = {"allow_http": True, "timeout": datetime.timedelta(seconds=timeout_s)}
    return from_url(url, client_options=options, retry_config={"max_retries": 0})  # type: ignore[call-overload]


def there(objects: Any) -> list[str]:
    return [each["path"] for chunk in obstore.list(objects) for each in chunk]


def died_holding(objects: Any, machine: str) -> Lease:
    """A lease that nobody renews."""
    dead = Lease(objects, "lease", machine)
    assert dead._put("create")
    return dead


def test_of_many_that_ask_at_once_one_gets_it(objects: Any) -> None:
    all_ready = threading.Barrier(8)

    def ask(number: int) -> Lease | None:
        asking = Lease(objects, "lease", f"machine {number}")
        all_ready.wait()
        return asking if asking.acquire(0.0) else None

    for _ in range(5):
        with ThreadPoolExecutor(8) as threads:
            (holder,) = filter(None, threads.map(ask, range(8)))
        holder.release()
        assert there(objects) == []


def test_a_lease_that_is_renewed_stays_its_holders(objects: Any) -> None:
    first, second = (Lease(objects, "lease", name) for name in "ab")
    assert first.acquire(0.0)
    started_s = time.monotonic()
    assert not second.acquire(0.0)
    assert time.monotonic() - started_s < RENEW_S
    assert not second.acquire(2 * LOST_S)
    assert time.monotonic() - started_s >= 2 * LOST_S
    threading.Timer(0.5, first.release).start()
    assert second.acquire(2 * LOST_S)
    assert first._version  # it knows of no loss
    second.release()
    assert there(objects) == []


def test_a_dead_holders_lease_is_free_after_a_while(objects: Any) -> None:
    died_holding(objects, "a")
    started_s = time.monotonic()
    assert not Lease(objects, "lease", "b").acquire(LOST_S / 2)
    second = Lease(objects, "lease", "b")
    assert second.acquire(3 * LOST_S)
    assert time.monotonic() - started_s >= LOST_S
    second.release()
    assert there(objects) == []


def test_of_two_that_see_it_dead_one_takes_it_over(objects: Any) -> None:
    died_holding(objects, "a")
    with ThreadPoolExecutor(6) as threads:
        both = [Lease(objects, "lease", str(number)) for number in range(6)]
        got = list(threads.map(lambda each: each.acquire(1.5 * LOST_S), both))
    assert got.count(True) == 1
    both[got.index(True)].release()


def test_a_machine_takes_its_own_dead_process_lease_at_once(objects: Any) -> None:
    died_holding(objects, "a")
    second = Lease(objects, "lease", "a")
    assert second.acquire(0.0)
    second.release()
    assert there(objects) == []


def test_who_loses_a_lease_is_told_and_leaves_it(
    objects: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (Lease(objects, "lease", name) for name in "ab")
    assert first.acquire(0.0)
    with stopped_renewing(first):
        assert second.acquire(3 * LOST_S)
    wait_for(lambda: "was lost to another machine" in caplog.text)
    first.release()
    assert there(objects) == ["lease"]
    second.release()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert there(objects) == []


def test_who_has_lost_a_lease_and_gives_it_up_before_it_is_told_leaves_it(
    objects: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first = died_holding(objects, "a")
    first._thread.start = lambda: None  # type: ignore[method-assign]
    first._thread.join = lambda timeout=None: None  # type: ignore[method-assign]
    second = Lease(objects, "lease", "b")
    assert second.acquire(3 * LOST_S)
    first.release()
    assert "was lost to another machine" in caplog.text
    assert there(objects) == ["lease"]
    second.release()
    assert there(objects) == []


def test_a_write_whose_answer_is_lost_is_no_loss(objects: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The store has a newer state than its holder knows, and it is the holder's own."""
    first = Lease(objects, "lease", "a")
    assert first.acquire(0.0)
    for _ in range(3):
        with stopped_renewing(first):
            before = first._version
            assert first._put(before)
            first._version = before
        assert first._keep()
    first.release()
    assert caplog.text == ""
    assert there(objects) == []


def test_a_lease_outlives_a_store_that_is_away_for_longer_than_it_lasts(
    own_store: tuple[ObjectStore, Machines], caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody takes it over meanwhile, though nobody renews it: who waits is not answered either."""
    store, machines = own_store
    first = Lease(connect(machines.url, timeout_s=0.5), "lease", "a")
    second = Lease(connect(machines.url), "lease", "b")
    assert first.acquire(0.0)
    with ThreadPoolExecutor(1) as thread:
        got = thread.submit(second.acquire, 4 * LOST_S)
        for _ in range(2):
            time.sleep(LOST_S / 4)
            store.pause()
            time.sleep(1.5 * LOST_S)
            store.go_on()
        assert not got.result()
    assert "cannot be renewed" in caplog.text
    assert "lost" not in caplog.text
    first.release()
    assert there(connect(machines.url)) == []


def test_a_store_that_is_gone_when_the_work_is_done_is_a_warning(
    own_store: tuple[ObjectStore, Machines], caplog: pytest.LogCaptureFixture
) -> None:
    store, machines = own_store
    first = Lease(connect(machines.url), "lease", "a")
    assert first.acquire(0.0)
    store.stop()
    first.release()
    assert "cannot be given up" in caplog.text


def test_work_is_exclusive_between_machines_and_who_does_not_wait_is_told_at_once(machines: Machines) -> None:
    here, there = machines.at("a"), machines.at("b")
    assert here.root != there.root
    with here.exclusive(here.root / "runs" / "1") as is_here:
        assert is_here
        for storage in (here, there):
            started_s = time.monotonic()
            with storage.exclusive(storage.root / "runs" / "1", wait=False) as is_here:
                assert not is_here
            assert time.monotonic() - started_s < LOST_S
        with there.exclusive(there.root / "runs" / "2", wait=False) as is_here:
            assert is_here
    with there.exclusive(there.root / "runs" / "1", wait=False) as is_here:
        assert is_here


# ---- machines -------------------------------------------------------------------------------------------------------


def test_machines_train_one_teacher_and_compute_one_cache(
    run: RunConfig, machines: Machines, store: ObjectStore
) -> None:
    num_before = len(store.requests())
    logs = run_on_both(machines, run.with_overrides({"teacher_epochs": 5}))
    writes = [line for line in store.requests()[num_before:] if line.startswith(("PUT", "POST"))]
    for name, expected in {
        "/model.pt": 1,
        "/result.json": 1,
        "/config.json": 1,
        "/prototypes.pt": 1,
        f"/{ROWS}": 1,
    }.items():
        assert len([line for line in writes if line.split("?")[0].endswith(name)]) == expected, (name, writes)
    assert len([line for line in writes if line.endswith("/checkpoint.pt")]) == 5
    assert sum(log.count("Embedding cache is computed") for log in logs) == 1
    assert "WARNING" not in "".join(logs)
    contents = [files_made(machines.at(name)) for name in "ab"]
    assert contents[0] == contents[1]
    assert len(contents[0]) == 2


def run_on_both(machines: Machines, run: RunConfig) -> list[str]:
    """Compute a cache, and what it takes, on two machines at the same moment; their logs."""
    processes = [start(machines, name, run) for name in "ab"]
    wait_for(lambda: all((machines.work_folder(name) / "ready").exists() for name in "ab"))
    machines.work_folder("go").touch()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return [(machines.work_folder(name) / "log").read_text() for name in "ab"]


def files_made(storage: Storage) -> dict[str, bytes]:
    """The teacher's and the cache's."""
    found = [
        *(storage.root / "teachers").glob("*/model.pt"),
        *(storage.root / "cache" / EMBEDDINGS.name).glob(f"*/{ROWS}"),
    ]
    return {path.relative_to(storage.root).as_posix(): path.read_bytes() for path in found}


@pytest.mark.parametrize("num_rows", [0, 4])
def test_what_a_machine_began_that_is_killed_is_finished_by_another(
    num_rows: int, run: RunConfig, machines: Machines, store: ObjectStore, tmp_path: Path, compute: Compute
) -> None:
    run = run.with_overrides({"teacher_epochs": 12})
    killed = start(machines, "a", run)
    machines.work_folder("go").touch()
    folder = teacher_folder(run, machines.at("b"))

    def is_far_enough() -> bool:
        assert killed.is_alive()
        if num_rows == 0:
            return bool(list_of(machines.url, "teachers"))
        folder.storage.refresh(folder.metrics_path)
        return len(folder.rows()) >= num_rows

    wait_for(is_far_enough)
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert [each for each in list_of(machines.url, "teachers") if each.endswith(".lease")]
    num_before = len(store.requests())
    other = start(machines, "b", run)
    other.join(120)
    assert other.exitcode == 0
    epochs = [line for line in store.requests()[num_before:] if re.match(r"PUT .*/teachers/.*/checkpoint.pt$", line)]
    assert len(epochs) <= 12 - max(0, num_rows - 1)
    assert not [each for each in list_of(machines.url, "") if each.endswith(".lease")]
    plain = Storage.open(tmp_path / "plain")
    embed_once(run, plain, compute)
    assert files_made(machines.at("b")) == files_made(plain)


def list_of(url: str, folder: str) -> list[str]:
    objects = connect(url)
    return sorted(each["path"] for chunk in obstore.list(objects, prefix=folder) for each in chunk)


def start(machines: Machines, name: str, run: RunConfig) -> multiprocessing.process.BaseProcess:
    """A machine that computes a run's embedding cache as soon as it may."""
    folder = machines.work_folder(name)
    folder.mkdir(exist_ok=True)
    process = multiprocessing.get_context("spawn").Process(
        target=_embed, args=(machines.url, str(folder), run.to_dict()), daemon=True
    )
    process.start()
    return process


def _embed(url: str, folder: str, config: dict[str, Any]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", filename=f"{folder}/log")
    torch.set_num_threads(1)
    lease.RENEW_S, lease.LOST_S = RENEW_S, LOST_S
    os.environ[WORK_FOLDER] = folder
    storage, run = Storage.open(url), RunConfig.from_dict(config)
    (Path(folder) / "ready").touch()
    while not (Path(folder).parent / "go").exists():
        time.sleep(0.001)
    compute = Compute(torch.device("cpu"), "float32")
    pretrain_once(run, storage, compute)
    embed_once(run, storage, compute)


def stopped_renewing(holder: Lease) -> Any:
    """No renewal while it lasts, as of a process that sleeps."""
    return _Stopped(holder)


class _Stopped:
    def __init__(self, holder: Lease) -> None:
        self._holder = holder

    def __enter__(self) -> None:
        self._go_on = threading.Event()
        self._was = self._holder._keep

        def wait() -> bool:
            self._go_on.wait()
            return self._was()

        self._holder._keep = wait  # type: ignore[method-assign]
        time.sleep(0.1)  # a renewal that was under way is over

    def __exit__(self, *_: object) -> None:
        self._holder._keep = self._was  # type: ignore[method-assign]
        self._go_on.set()


def wait_for(happens: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
