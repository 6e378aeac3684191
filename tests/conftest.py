from __future__ import annotations

import dataclasses
import logging
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from users_files import NETWORK, TERM

from refilled.config import RunConfig
from refilled.presets import smoke
from refilled.storage import Storage
from refilled.training.compute import Compute


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A storage whose images and teachers all tests of the session share."""
    return Storage.open(tmp_path_factory.mktemp("storage"))


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


@pytest.fixture(scope="session")
def ray_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What Ray's processes read when they start; one token for all Rays of the session, as the driver caches it.

    RAY_AUTH_MODE is left to `ray.init`, which turns tokens on for a new local Ray: set after `import ray` it would
    reach the servers, but not this process.
    """
    token = tmp_path_factory.mktemp("token") / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="module")
def local_ray(ray_environment: None) -> Iterator[None]:
    """A real local Ray of two CPUs; shut down after the module."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield
    ray.shutdown()
