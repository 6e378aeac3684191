from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from refilled.config import SearchConfig
from refilled.errors import UserError
from tune.backend import nodes, ray_private
from tune.backend.cluster import MAX_SLOTS, PROCESS_BYTES, fit, fit_nodes, workers_per_gpu
from tune.backend.nodes import Nodes, launcher_nodes, may_grow_to, nodes_now

GIB = 2**30


def slots(now: list[Nodes], largest: list[Nodes] | None = None, **search: Any) -> tuple[int, int]:
    resources = fit_nodes(SearchConfig(**search), now, now if largest is None else largest)
    return resources.slots_now, resources.slots


def test_workers_are_counted_node_by_node() -> None:
    two = [Nodes(2, 0), Nodes(2, 0)]
    assert slots(two) == (4, 4)
    assert slots(two, cpus_per_worker=1.5) == (2, 2)  # the cluster's 4 CPUs would hold 2.67
    assert slots([Nodes(3, 0), Nodes(3, 0)], cpus_per_worker=2.0) == (2, 2)  # and its 6 would hold 3
    assert slots([Nodes(3, 0, count=5)], cpus_per_worker=3.0) == (5, 5)


def test_the_workers_of_a_trial_may_lie_on_several_nodes() -> None:
    two = [Nodes(2, 0), Nodes(2, 0)]
    assert slots(two, workers_per_trial=2) == (2, 2)
    assert slots(two, workers_per_trial=3) == (1, 1)
    assert slots(two, workers_per_trial=4) == (1, 1)


def test_gpus_limit_as_cpus_do_and_a_share_of_a_gpu_does_not_span_two() -> None:
    node = [Nodes(16, 2)]
    assert slots(node, gpus_per_worker=1.0) == (2, 2)
    assert slots(node, gpus_per_worker=0.25) == (8, 8)
    assert slots(node, gpus_per_worker=0.4) == (4, 4)  # 2 GPUs / 0.4 would be 5
    assert slots(node, gpus_per_worker=0.1, cpus_per_worker=2.0) == (8, 8)
    assert slots(node, gpus_per_worker=2.0) == (1, 1)
    assert slots([Nodes(16, 0), Nodes(1, 4)], gpus_per_worker=1.0) == (1, 1)  # CPUs without a GPU beside them


def test_slots_are_those_of_the_cluster_at_its_largest_within_reason() -> None:
    head = Nodes(0, 0)
    assert slots([head], [head, Nodes(4, 0, count=3)]) == (0, 12)
    assert slots([Nodes(8, 0)], [Nodes(2, 0)]) == (8, 8)  # what is there counts, whatever the configuration says
    assert slots([Nodes(1, 0)], [Nodes(64, 0, count=1000)]) == (1, MAX_SLOTS)


def test_a_worker_that_fits_no_node_is_refused_with_the_numbers() -> None:
    with pytest.raises(UserError, match=r"one worker needs 3 CPUs and 0 GPUs, the largest node has 2 CPUs and 0 GPUs"):
        slots([Nodes(2, 0), Nodes(2, 0)], cpus_per_worker=3.0)
    with pytest.raises(UserError, match=r"one worker needs 1 CPUs and 1 GPUs, the largest node has 2 CPUs and 0 GPUs"):
        slots([Nodes(2, 0)], [Nodes(2, 0, count=9)], gpus_per_worker=1.0)


def test_a_trial_that_fits_no_cluster_is_refused_with_the_numbers() -> None:
    with pytest.raises(UserError, match=r"needs 5 workers of 2 CPUs and 0 GPUs, .* room for 4 \(9 CPUs and 0 GPUs"):
        slots([Nodes(1, 0)], [Nodes(1, 0), Nodes(2, 0, count=4)], workers_per_trial=5, cpus_per_worker=2.0)


def test_the_launchers_configuration_says_how_far_a_cluster_grows() -> None:
    config = {
        "max_workers": 5,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 1}, "max_workers": 0},
            "cpu": {"resources": {"CPU": 8}, "min_workers": 0, "max_workers": 4},
            "gpu": {"resources": {"CPU": 4, "GPU": 2}, "max_workers": 3},
            "unused": {"resources": {"CPU": 64}},
        },
    }
    assert launcher_nodes(config) == [Nodes(1, 0), Nodes(4, 2, 3), Nodes(8, 0, 2)]
    assert launcher_nodes({**config, "max_workers": 2}) == [Nodes(1, 0), Nodes(4, 2, 2)]


def test_workers_share_a_gpu_as_far_as_its_memory_goes() -> None:
    peak = 15 * GIB - PROCESS_BYTES
    assert workers_per_gpu(peak, 80 * GIB, 0.2) == 5
    assert workers_per_gpu(peak, 80 * GIB, 1.0) == 5
    assert workers_per_gpu(0, 0, 0.0) == 0  # on a CPU there is nothing to check
    with pytest.raises(UserError, match=r"at least 0.2: 0.1 puts 10 workers .* 15.00 GiB .* has 80.00 GiB, .* holds 5"):
        workers_per_gpu(peak, 80 * GIB, 0.1)
    with pytest.raises(UserError, match=r"smaller batches .* puts 1 workers .* holds 0"):
        workers_per_gpu(peak, 8 * GIB, 1.0)


@pytest.mark.ray
def test_fit_on_a_real_cluster(local_ray: None) -> None:
    assert nodes_now() == [Nodes(2.0, 0.0)]
    assert may_grow_to() is None
    resources = fit(SearchConfig(cpus_per_worker=0.5, workers_per_trial=2))
    assert (resources.slots, resources.slots_now) == (2, 2)
    with pytest.raises(UserError, match="one worker needs 3 CPUs"):
        fit(SearchConfig(cpus_per_worker=3.0))


@pytest.mark.ray
def test_node_groups_that_an_autoscaler_reported_count(local_ray: None) -> None:
    import ray
    from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig

    groups = [NodeGroupConfig(resources={"CPU": 3}, max_count=4), NodeGroupConfig(resources={"GPU": 1}, max_count=-1)]
    client = ray._private.worker.global_worker.gcs_client
    client.report_cluster_config(ClusterConfig(node_group_configs=groups).SerializeToString())
    try:
        assert may_grow_to() == [Nodes(3, 0, 4), Nodes(0, 1, nodes.MAX_NODES)]
        resources = fit(SearchConfig(cpus_per_worker=3.0))
        assert (resources.slots, resources.slots_now) == (4, 0)
    finally:
        client.report_cluster_config(ClusterConfig().SerializeToString())
    assert may_grow_to() is None


@pytest.mark.ray
def test_the_file_of_the_autoscalers_process_counts_where_it_is_this_clusters(local_ray: None, tmp_path: Path) -> None:
    import ray

    file, script = tmp_path / "cluster.yaml", tmp_path / "monitor.py"
    file.write_text("available_node_types: {a: {resources: {CPU: 5}, max_workers: 2}}\nhead_node_type: h\n")
    script.write_text("print('up', flush=True); input()\n")
    address = ray.get_runtime_context().gcs_address
    for gcs_address, expected in ((address, [Nodes(5, 0, 2)]), ("127.0.0.1:1", None)):
        command = [sys.executable, str(script), f"--autoscaling-config={file}", f"--gcs-address={gcs_address}"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            assert may_grow_to() == expected
            if expected:
                content = file.read_text()
                file.write_text("- no mapping\n")
                assert may_grow_to() is None
                file.write_text(content)
            process.communicate("\n")


def test_resources_say_threads_and_rays_words() -> None:
    resources = fit_nodes(SearchConfig(cpus_per_worker=2.5, gpus_per_worker=0.5), [Nodes(5, 1)], [])
    assert resources.num_threads == 2
    assert resources.per_worker == {"CPU": 2.5, "GPU": 0.5}
    assert dataclasses.replace(resources, gpus_per_worker=0.0).per_worker == {"CPU": 2.5}


@pytest.mark.ray
def test_what_is_private_of_ray_is_where_it_is_looked_for(local_ray: None) -> None:
    """All that `ray_private` imports, which passes over what another version has moved."""
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.state import state
    from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    assert ray.__version__.startswith("2.60."), "look at all that ray_private.py uses again, then at this test"
    assert callable(state.get_cluster_config)
    assert hasattr(NodeInfoGcsServiceStub(init_grpc_channel("127.0.0.1:1")), "GetClusterId")
    assert GetClusterIdRequest() is not None
    assert isinstance(ray_private.has_dashboard(), bool)
    ray_private.require_answer(ray.get_runtime_context().gcs_address, 10.0)
