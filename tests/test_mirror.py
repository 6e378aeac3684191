"""Storage in an object store: a real server, and machines that share nothing but it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from object_store import ObjectStore

from refilled.config import RunConfig
from refilled.embedding_cache.rows import ROWS
from refilled.errors import UserError
from refilled.execution import execute, pretrain_once, refit, run_folder
from refilled.storage import mirror
from refilled.storage.mirror import open_storage
from refilled.storage.store import append_bytes, read_json, write_bytes, write_json
from refilled.storage.tensor_file import load_tensors
from refilled.teacher import teacher_folder
from refilled.training.compute import Compute


class Stopped(Exception):  # noqa: N818  # not an error
    """What ends a run in the middle."""


class Machines:
    """Working folders of machines; this process is at one at a time."""

    def __init__(self, folder: Path, store: ObjectStore, name: str, patch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._patch = patch
        self.url = f"s3://{store.bucket}/{name}"
        for variable, value in store.environment.items():
            patch.setenv(variable, value)

    def at(self, name: str) -> Path:
        """Go to a machine, whose processes know nothing of the others; its storage folder."""
        self._patch.setattr(mirror, "_mirrors", {})
        self._patch.setenv(mirror.WORK_FOLDER, str(self._folder / name))
        return open_storage(self.url)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    store = ObjectStore(tmp_path_factory.mktemp("store"))
    store.start()
    yield store
    store.stop()


@pytest.fixture
def machines(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Machines:
    return Machines(tmp_path, store, request.node.name.replace("[", "-").rstrip("]"), monkeypatch)


@pytest.fixture(scope="module")
def run() -> RunConfig:
    from refilled.presets import smoke

    return smoke().run.with_overrides({"epochs": (2, 4), "teacher_epochs": 2, "overlap": 0.4})


def outcome(config: RunConfig, storage: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    folder = run_folder(config, storage)
    times = ("epoch_s", "images_per_second")
    rows = [{name: value for name, value in row.items() if name not in times} for row in folder.rows()]
    return rows, load_tensors(folder.path / "model.pt")["weights"]


def assert_equal(first: tuple[Any, dict[str, torch.Tensor]], second: tuple[Any, dict[str, torch.Tensor]]) -> None:
    assert first[0] == second[0]
    assert first[1].keys() == second[1].keys()
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_files_come_to_other_machines_as_they_are(machines: Machines) -> None:
    here = machines.at("a")
    for name in ("runs/1", "cache", "tracking", "banks/1.partial"):
        (here / name).mkdir(parents=True)
    write_json(here / "runs/1/config.json", {"a": 1})
    append_bytes(here / "runs/1/metrics.jsonl", b"1\n")
    append_bytes(here / "runs/1/metrics.jsonl", b"2\n")
    write_bytes(here / "cache/images", b"many")
    write_bytes(here / "tracking/journal", b"told")
    write_bytes(here / "studies.db", b"trials")
    write_bytes(here / "banks/1.partial/meta.json", b"half")
    write_json(here / "summary.json", [])
    there = machines.at("b")
    assert read_json(there / "runs/1/config.json") == {"a": 1}
    mirror.pull(there / "runs/1")
    assert (there / "runs/1/metrics.jsonl").read_bytes() == b"1\n2\n"
    assert read_json(there / "summary.json") == []
    mirror.pull(there / "banks")
    assert not (there / "banks").exists()
    for name in ("cache/images", "tracking/journal", "studies.db"):
        assert not mirror.fetch(there / name)
    machines.at("a")
    append_bytes(here / "runs/1/metrics.jsonl", b"3\n")
    mirror.remove(here / "runs/1/config.json")
    machines.at("b")
    mirror.refresh(there / "runs/1/metrics.jsonl")
    assert (there / "runs/1/metrics.jsonl").read_bytes() == b"1\n2\n3\n"
    machines.at("c")
    with pytest.raises(FileNotFoundError):
        read_json(open_storage(machines.url) / "runs/1/config.json")


def test_a_plain_folder_has_no_mirror(tmp_path: Path) -> None:
    assert open_storage(str(tmp_path)) == tmp_path
    assert mirror.location_of(tmp_path) == str(tmp_path)
    write_bytes(tmp_path / "file", b"")
    mirror.pull(tmp_path)
    assert not mirror.fetch(tmp_path / "other")


@pytest.mark.parametrize(
    "url",
    [
        "s3://no-such-bucket/folder",
        "ftp://bucket/folder",
        "s3://",
        "s3:///folder",
        "gs:// /",
        "https://host/x",
    ],
)
def test_what_is_no_store_is_one_sentence(url: str, machines: Machines) -> None:
    with pytest.raises(UserError, match="storage must be") as refused:
        open_storage(url)
    assert "\n" not in str(refused.value)


def test_settings_in_a_url_are_refused(machines: Machines) -> None:
    with pytest.raises(UserError, match="storage must have no settings in its URL"):
        open_storage("s3://a/b?scheme=http")


def test_a_run_goes_on_on_another_machine(
    run: RunConfig, machines: Machines, compute: Compute, tmp_path: Path, store: ObjectStore
) -> None:
    execute(run, tmp_path / "plain", compute)
    undisturbed = outcome(run, tmp_path / "plain")

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 4:
            raise Stopped

    with pytest.raises(Stopped):
        execute(run, machines.at("a"), compute, stop)
    num_before = len(store.requests())
    there = machines.at("b")
    seen: list[int] = []
    execute(run, there, compute, lambda row: seen.append(row["epoch"]))
    assert seen == [1, 2, 3, 4, 5, 6]
    assert_equal(outcome(run, there), undisturbed)
    writes = [line for line in store.requests()[num_before:] if line.startswith(("PUT", "POST"))]
    assert not [line for line in writes if "/teachers/" in line]  # it was not trained again
    assert not [line for line in writes if "/cache/" in line]

    again = machines.at("c")
    execute(run, again, compute, seen.append)
    assert_equal(outcome(run, again), undisturbed)
    folder = run_folder(run, again).path
    assert files_of(folder) - {f"../{folder.name}.lock"} == files_of(run_folder(run, tmp_path / "plain").path)


def test_a_run_whose_newest_checkpoint_is_damaged_in_the_store_goes_on_from_the_one_before(
    run: RunConfig, machines: Machines, compute: Compute, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    execute(run, tmp_path / "plain", compute)

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 4:
            raise Stopped

    here = machines.at("a")
    with pytest.raises(Stopped):
        execute(run, here, compute, stop)
    newest = run_folder(run, here).path / "checkpoint.pt"
    write_bytes(newest, newest.read_bytes()[:-100])
    there = machines.at("b")
    with caplog.at_level(logging.WARNING):
        execute(run, there, compute)
    assert "the one before is used" in caplog.text
    assert_equal(outcome(run, there), outcome(run, tmp_path / "plain"))


def test_refits_banks_prototypes_and_shared_stages_are_found_on_another_machine(
    run: RunConfig,
    machines: Machines,
    compute: Compute,
    tmp_path: Path,
    store: ObjectStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = run.with_overrides({"bank.mode": "bank"})
    whole = config.with_overrides({"val_fraction": 0.0})
    other = config.with_overrides({"classifier.schedule.learning_rate": config.classifier.schedule.learning_rate / 2})
    here = machines.at("a")
    execute(config, here, compute, share_embeddings=True)
    value = refit(whole, here, compute)
    banks = {path.name for path in (here / "banks").iterdir() if path.is_dir()}
    assert len(banks) == 2
    there = machines.at("b")
    num_before = len(store.requests())
    with caplog.at_level(logging.INFO):
        seen: list[dict[str, Any]] = []
        execute(other, there, compute, seen.append, share_embeddings=True)
        assert refit(whole, there, compute) == value
        (run_folder(whole, there).path / "test.json").unlink()
        assert refit(whole, there, compute) == value
    assert "is built" not in caplog.text
    assert [row.get("shared", False) for row in seen] == [True, True, False, False, False, False]
    writes = [line for line in store.requests()[num_before:] if line.startswith(("PUT", "POST"))]
    made = "/banks/", "/prototypes/", "/teachers/", "/test.json"
    assert not [line for line in writes if any(name in line for name in made)]
    assert {path.name for path in (there / "banks").iterdir() if path.is_dir()} <= banks
    plain = tmp_path / "plain"
    execute(other, plain, compute)
    rows, weights = outcome(other, there)
    for row in rows:
        row.pop("shared", None)
    assert_equal((rows, weights), outcome(other, plain))


def test_a_bank_that_is_damaged_in_the_store_is_built_again_and_replaced(
    run: RunConfig, machines: Machines, compute: Compute, caplog: pytest.LogCaptureFixture
) -> None:
    config = run.with_overrides({"bank.mode": "bank", "epochs": (1, 1)})
    here = machines.at("a")
    execute(config, here, compute)
    (bank,) = (path for path in (here / "banks").iterdir() if path.is_dir())
    whole = (bank / ROWS).read_bytes()
    source = mirror.mirror_of(bank)
    assert source is not None
    (bank / ROWS).write_bytes(bytes(len(whole)))
    source.push(bank / ROWS)
    there = machines.at("b")
    with caplog.at_level(logging.INFO):
        execute(config.with_overrides({"seed": 1}), there, compute)
    assert "is built" in caplog.text
    target = there / "banks" / bank.name / ROWS
    assert target.read_bytes() == whole
    again = machines.at("c")
    again.mkdir(parents=True)
    source = mirror.mirror_of(again)
    assert source is not None
    assert source.download(again / "banks" / bank.name / ROWS, again / "rows")
    assert (again / "rows").read_bytes() == whole


def test_a_finished_run_that_was_killed_before_its_upload_is_uploaded(
    run: RunConfig, machines: Machines, compute: Compute
) -> None:
    here = machines.at("a")
    execute(run, here, compute)
    for folder in (run_folder(run, here), teacher_folder(run, here)):
        source = mirror.mirror_of(here)
        assert source is not None
        for name in ("result.json", "model.pt"):
            source.remove(folder.path / name)
    execute(run, machines.at("a"), compute)
    pretrain_once(run, here, compute)
    there = machines.at("b")
    for path in (run_folder(run, there), teacher_folder(run, there)):
        assert path.result() is not None


def _train(url: str, config: dict[str, Any]) -> None:
    torch.set_num_threads(1)  # as here: the sums of several are other ones
    execute(RunConfig.from_dict(config), open_storage(url), Compute(torch.device("cpu"), "float32"))


def test_a_machine_that_is_killed_at_any_moment_leaves_what_another_goes_on_from(
    run: RunConfig, machines: Machines, compute: Compute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(run, tmp_path / "plain", compute)
    context = multiprocessing.get_context("spawn")
    for number in range(4):
        machines.at(f"machine {number}")
        process = context.Process(target=_train, args=(machines.url, run.to_dict()))
        process.start()
        time.sleep(4.0 + 0.7 * number)  # importing torch takes about 3 s
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    there = machines.at("last")
    execute(run, there, compute)
    assert_equal(outcome(run, there), outcome(run, tmp_path / "plain"))


def test_a_store_that_is_away_for_a_moment_ends_no_run(
    run: RunConfig, tmp_path: Path, compute: Compute, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = ObjectStore(tmp_path)
    own.start()
    machines = Machines(tmp_path, own, "folder", monkeypatch)

    def lose(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            own.pause()

    def bring_back(wait_s: float) -> None:
        if wait_s > 1:  # it has failed twice
            own.go_on()

    monkeypatch.setattr(mirror.time, "sleep", bring_back)
    monkeypatch.setitem(mirror._TIMEOUTS_S, "request_timeout", 0.5)
    here = machines.at("a")
    try:
        with caplog.at_level(logging.WARNING):
            execute(run, here, compute, lose)
    finally:
        own.stop()
    assert "fails" in caplog.text
    assert run_folder(run, here).result() is not None
