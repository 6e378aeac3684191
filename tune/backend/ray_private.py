"""All that is used of Ray beyond its public API, read-only; written against Ray 2.60.

Ray has no public function for any of it. Where another version has moved what only
advises, a search goes on without the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refilled.errors import UserError


def require_answer(address: str, timeout_s: float) -> None:
    """Ask a cluster once. `ray.init` asks 20 times, a minute each where nobody answers, with Ray's lines on stderr.

    Raises:
        UserError: Nobody answers, or the cluster asks for another token.
    """
    try:
        import grpc  # type: ignore[import-untyped]  # its types are a package of their own
        from ray._private.grpc_utils import init_grpc_channel
        from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest
        from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
    except ImportError:  # another version of Ray
        return
    with init_grpc_channel(address) as channel:
        try:
            cluster = NodeInfoGcsServiceStub(channel)
            cluster.GetClusterId(GetClusterIdRequest(), timeout=timeout_s, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise UserError(
                    f"RAY_AUTH_MODE must be token and RAY_AUTH_TOKEN_PATH a file with the token of the Ray cluster at "
                    f"{address}, which refuses the present one."
                ) from error
            raise UserError(
                f"RAY_ADDRESS must name a running Ray cluster, got {address!r} (no answer within {timeout_s:g} s)."
            ) from error


def reported_node_groups() -> list[tuple[Mapping[str, float], int]] | None:
    """Node groups that an autoscaler has reported to the connected cluster: resources of a node, and most nodes.

    Returns:
        The groups, -1 nodes where there is no limit; none where no autoscaler has reported any.
    """
    try:
        from ray._private.state import state

        config = state.get_cluster_config()
    except (ImportError, AttributeError):  # another version of Ray
        return None
    if config is None or not config.node_group_configs:
        return None
    return [(dict(group.resources), int(group.max_count)) for group in config.node_group_configs]


def autoscaler_file() -> Path | None:
    """The file that this machine's autoscaler process of the connected cluster was given."""
    import psutil
    import ray

    address = f"--gcs-address={ray.get_runtime_context().gcs_address}"
    for process in psutil.process_iter(["cmdline"]):
        words: Sequence[str] = process.info["cmdline"] or ()
        files = [word.partition("=")[2] for word in words if word.startswith("--autoscaling-config=")]
        if files and files[0] and address in words and any(word.endswith("monitor.py") for word in words):
            return Path(files[0]).expanduser()
    return None


def has_dashboard() -> bool:
    """Whether the connected Ray has a dashboard."""
    from ray._private.worker import get_dashboard_url

    return bool(get_dashboard_url())


def leave_interruptions(trainer: Any) -> Any:
    """The trainer, which catches no Ctrl-C while it fits: what interrupts a command is the command's to say."""
    assert hasattr(trainer, "_register_sigint_handler"), "Ray Train has another way to catch Ctrl-C now"
    trainer._register_sigint_handler = lambda controller: None
    return trainer
