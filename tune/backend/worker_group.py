"""Trials on several workers whose processes live from trial to trial.

The Tune trial's process, which Tune keeps for the next trial, is rank 0. It owns the helpers, ranks 1 and up: actors in
the other bundles of its placement group, so Tune accounts for all, and all end with the trial's process. A trial has a
process group of its own; its members leave the run at the same row, where rank 0 says to all whether it goes on.

A helper that ends in the middle of a run makes rank 0's next collective fail. Then there are new helpers, and the run
continues from its checkpoint.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from refilled import distributed
from refilled.metrics import EpochMetrics, Report
from tune.backend.cluster import Resources
from tune.backend.network import use_node_address
from tune.backend.worker import FINAL_ERRORS, Body, WorkersLostError, report_trial, work

MAX_REPEATS = 5
RENDEZVOUS_S = 60.0  # for all workers to find each other
START_S = 120.0  # for a helper's process to start, in a bundle that is there already
SETTLE_S = 30.0  # for helpers to leave a run that rank 0 has left
CAUSE_S = 5.0  # for Ray to see that a helper has ended, after rank 0's collective failed
STUCK_S = 60.0  # for rank 0 to leave a run that a helper has left


def group_trial(
    sample: Mapping[str, Any], *, arguments: Mapping[str, Any], resources: Resources, body: Body = work
) -> None:
    """One Tune trial on the workers of this process's group; the arguments are those of `tune.backend.worker.trial`.

    Args:
        sample: What the searcher suggests.
        arguments: The arguments of `work`.
        resources: Resources of the trial, whose placement group has a bundle for each worker.
        body: Takes the arguments of `work`, on every rank.
    """
    import ray.tune

    group = _group_of_this_process(resources)

    def train(report: Report) -> None:
        group.run(body, {"job": "run", "config": sample["config"], **arguments}, report)

    report_trial(train, ray.tune.report)


@dataclass(frozen=True)
class Membership:
    """Where a run's workers meet, and who one of them is."""

    host: str
    port: int
    rank: int
    world_size: int
    backend: str


class Helper:
    """A worker beside rank 0; one process, for many runs."""

    def ping(self) -> int:
        """This process's id, once it is up."""
        return os.getpid()

    def run(self, membership: Membership, body: Body, arguments: Mapping[str, Any]) -> Exception | None:
        """Take part in one run, until it ends or rank 0 leaves it.

        Returns:
            An error that is final, should the run end with one.
        """
        store = _store(membership.host, membership.port, is_master=False)
        with _process_group(store, membership):
            try:
                body(**arguments, on_report=_follow)
            except _LeftByRankZero:
                pass
            except FINAL_ERRORS as error:
                return error
        return None


