"""All trials of a search as one Ray Tune run."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from refilled.interruption import own_handlers
from refilled.storage import Storage
from tune.backend.cluster import Resources
from tune.backend.ray_private import has_dashboard
from tune.backend.worker import Body, trial, work

MAX_FAILURES = 5


@dataclass(frozen=True)
class TrialFunction:
    """What Tune runs for a trial, whether its process may serve the next one, and whether it drives a TorchTrainer."""

    function: Any
    reuse_actors: bool
    has_trainer: bool


def trial_function(
    resources: Resources,
    storage: Storage,
    *,
    backend: str,
    body: Body = work,
) -> TrialFunction:
    """The function that trains one suggestion of the searcher.

    Args:
        resources: Resources of one trial.
        storage: Shared by all workers.
        backend: `SearchConfig.trial_backend`.
        body: Replaces `work`, to measure what a trial costs beside it; not for a TorchTrainer.
    """
    import ray.tune

    from tune.backend.trainer import train_driver_fn
    from tune.backend.worker_group import group_trial

    if backend == "torch_trainer":
        assert body is work, "a TorchTrainer does the work itself"
        function = ray.tune.with_parameters(train_driver_fn, resources=resources, storage=storage)
        # A driver holds no CPU, or drivers could take what their own workers need; it sits on the head node.
        on_head = ray.tune.with_resources(function, {"node:__internal_head__": 0.001})
        return TrialFunction(on_head, reuse_actors=False, has_trainer=True)
    arguments = {"num_threads": resources.num_threads, "num_gpus": resources.gpus_per_worker, "storage": storage}
    if resources.num_workers == 1:
        function = ray.tune.with_parameters(trial, arguments=arguments, body=body)
    else:
        function = ray.tune.with_parameters(group_trial, arguments=arguments, resources=resources, body=body)
    bundles = ray.tune.PlacementGroupFactory([resources.per_worker] * resources.num_workers)
    return TrialFunction(ray.tune.with_resources(function, bundles), reuse_actors=True, has_trainer=False)


def run_trials(
    function: TrialFunction,
    searcher: Any,
    scheduler: Any,
    *,
    slots: int,
    name: str,
    storage: Storage,
    callbacks: Sequence[Any] = (),
) -> None:
    """Run trials until the searcher has no more; a trial whose process ends is started again `MAX_FAILURES` times.

    Args:
        function: The function of a trial.
        searcher: Suggests trials, and takes their rows.
        scheduler: Decides after every row.
        slots: Trials side by side.
        name: The name of the Tune run.
        storage: Tune's own files go to `ray/` in it.
        callbacks: Callbacks of Tune.
    """
    import ray.tune

    from tune.backend.kept_signal import KeepsSignal

    # With a TorchTrainer inside, a reused process would hang the search at the first early stop, and without the
    # dashboard, which is asked whether a stopped trial's driver lives, its workers would hold their CPUs for ever.
    assert not (function.has_trainer and (function.reuse_actors or not has_dashboard()))
    tuner = ray.tune.Tuner(
        function.function,
        tune_config=ray.tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=slots,
            trial_dirname_creator=_trial_folder,
            reuse_actors=function.reuse_actors,
        ),
        run_config=ray.tune.RunConfig(
            name=name,
            storage_path=f"{storage.location}/ray",
            failure_config=ray.tune.FailureConfig(max_failures=MAX_FAILURES),
            verbose=0,
            callbacks=[KeepsSignal(signal.SIGUSR1), *callbacks],
        ),
    )
    # Without Tune's own result files, which the run folders replace, it would list every trial as having none.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    # Tune's state is read by nobody: studies and run folders have all. Of a run that ends at once it is renamed while
    # it is copied, and the failed copy would be a traceback on the user's screen.
    logging.getLogger("ray.tune.execution.experiment_state").setLevel(logging.CRITICAL)
    with own_handlers():
        tuner.fit()


def _trial_folder(trial: Any) -> str:
    """Tune's own folder of a trial; by default its name holds the whole configuration."""
    return str(trial.trial_id)
