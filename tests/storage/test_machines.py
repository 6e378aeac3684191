"""Storage in an object store: a real server, and machines that share nothing but it."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch
from machines import Machines
from object_store import ObjectStore

from refilled.config import RunConfig
from refilled.embedding_cache import EMBEDDINGS, is_cached
from refilled.errors import UserError
from refilled.execution import embed_once, execute, pretrain_once, refit, run_folder
from refilled.metrics import EpochMetrics
from refilled.storage import Storage, object_storage
from refilled.storage.object_storage import ObjectStorage
from refilled.storage.tensor_file import load_tensors
from refilled.teacher import teacher_folder
from refilled.training.compute import Compute


class Stopped(Exception):  # noqa: N818  # not an error
    """What ends a run in the middle."""


def stop_after(epoch: int) -> Any:
    def stop(row: EpochMetrics) -> None:
        if row.epoch == epoch:
            raise Stopped

    return stop


def outcome(config: RunConfig, storage: Storage) -> tuple[list[EpochMetrics], dict[str, Any]]:
    folder = run_folder(config, storage)
    rows = [dataclasses.replace(row, epoch_s=0.0, images_per_second=0.0) for row in folder.rows()]
    return rows, load_tensors(folder.model_path)["weights"]


def assert_equal(first: tuple[Any, dict[str, torch.Tensor]], second: tuple[Any, dict[str, torch.Tensor]]) -> None:
    assert first[0] == second[0]
    assert first[1].keys() == second[1].keys()
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def in_store(storage: Storage) -> set[str]:
    assert isinstance(storage, ObjectStorage)
    return {each["path"] for chunk in obstore.list(storage._store) for each in chunk}


def writes_since(store: ObjectStore, num_before: int) -> list[str]:
    return [line for line in store.requests()[num_before:] if line.startswith(("PUT", "POST"))]


@pytest.fixture
def plain(tmp_path: Path) -> Storage:
    """A folder for runs that nothing happens to."""
    return Storage.open(tmp_path / "plain")


# ---- files ----------------------------------------------------------------------------------------------------------


def test_files_come_to_other_machines_as_they_are(machines: Machines) -> None:
    here = machines.at("a")
    root = here.root
    for name in ("runs/1", "cache/images", "tracking", "runs/1.partial", "searches"):
        (root / name).mkdir(parents=True)
    here.write_json(root / "runs/1/config.json", {"a": 1})
    here.append(root / "runs/1/metrics.jsonl", b"1\n")
    here.append(root / "runs/1/metrics.jsonl", b"2\n")
    here.write(root / "searches/empty", b"")
    here.write(root / "searches/large", b"large" * 3_000_000)
    here.write_json(root / "summary.json", [])
    kept_here = (
        "cache/images/1",
        "tracking/journal",
        "studies.db",
        "runs/1.partial/model.pt",
        "runs/1.lock",
        "runs/.x",
    )
    for name in kept_here:
        here.write(root / name, b"mine")
    uploaded = {"runs/1/config.json", "runs/1/metrics.jsonl", "searches/empty", "searches/large", "summary.json"}
    assert in_store(here) == uploaded

    there = machines.at("b")
    assert there.read_json(there.root / "runs/1/config.json") == {"a": 1}
    there.pull(there.root / "runs/1")
    assert (there.root / "runs/1/metrics.jsonl").read_bytes() == b"1\n2\n"
    assert there.read_json(there.root / "summary.json") == []
    for name in ("searches/empty", "searches/large"):
        assert there.fetch(there.root / name)
        assert (there.root / name).read_bytes() == (root / name).read_bytes()
    for name in kept_here:
        assert not there.fetch(there.root / name)
    assert not there.fetch(there.root / "runs/2/config.json")
    assert files_of(there.root) == uploaded

    here.append(root / "runs/1/metrics.jsonl", b"3\n")
    here.remove(root / "runs/1/config.json")
    here.remove(root / "runs/1/config.json")
    there.refresh(there.root / "runs/1/metrics.jsonl")
    assert (there.root / "runs/1/metrics.jsonl").read_bytes() == b"1\n2\n3\n"
    third = machines.at("c")
    with pytest.raises(FileNotFoundError):
        third.read_json(third.root / "runs/1/config.json")


def test_a_file_gets_its_other_name_on_every_machine(machines: Machines) -> None:
    here, there = machines.at("a"), machines.at("b")
    new, old = here.root / "runs/1/new", here.root / "runs/1/old"
    new.parent.mkdir(parents=True)
    for content in (b"1", b"2"):
        here.write(new, content)
        here.rename(new, old)
    assert in_store(here) == {"runs/1/old"}
    new.write_bytes(b"3")  # a kill comes before its upload
    here.rename(new, old)
    assert there.fetch(there.root / "runs/1/old")
    assert (there.root / "runs/1/old").read_bytes() == b"3"


def test_in_a_folder_all_is_there_already(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    assert storage.root == tmp_path
    assert not storage.is_remote
    storage.write(tmp_path / "file", b"")
    storage.pull(tmp_path)
    storage.refresh(tmp_path / "file")
    assert storage.fetch(tmp_path / "file")
    assert not storage.fetch(tmp_path / "other")
    assert not storage.obtain(tmp_path, "file", tmp_path / "other")


# ---- what is no store -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["s3://no-such-bucket/folder", "ftp://bucket/folder", "s3://", "s3:///folder", "gs:// /", "https://host/x"],
)
def test_what_is_no_store_is_one_sentence(url: str, machines: Machines) -> None:
    with pytest.raises(UserError, match="storage must be") as refused:
        Storage.open(url)
    assert "\n" not in str(refused.value)


def test_settings_in_a_url_are_refused(machines: Machines) -> None:
    with pytest.raises(UserError, match="storage must have no settings in its URL"):
        Storage.open("s3://a/b?scheme=http")


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"storage must be a folder that can be written, got .*file \(") as refused:
        Storage.open(tmp_path / "file")
    assert "\n" not in str(refused.value)


def test_credentials_that_the_store_does_not_know_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ObjectStore(tmp_path, checks_credentials=True)
    own.start()
    try:
        machines = Machines(tmp_path, own, "folder", monkeypatch)
        started_s = time.monotonic()
        with pytest.raises(UserError, match=r"storage must be .* that can be written, got s3://\S+ \(.*403") as refused:
            machines.at("a")
        assert time.monotonic() - started_s < 10
        assert "\n" not in str(refused.value)
    finally:
        own.stop()


def test_a_store_that_is_not_there_is_one_sentence_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_storage, "PATIENCE_AT_START_S", 1.0)
    started_s = time.monotonic()
    with pytest.raises(UserError, match="storage must be") as refused:
        Machines(tmp_path, ObjectStore(tmp_path), "folder", monkeypatch).at("a")
    assert time.monotonic() - started_s < 20
    assert "\n" not in str(refused.value)


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_on_another_machine(
    run: RunConfig, machines: Machines, compute: Compute, plain: Storage, store: ObjectStore
) -> None:
    execute(run, plain, compute)
    undisturbed = outcome(run, plain)
    with pytest.raises(Stopped):
        execute(run, machines.at("a"), compute, stop_after(4))
    num_before = len(store.requests())
    there = machines.at("b")
    seen: list[int] = []
    execute(run, there, compute, lambda row: seen.append(row.epoch))
    assert seen == [1, 2, 3, 4, 5, 6]
    assert_equal(outcome(run, there), undisturbed)
    writes = [line for line in writes_since(store, num_before) if not line.endswith(".lease")]
    assert writes
    assert not [line for line in writes if "/teachers/" in line or "/cache/" in line]  # they are not made again
    assert len([line for line in writes if line.endswith("/checkpoint.pt")]) <= 3

    again = machines.at("c")
    execute(run, again, compute, lambda row: seen.append(row.epoch))
    assert seen[6:] == [1, 2, 3, 4, 5, 6]
    assert_equal(outcome(run, again), undisturbed)
    assert files_of(run_folder(run, again).path) == files_of(run_folder(run, plain).path)
    assert not [name for name in in_store(again) if "checkpoint" in name or name.endswith((".lease", ".lock", ".tmp"))]
    assert {name.split("/")[0] for name in in_store(again)} == {"runs", "teachers", "cache"}
    assert not [name for name in in_store(again) if name.startswith("cache/images/")]


def test_a_run_whose_newest_checkpoint_is_damaged_in_the_store_goes_on_from_the_one_before(
    run: RunConfig, machines: Machines, compute: Compute, plain: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    execute(run, plain, compute)
    here = machines.at("a")
    with pytest.raises(Stopped):
        execute(run, here, compute, stop_after(4))
    newest = run_folder(run, here).path / "checkpoint.pt"
    here.write(newest, newest.read_bytes()[:-100])
    there = machines.at("b")
    with caplog.at_level(logging.WARNING):
        execute(run, there, compute)
    assert "the one before is used" in caplog.text
    assert_equal(outcome(run, there), outcome(run, plain))


def test_a_kill_between_a_checkpoints_rename_and_its_upload_costs_an_epoch(
    run: RunConfig, machines: Machines, compute: Compute, plain: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(run, plain, compute)
    here = machines.at("a")
    upload = ObjectStorage.upload

    def stop(self: ObjectStorage, path: Path) -> None:
        if path.name == "checkpoint.pt" and run_folder(run, here).path == path.parent and is_at.pop(0):
            raise Stopped
        upload(self, path)

    is_at = [False, False, False, True]
    monkeypatch.setattr(ObjectStorage, "upload", stop)
    with pytest.raises(Stopped):
        execute(run, here, compute)
    monkeypatch.undo()
    names = {name for name in in_store(here) if name.startswith("runs/") and "checkpoint" in name}
    assert {Path(name).name for name in names} == {"checkpoint.previous.pt"}
    there = machines.at("b")
    execute(run, there, compute)
    assert_equal(outcome(run, there), outcome(run, plain))
    machines.at("a")
    execute(run, here, compute)
    assert_equal(outcome(run, here), outcome(run, plain))


def test_refits_caches_and_prototypes_are_found_on_another_machine(
    run: RunConfig,
    machines: Machines,
    compute: Compute,
    plain: Storage,
    store: ObjectStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = run.with_overrides({"embedding_cache.mode": "cached"})
    whole = config.with_overrides({"val_fraction": 0.0})
    other = config.with_overrides({"classifier.schedule.learning_rate": config.classifier.schedule.learning_rate / 2})
    here = machines.at("a")
    execute(config, here, compute)
    value = refit(whole, here, compute)
    names = {name for name in in_store(here) if name.startswith(f"cache/{EMBEDDINGS.name}/")}
    assert len(names) == 2 * 2
    assert is_cached(config, machines.at("driver"))  # which has never seen the teacher
    num_before = len(store.requests())
    there = machines.at("b")
    with caplog.at_level(logging.INFO):
        execute(other, there, compute)
        assert refit(whole, there, compute) == value
        (run_folder(whole, there).path / "test.json").unlink()
        assert refit(whole, there, compute) == value
    assert "is computed" not in caplog.text
    assert "WARNING" not in caplog.text
    made = [line for line in writes_since(store, num_before) if not line.endswith(".lease")]
    assert not [line for line in made if any(name in line for name in ("/cache/", "/teachers/", "/test.json"))]
    execute(other, plain, compute)
    assert_equal(outcome(other, there), outcome(other, plain))


def test_a_finished_run_that_was_killed_before_its_upload_is_uploaded(
    run: RunConfig, machines: Machines, compute: Compute
) -> None:
    here = machines.at("a")
    execute(run, here, compute)
    assert isinstance(here, ObjectStorage)
    for folder in (run_folder(run, here), teacher_folder(run, here)):
        for name in ("result.json", "model.pt"):
            obstore.delete(here._store, f"{folder.path.relative_to(here.root).as_posix()}/{name}")
    execute(run, machines.at("a"), compute)
    pretrain_once(run, here, compute)
    there = machines.at("b")
    for folder in (run_folder(run, there), teacher_folder(run, there)):
        assert folder.result() is not None


def _train(url: str, config: dict[str, Any]) -> None:
    torch.set_num_threads(1)  # as here: the sums of several are other ones
    execute(RunConfig.from_dict(config), Storage.open(url), Compute(torch.device("cpu"), "float32"))


def test_a_machine_that_is_killed_at_any_moment_leaves_what_another_goes_on_from(
    run: RunConfig, machines: Machines, compute: Compute, plain: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next machine takes over when the dead one's lease is lost."""
    monkeypatch.setattr("refilled.storage.lease.LOST_S", 2.0)
    monkeypatch.setattr("refilled.storage.lease.RENEW_S", 0.5)
    execute(run, plain, compute)
    context = multiprocessing.get_context("spawn")
    for number in range(4):
        machines.at(f"machine {number}")
        process = context.Process(target=_train, args=(machines.url, run.to_dict()), daemon=True)
        process.start()
        time.sleep(4.0 + 0.7 * number)  # importing torch takes about 3 s
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    there = machines.at("last")
    execute(run, there, compute)
    assert_equal(outcome(run, there), outcome(run, plain))


