from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import Machines
from object_store import ObjectStore

from refilled.config import RunConfig
from refilled.presets import smoke


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
    """Machines with a folder of the store of their own."""
    return Machines(tmp_path, store, re.sub(r"\W+", "-", request.node.name).strip("-"), monkeypatch)


@pytest.fixture
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ObjectStore, Machines]]:
    """A store that may be harmed."""
    own = ObjectStore(tmp_path)
    own.start()
    yield own, Machines(tmp_path, own, "folder", monkeypatch)
    own.stop()


@pytest.fixture(scope="session")
def run() -> RunConfig:
    """A second of two-stage training."""
    return smoke().run.with_overrides({"epochs": (2, 4), "teacher_epochs": 2, "overlap": 0.4})
