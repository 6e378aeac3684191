"""A student by its URI in a real MLflow store."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import refilled
from refilled.errors import UserError
from refilled.execution import refit, run_folder
from refilled.presets import smoke
from refilled.storage import Storage
from refilled.storage.run_folder import RunFolder
from refilled.training.compute import Compute
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
