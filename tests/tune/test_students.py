"""Students in real MLflow stores: by URI, and registered as champions, by whoever said so last."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow_server import Server

import refilled
from refilled.errors import UserError
from refilled.execution import refit, run_folder
from refilled.presets import smoke
from refilled.storage import Storage
from refilled.storage.run_folder import RunFolder
from refilled.training.compute import Compute
from tune.sync import command as sync
from tune.tracking.store import open_store
from tune.tracking.tracker import Tracker, resolve_tracking_uri

WAIT_S = 30.0


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, RunFolder]:
    """A store, the id of a refit in it, and the refit's folder."""
    storage = Storage.open(tmp_path_factory.mktemp("storage"))
    run = dataclasses.replace(smoke().run, method="student", epochs=(0, 1), val_fraction=0.0, precision="bfloat16")
    refit(run, storage, Compute(torch.device("cpu"), "bfloat16"))
    folder = run_folder(run, storage)
    uri = resolve_tracking_uri(None, storage)
    with Tracker(uri, "students", storage) as tracker:
        tracker.start_search("search", name="search", params={}, tags={"kind": "search"})
        tracker.open_run("refit", name="refit", params={}, tags={"kind": "refit"}, folder=folder.path)
        tracker.close_run("refit", status="FINISHED", metrics={}, artifacts=folder.path)
        assert tracker.flush(WAIT_S)
        run_id = tracker.run_id("refit")
    assert run_id is not None
    return uri, run_id, folder


def test_a_runs_uri_is_enough(logged: tuple[str, str, RunFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    uri, run_id, folder = logged
    images = torch.randint(0, 256, (9, 1, 8, 8), dtype=torch.uint8)
    expected = refilled.load(folder.path).logits(images)
    by_argument = refilled.load(f"runs:/{run_id}", tracking_uri=uri)
    assert by_argument.compute.precision == "bfloat16"
    assert torch.equal(by_argument.logits(images), expected)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert torch.equal(refilled.load(f"runs:/{run_id}/model").logits(images), expected)


def test_what_mlflow_does_not_have_is_one_sentence(
    logged: tuple[str, str, RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, _, _ = logged
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    wrong = {
        "tracking_uri must be given, or MLFLOW_TRACKING_URI be set": ("runs:/abc", None),
        "runs:/abc must be a run with a student in MLflow at sqlite": ("runs:/abc", uri),
        "models:/nobody@champion must be a run with a student": ("models:/nobody@champion", uri),
        "models:/nobody/1 must be a run with a student": ("models:/nobody/1", uri),
        "there is no file": ("runs:/abc", f"sqlite:///{tmp_path}/none.db"),
    }
    for message, (source, where) in wrong.items():
        with pytest.raises(UserError, match=message) as caught:
            refilled.load(source, tracking_uri=where)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=["sqlite", "server"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return resolve_tracking_uri(None, Storage.open(tmp_path / "storage"))
    return str(request.getfixturevalue("server").uri)


def end_refit(tracker: Tracker, storage: Storage, key: str, digest: str = "") -> None:
    """A refit with something for an MLflow model; what registers it does not look inside."""
    folder = storage.root / "runs" / key
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "MLmodel").write_text(digest or key)
    tracker.open_run(key, name=key, params={}, tags={"kind": "refit", "method": key}, folder=folder)
    tracker.close_run(key, status="FINISHED", metrics={"n": 1.0}, artifacts=folder, artifacts_digest=digest)


def champion(client: MlflowClient, name: str) -> str:
    version = client.get_model_version_by_alias(name, "champion")
    assert version.run_id is not None
    return client.get_run(version.run_id).data.tags["run_key"]


def test_the_champion_is_who_was_said_to_be_last(store: str, tmp_path: Path) -> None:
    """Within a search and across searches, each twice, in this store and, sent all at once, in another."""
    storage, name, experiment = Storage.open(tmp_path / "storage"), f"model-{uuid.uuid4().hex}", uuid.uuid4().hex
    with Tracker(store, experiment, storage) as tracker:
        tracker.start_search("b-first", name="first", params={}, tags={"kind": "search"})
        end_refit(tracker, storage, "one")
        end_refit(tracker, storage, "two")
        client = open_store(store, create=False)
        for key in ("one", "two", "one"):
            tracker.register(key, name)
            assert tracker.flush(WAIT_S)
            assert champion(client, name) == key
        end_refit(tracker, storage, "one")  # ended again as before, it stays what it is
        assert tracker.flush(WAIT_S)
        tracker.finish_search(status="FINISHED")
    assert len(client.search_model_versions(f"name = '{name}'")) == 2
    with Tracker(store, experiment, storage) as tracker:
        tracker.start_search("a-second", name="second", params={}, tags={"kind": "search"})
        end_refit(tracker, storage, "three")
        tracker.register("three", name)
        tracker.finish_search(status="FINISHED")
    assert champion(client, name) == "three"
    copy = f"sqlite:///{tmp_path}/copy/mlflow.db"
    assert sync([str(storage.root), "--tracking-uri", copy]) == 0  # the first search after the second
    copied = open_store(copy, create=False)
    assert champion(copied, name) == "three"
    # What lost the name within its search is not registered where it never had it.
    assert {version.tags["method"] for version in copied.search_model_versions(f"name = '{name}'")} == {"one", "three"}


def test_artifacts_that_changed_are_sent_again(store: str, tmp_path: Path) -> None:
    storage = Storage.open(tmp_path / "storage")
    with Tracker(store, uuid.uuid4().hex, storage) as tracker:
        tracker.start_search("search", name="search", params={}, tags={"kind": "search"})
        for digest in ("first", "second"):
            end_refit(tracker, storage, "refit", digest)
            assert tracker.flush(WAIT_S)
        run_id = tracker.run_id("refit")
    assert run_id is not None
    client = open_store(store, create=False)
    assert Path(client.download_artifacts(run_id, "model/MLmodel", str(tmp_path))).read_text() == "second"


def test_a_champion_is_registered_when_mlflow_is_back(server: Server, tmp_path: Path) -> None:
    storage, name = Storage.open(tmp_path / "storage"), f"model-{uuid.uuid4().hex}"
    with Tracker(server.uri, uuid.uuid4().hex, storage) as tracker:
        tracker.start_search("search", name="search", params={}, tags={"kind": "search"})
        assert tracker.flush(WAIT_S)
        server.kill()
        end_refit(tracker, storage, "refit")
        tracker.register("refit", name)
        assert not tracker.flush(1.0)
        server.start()
        tracker.finish_search(status="FINISHED")
    assert champion(open_store(server.uri, create=False), name) == "refit"
