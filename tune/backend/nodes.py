"""The nodes of a Ray cluster: those that are there, and those that its autoscaler may add."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tune.backend.ray_private import autoscaler_file, reported_node_groups

MAX_NODES = 1000  # of one kind, where the configuration sets no limit

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Nodes:
    """`count` nodes with this many CPUs and GPUs each."""

    cpus: float
    gpus: float
    count: int = 1

    def num_workers(self, cpus: float, gpus: float) -> int:
        """Workers of that size that one node holds; those of less than one GPU do not span two."""
        fitting = math.floor(self.cpus / cpus + 1e-9)
        if gpus >= 1:
            fitting = min(fitting, math.floor(self.gpus / gpus + 1e-9))
        elif gpus > 0:
            fitting = min(fitting, math.floor(self.gpus) * math.floor(1 / gpus + 1e-9))
        return fitting


def nodes_now() -> list[Nodes]:
    """The connected cluster's nodes that are alive."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Nodes(each.get("CPU", 0.0), each.get("GPU", 0.0)) for each in alive]


def may_grow_to() -> list[Nodes] | None:
    """The nodes of the connected cluster at its largest; none where nothing says so, as without an autoscaler.

    Two places say so. Some autoscalers report their node groups to Ray's own store. The one of Ray's cluster launcher
    is a process beside the head node that is given a file, which a driver on that node, such as a job's, can read.
    """
    groups = reported_node_groups()
    if groups is not None:
        return [_node(resources, MAX_NODES if count < 0 else count) for resources, count in groups]
    path = autoscaler_file()
    if path is None:
        return None
    import yaml  # type: ignore[import-untyped]  # its types are a package of their own

    try:
        return launcher_nodes(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        _log.warning("The autoscaler's file %s cannot be read (%r): only the nodes of now count.", path, error)
        return None


def launcher_nodes(config: Mapping[str, Any]) -> list[Nodes]:
    """The largest cluster that a configuration of Ray's cluster launcher allows.

    Args:
        config: A mapping with `available_node_types` (`resources`, `max_workers`), `head_node_type` and `max_workers`.
    """
    kinds, head = config["available_node_types"], config.get("head_node_type")
    nodes = [_node(kinds[head].get("resources", {}), 1)] if head in kinds else []
    most = int(config.get("max_workers", MAX_NODES))
    workers = [
        _node(kind.get("resources", {}), int(kind.get("max_workers", 0)))
        for name, kind in kinds.items()
        if name != head
    ]
    for each in sorted(workers, key=lambda node: (node.gpus, node.cpus), reverse=True):
        count = min(each.count, most)
        most -= count
        if count > 0:
            nodes.append(Nodes(each.cpus, each.gpus, count))
    return nodes


def _node(resources: Mapping[str, float], count: int) -> Nodes:
    return Nodes(float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0)), count)
