import logging
import secrets

import pytest


@pytest.fixture(scope="session")
def ray_environment(tmp_path_factory):
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
def local_ray(ray_environment):
    """A real local Ray of two CPUs; shut down after the module."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield
    ray.shutdown()
