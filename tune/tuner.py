"""All trials of a search as one Ray Tune run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune.cluster import Resources


@dataclass(frozen=True)
class TrialFunction:
    """What Tune runs for a trial, and whether its process may serve the next one."""

    function: Any
    reuse_actors: bool


def trial_function(resources: Resources, storage: Path, *, num_sharing_runs: int, backend: str) -> TrialFunction:
    """The function that trains one suggestion of the searcher.

    Args:
        resources: of one trial.
        storage: shared by all workers.
        num_sharing_runs: see `tune.worker.work`.
        backend: `SearchConfig.trial_backend`.
    """
    import ray.tune

    from tune.trainer import train_driver_fn
    from tune.worker import trial

    shared = {"storage": str(storage), "num_sharing_runs": num_sharing_runs}
    if resources.num_workers > 1 or backend == "torch_trainer":
        function = ray.tune.with_parameters(train_driver_fn, resources=resources, **shared)
        # A driver holds no CPU, or drivers could take what their own workers need; it sits on the head node.
        on_head = ray.tune.with_resources(function, {"node:__internal_head__": 0.001})
        # With a TorchTrainer inside a reused actor, the first early stop would hang the search.
        return TrialFunction(on_head, reuse_actors=False)
    function = ray.tune.with_parameters(
        trial, num_threads=resources.num_threads, num_gpus=resources.gpus_per_worker, **shared
    )
    return TrialFunction(ray.tune.with_resources(function, resources.per_worker), reuse_actors=True)


def run_trials(
    function: TrialFunction,
    searcher: Any,
    scheduler: Any,
    *,
    slots: int,
    name: str,
    storage: Path,
    callbacks: Sequence[Any] = (),
) -> None:
    """Run trials until the searcher has no more.

    Args:
        function: of a trial.
        searcher: suggests trials, and is told their rows.
        scheduler: decides after every row.
        slots: trials side by side.
        name: of the Tune run.
        storage: Tune's own files go to `ray/` in it.
        callbacks: of Tune.
    """
    import ray.tune

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
            name=name, storage_path=str(storage / "ray"), verbose=0, callbacks=list(callbacks)
        ),
    )
    # Without Tune's own result files, which the run folders replace, it would list every trial as having none.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    tuner.fit()


def _trial_folder(trial: Any) -> str:
    """Tune's own folder of a trial; by default its name holds the whole configuration."""
    return str(trial.trial_id)