class WorkerGroup:
    """Rank 0's side. Made inside a Tune trial; its helpers are started with the first run."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._helpers: list[Any] = []
        self._last_run: list[Any] = []  # what the helpers will return from it
        self._store: Any = None  # which they may still speak to

    def run(self, body: Body, arguments: Mapping[str, Any], report: Report) -> None:
        """Do a run on all workers; where a helper is lost, again, with new ones.

        Args:
            body: Takes the arguments and `on_report`, on every rank.
            arguments: The arguments of it.
            report: Takes the rows of rank 0; what it raises ends the run on all ranks, which stay alive.

        Raises:
            WorkersLostError: Helpers ended in every one of `1 + MAX_REPEATS` attempts.
        """
        for attempt in range(1 + MAX_REPEATS):
            self._make_ready()
            try:
                self._attempt(body, arguments, report)
            except _HelperFailedError as failure:
                self._dismiss()
                if attempt == MAX_REPEATS:
                    raise WorkersLostError(
                        f"A worker of the trial failed {1 + MAX_REPEATS} times: {failure}"
                    ) from failure
            else:
                return

    def _attempt(self, body: Body, arguments: Mapping[str, Any], report: Report) -> None:
        import ray.util

        host, backend = ray.util.get_node_ip_address(), "nccl" if self._resources.gpus_per_worker else "gloo"
        self._store = _store(host, 0, is_master=True)
        members = [
            Membership(host, self._store.port, rank, self._resources.num_workers, backend)
            for rank in range(self._resources.num_workers)
        ]
        self._last_run = [
            helper.run.remote(member, body, arguments)
            for helper, member in zip(self._helpers, members[1:], strict=True)
        ]
        is_over = threading.Event()
        threading.Thread(target=_end_if_stuck, args=(self._last_run, is_over), daemon=True).start()
        try:
            # A failed process group tells rank 0 little. While it still stands, no helper ends because rank 0 did.
            with _process_group(self._store, members[0], on_error=self._raise_if_a_helper_failed):
                body(**arguments, on_report=functools.partial(_lead, report))
        finally:
            is_over.set()

    def _raise_if_a_helper_failed(self) -> None:
        import ray
        import ray.exceptions

        ended, _ = ray.wait(self._last_run, num_returns=len(self._last_run), timeout=CAUSE_S)
        failures: list[Exception] = []
        for each in ended:
            try:
                outcome = ray.get(each)
            except ray.exceptions.RayError as error:
                failures.append(error)
            else:
                if outcome is not None:
                    raise outcome
        # Helpers that lost a dead one end too, maybe before Ray has seen the death that explains it.
        failures.sort(key=lambda error: not isinstance(error, ray.exceptions.RayActorError))
        if failures:
            raise _HelperFailedError(str(failures[0]).strip().splitlines()[-1]) from failures[0]

    def _make_ready(self) -> None:
        """Have all helpers idle; where one is not, or is gone, all are replaced."""
        import ray
        import ray.exceptions

        if self._last_run:
            _, busy = ray.wait(self._last_run, num_returns=len(self._last_run), timeout=SETTLE_S)
            self._last_run = []
            if busy:
                self._dismiss()
        try:
            ray.get([helper.ping.remote() for helper in self._helpers], timeout=SETTLE_S)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            self._dismiss()
        if not self._helpers:
            self._helpers = self._start()

    def _start(self) -> list[Any]:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundles = ray.util.get_current_placement_group()
        assert bundles is not None, "a group's rank 0 sits in the placement group of its trial"
        helpers = [
            ray.remote(Helper)
            .options(
                num_cpus=self._resources.cpus_per_worker,
                num_gpus=self._resources.gpus_per_worker,
                scheduling_strategy=PlacementGroupSchedulingStrategy(bundles, placement_group_bundle_index=rank),
            )
            .remote()
            for rank in range(1, self._resources.num_workers)
        ]
        ray.get([helper.ping.remote() for helper in helpers], timeout=START_S)
        return helpers

    def _dismiss(self) -> None:
        import ray

        for helper in self._helpers:
            ray.kill(helper)
        self._helpers = []


class _LeftByRankZero(Exception):  # noqa: N818  # not an error
    """Ends a helper's run where rank 0 ended its own."""


class _HelperFailedError(Exception):
    """Why a helper ended."""


@functools.cache
def _group_of_this_process(resources: Resources) -> WorkerGroup:
    """Kept from trial to trial: all trials of a process have the same resources."""
    return WorkerGroup(resources)


def _lead(report: Report, row: EpochMetrics) -> None:
    """Report on rank 0, and say to the helpers whether the run goes on."""
    try:
        report(row)
    except BaseException:  # Tune ends a trial by SystemExit
        with contextlib.suppress(RuntimeError):  # a helper that is gone needs no word
            distributed.agree(False)
        raise
    distributed.agree(True)


def _follow(row: EpochMetrics) -> None:
    if not distributed.agree(True):
        raise _LeftByRankZero


@contextlib.contextmanager
def _process_group(store: Any, member: Membership, on_error: Any = None) -> Iterator[None]:
    """The run's process group.

    Args:
        store: The store of torch.distributed; ends up connected to all workers.
        member: This worker.
        on_error: Called with the group still standing, when the block raises what is not final.
    """
    import torch
    import torch.distributed as dist

    if member.backend == "nccl":
        torch.cuda.set_device(0)  # Ray shows a worker its own devices only
    try:
        # Here a worker that never comes is missed for `RENDEZVOUS_S`. From here on torch waits as long as it does by
        # default, since one worker may read data while others wait; a process that ends is noticed at once.
        store.set(f"here {member.rank}", "")
        store.wait([f"here {rank}" for rank in range(member.world_size)])
        use_node_address()
        dist.init_process_group(member.backend, store=store, rank=member.rank, world_size=member.world_size)
        yield
    except FINAL_ERRORS:
        raise
    except Exception:
        if on_error is not None:
            on_error()
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _end_if_stuck(helper_runs: list[Any], is_over: threading.Event) -> None:
    """End this process when a helper has left the run and rank 0 cannot.

    Some losses do not make a collective fail at once: a node that vanishes, a GPU's kernel that waits for the other.
    Tune starts the trial again, in a new process, and the run continues from its checkpoint.
    """
    import ray

    while not is_over.wait(1.0):
        ended, _ = ray.wait(helper_runs, timeout=0)
        if ended and not is_over.wait(STUCK_S):
            os._exit(1)


def _store(host: str, port: int, *, is_master: bool) -> Any:
    """Where workers meet; port 0 takes a free one."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # which it names, but does not export

    time = datetime.timedelta(seconds=RENDEZVOUS_S)
    return TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=time)