# ---- a store that is away -------------------------------------------------------------------------------------------


def test_a_store_that_is_away_for_a_moment_ends_no_run(
    run: RunConfig, compute: Compute, plain: Storage, own_store: tuple[ObjectStore, Machines]
) -> None:
    store, machines = own_store
    here = machines.at("a")

    def lose(row: EpochMetrics) -> None:
        if row.epoch == 2:
            store.pause()
            threading.Timer(3.0, store.go_on).start()

    started_s = time.monotonic()
    execute(run, here, compute, lose)
    assert time.monotonic() - started_s > 3
    assert run_folder(run, here).result() is not None
    execute(run, plain, compute)
    assert_equal(outcome(run, here), outcome(run, plain))


def test_a_store_that_starts_again_is_written_to_again(own_store: tuple[ObjectStore, Machines]) -> None:
    """It refuses connections meanwhile. The server forgets what it had, so one file has to do."""
    store, machines = own_store
    here = machines.at("a")
    path = here.root / "searches" / "file"
    path.parent.mkdir(parents=True)
    here.write(path, b"1")
    store.stop()
    starting = threading.Timer(2.0, store.start)
    starting.start()
    here.write(path, b"2")
    starting.join()
    there = machines.at("b")
    assert there.fetch(there.root / "searches" / "file")
    assert (there.root / "searches" / "file").read_bytes() == b"2"


def test_a_store_that_stays_away_is_an_error_of_one_line(
    own_store: tuple[ObjectStore, Machines], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_storage, "PATIENCE_S", 1.0)
    store, machines = own_store
    here = machines.at("a")
    store.stop()
    path = here.root / "runs" / "1"
    path.parent.mkdir(parents=True)
    with pytest.raises(OSError, match=r"s3://refilled/folder fails for runs/1: ") as failed:
        here.write(path, b"1")
    assert "\n" not in str(failed.value)
    assert path.read_bytes() == b"1"  # it is here


def test_a_teacher_whose_cache_the_store_does_not_take_is_used_here(
    run: RunConfig,
    compute: Compute,
    machines: Machines,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    here = machines.at("a")
    pretrain_once(run, here, compute)

    def fail(self: ObjectStorage, folder: Path, names: list[str]) -> None:
        raise OSError("the store fails")

    monkeypatch.setattr(ObjectStorage, "publish", fail)
    embed_once(run, here, compute)
    assert caplog.text.count("stays on this machine (the store fails)") == 2  # prototypes, embeddings
    assert len(list((here.root / "cache" / EMBEDDINGS.name).glob("*/manifest.json"))) == 1
    assert not [name for name in in_store(here) if name.startswith("cache/")]
