from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from users_files import NETWORK, TERM

from refilled.config import RunConfig
from refilled.presets import smoke
from refilled.training.compute import Compute


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage folder whose cache and teachers all tests of the session share."""
    return tmp_path_factory.mktemp("storage")


@pytest.fixture
def compute() -> Compute:
    return Compute(device=torch.device("cpu"), precision="float32")


@pytest.fixture
def digits_run() -> RunConfig:
    """A few seconds of two-stage training on real images."""
    return dataclasses.replace(smoke().run, overlap=0.4, epochs=(4, 8), teacher_epochs=8)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with a term and networks of the user's."""
    (tmp_path / "own.py").write_text(TERM)
    (tmp_path / "net.py").write_text(NETWORK)
    return tmp_path
