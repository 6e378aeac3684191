"""Ray Train: one job on a group of workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from refilled.storage import Storage
from tune.backend.cluster import Resources
from tune.backend.network import torch_config
from tune.backend.ray_private import leave_interruptions
from tune.backend.worker import Job, train_fn_per_worker

RESIZE_CHECK_S = 10.0  # between looks at whether an elastic group may grow
# Each loss of a worker, and so of a node, counts, and a long run on nodes that come and go sees many. What fails for a
# reason of its own fails within seconds, so that trying it so often is cheap.
MAX_WORKER_FAILURES = 20
MAX_CONTROLLER_LOSSES = 5


def train_on_group(
    job: Job,
    config: Mapping[str, Any],
    storage: Storage,
    resources: Resources,
    name: str,
    *,
    most_workers: int | None = None,
    callbacks: tuple[Any, ...] = (),
    begin_anew: Callable[[], None] | None = None,
) -> None:
    """Do a job on a TorchTrainer group of `resources.num_workers` workers; its results are in the run's folder.

    A group that loses a worker, that may grow, or whose controller is lost, is started again and continues from the
    run's checkpoint.

    Args:
        job: See `tune.backend.worker.work`.
        config: A `RunConfig` as a dict.
        storage: Shared by all workers.
        resources: Resources of the group.
        name: The name of the Ray Train run.
        most_workers: Let the group grow to so many where the cluster has room; none: it keeps its size.
        callbacks: Callbacks of Ray Train, such as the one that hands rows to Tune; without one no row goes through Ray.
        begin_anew: End this driver's job and begin another one, called after a controller was lost: Ray keeps a
            placement group that was still pending then until the job ends. None where the job has more to do.

    Raises:
        FloatingPointError: The run diverged; with callbacks that is said in a last row instead.
        UserError: Likewise.
        ray.train.TrainingFailedError: Whatever else went wrong, again and again.
    """
    import ray.exceptions
    import ray.train

    given = {
        "job": job,
        "config": dict(config),
        "storage": storage,
    }
    if most_workers == resources.num_workers:
        most_workers = None
    trainer = _trainer(given, resources, name, most_workers, callbacks)
    for attempt in range(1 + MAX_CONTROLLER_LOSSES):
        try:
            error = trainer.fit().return_value
        except (ray.exceptions.RayActorError, ray.train.ControllerError) as loss:
            if attempt == MAX_CONTROLLER_LOSSES or not _may_pass(loss, is_elastic=most_workers is not None):
                raise
            if begin_anew is not None:
                begin_anew()
        else:
            break
    if error is not None:
        raise error


def _trainer(
    given: Mapping[str, Any], resources: Resources, name: str, most_workers: int | None, callbacks: tuple[Any, ...]
) -> Any:
    """A TorchTrainer whose workers get `given` beside what follows from the resources; else as for `train_on_group`."""
    import ray.train
    import ray.train.torch

    least = resources.num_workers
    trainer = ray.train.torch.TorchTrainer(
        train_fn_per_worker,
        train_loop_config={
            **given,
            "num_threads": resources.num_threads,
            "num_gpus": resources.gpus_per_worker,
            "reports": bool(callbacks),
        },
        torch_config=torch_config(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=least if most_workers is None else (least, most_workers),
            elastic_resize_monitor_interval_s=RESIZE_CHECK_S,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=resources.per_worker,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=f"{given['storage'].location}/ray",
            # A group that cannot start is retried for ever by default; five times is a minute or two.
            failure_config=ray.train.FailureConfig(max_failures=MAX_WORKER_FAILURES, controller_failure_limit=5),
            callbacks=list(callbacks),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    return leave_interruptions(trainer)


def _may_pass(loss: Exception, *, is_elastic: bool) -> bool:
    """Whether a group that ended so may work when it is started again.

    The controller's process was lost, with which its workers end; or it lost an actor of its own with a node, which
    Ray Train takes for a defect of the controller. And for minutes after a loss an elastic controller counts on room
    that is gone, or that a lost one had reserved.
    """
    import ray.exceptions

    cause = getattr(loss, "controller_failure", loss)
    is_timeout = type(cause).__name__ == "WorkerGroupStartupTimeoutError"  # which Ray exports nowhere
    return isinstance(cause, ray.exceptions.RayActorError) or (is_elastic and is_timeout)


def train_driver_fn(sample: Mapping[str, Any], *, storage: Storage, resources: Resources) -> None:
    """One Tune trial that drives a TorchTrainer whose rows go to Tune."""
    import ray.tune
    from ray.tune.integration.ray_train import TuneReportCallback

    name = f"trial-{ray.tune.get_context().get_trial_id()}"
    train_on_group(
        "run",
        sample["config"],
        storage,
        resources,
        name,
        callbacks=(TuneReportCallback(),),
    )
