"""The network that the workers of a group talk over."""

from __future__ import annotations

import os
from typing import Any

INTERFACE = "GLOO_SOCKET_IFNAME"


def use_node_address() -> None:
    """Let gloo listen at the address by which Ray knows this machine, unless the environment names an interface.

    By itself it listens where the machine's own name leads, which on Debian, and in its images, is 127.0.1.1: workers
    on other machines would be refused there.
    """
    import psutil
    import ray.util

    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            os.environ.setdefault(INTERFACE, name)
            return


def torch_config() -> Any:
    """Ray Train's configuration of a group whose workers begin with `use_node_address`."""
    from ray.train.torch import TorchConfig

    plain = TorchConfig().backend_cls

    class Backend(plain):  # type: ignore[misc, valid-type]  # Ray has no types
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(use_node_address)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):  # type: ignore[misc]  # Ray has no types
        @property
        def backend_cls(self) -> Any:
            return Backend

    return Config()
