"""A cluster on this machine that Ray's autoscaler makes larger and smaller, its nodes being processes.

Ray's own `AutoscalingCluster` needs a file that its wheel lacks, and ends every Ray of the machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from commands import free_port
from job_head import Head
from processes import TITLES, belonging, kill

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
HEAD_ID = f"{0:0>56}".replace("0", "f", 51)  # the provider's name for the head, by which the autoscaler knows it


class AutoscalingCluster(Head):
    """A head without CPUs, and as many nodes of one CPU as are asked for.

    Args:
        max_nodes: beside the head.
        idle_s: after which an idle node ends.
    """

    def __init__(self, max_nodes: int, idle_s: float) -> None:
        super().__init__()
        self._max_nodes = max_nodes
        self._idle_s = idle_s

    def set_up(self) -> None:
        """Start the head, with the autoscaler beside it."""
        path = self.folder / "autoscaler.json"
        path.write_text(json.dumps(self._configuration))
        own = {
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "AUTOSCALER_METRIC_PORT": str(free_port()),
            # A node that does not answer is lost after 6 s instead of 30.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "5000",
        }
        ray = Path(sys.executable).parent / "ray"
        self.start(ray, self.environment | own, "--num-cpus=0", f"--autoscaling-config={path}")

    @property
    def _configuration(self) -> dict[str, Any]:
        """As for Ray's cluster launcher, whose keys it must all have."""
        stages = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
        provider = {
            "type": "external",
            "module": PROVIDER,
            "gcs_address": f"127.0.0.1:{self.port}",
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        }
        node = {"resources": {"CPU": 1, "object_store_memory": 100 * 2**20}, "node_config": {}, "min_workers": 0}
        return {
            "cluster_name": "one-machine",
            "provider": provider,
            "max_workers": self._max_nodes,
            "idle_timeout_minutes": self._idle_s / 60,
            "upscaling_speed": 1.0,
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                "node": node | {"max_workers": self._max_nodes},
            },
            **{f"{name}_commands": [] for name in stages},
            **{name: {} for name in ("auth", "docker", "file_mounts")},
            **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
            "file_mounts_sync_continuously": False,
        }

    @property
    def nodes(self) -> set[int]:
        """Process ids of the raylets, the head's aside."""
        return {pid for pid, title in belonging(self.folder).items() if _is_node(title)}

    def trials_on(self, node: int) -> list[int]:
        """Processes that train on a node."""
        processes = belonging(self.folder)
        return [pid for pid in _children(node) if processes.get(pid, "").startswith(TITLES["trial"])]

    def lose(self, node: int) -> None:
        """SIGKILL to a node's raylet and everything that it started."""
        for pid in [node, *_children(node)]:
            kill(pid)


def _is_node(title: str) -> bool:
    return title.partition(" ")[0].endswith("/raylet") and "node:__internal_head__" not in title


def _children(parent: int) -> list[int]:
    path = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []
