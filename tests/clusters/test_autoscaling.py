"""A search on a cluster that begins with no node, loses one on the way, and is left with none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from autoscaling_cluster import AutoscalingCluster
from commands import Command, LocalPlace
from end_state import differences, end_state
from processes import belonging, working_as

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

SEARCH = (
    "tune/search.py smoke --deterministic --trial-batch 2 --overlaps 1 --trials 7 --epochs 10 20 --teacher-epochs 4 "
    "--seeds 1 --no-forecast"
)
PATIENCE_S = 120.0


@pytest.fixture
def cluster() -> Iterator[AutoscalingCluster]:
    with AutoscalingCluster(max_nodes=3, idle_s=6.0) as started:
        yield started
    assert belonging(started.folder) == {}


def until(is_so: Callable[[], object], what: str) -> float:
    """Wait for something; when it was so, on the clock of `time.monotonic`."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.1)
    return time.monotonic()


def test_a_search_grows_replaces_and_shrinks_a_cluster(cluster: AutoscalingCluster, tmp_path: Path) -> None:
    """Invariant 3, on nodes that come and go; how long each step took is printed."""
    command = Command(SEARCH, tmp_path / "autoscaled", cluster)
    assert cluster.nodes == set()
    began_s = time.monotonic()
    command.start()
    try:
        first_node_s = until(lambda: cluster.nodes, "no node came")
        first_trial_s = until(lambda: working_as("trial", cluster.folder), "no trial began")
        grown_s = until(lambda: len(cluster.nodes) == 3, "there were never three nodes")
        until(lambda: all(cluster.trials_on(node) for node in cluster.nodes), "a node had no trial")
        before, lost_s = cluster.nodes, time.monotonic()
        cluster.lose(min(before))
        replaced_s = until(lambda: cluster.nodes - before, "no node came in the place of the lost one")
        until(lambda: any(cluster.trials_on(node) for node in cluster.nodes - before), "the new node had no trial")
        working_again_s = time.monotonic()
        command.finish()
    finally:
        command.end()
    ended_s = time.monotonic()
    gone_s = until(lambda: not cluster.nodes, "idle nodes stayed")
    print(
        f"\nfirst node after {first_node_s - began_s:.1f} s, first trial after {first_trial_s - began_s:.1f} s, "
        f"3 nodes after {grown_s - began_s:.1f} s; a lost node was replaced after {replaced_s - lost_s:.1f} s, the new "
        f"one had a trial after {working_again_s - lost_s:.1f} s; the search took {ended_s - began_s:.1f} s, the last "
        f"node ended {gone_s - ended_s:.1f} s later"
    )
    undisturbed = tmp_path / "undisturbed"
    with LocalPlace() as place:
        Command(SEARCH, undisturbed, place).finish()
    assert differences(end_state(undisturbed), end_state(tmp_path / "autoscaled")) == []
