"""Ray Train: one job on a group of workers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tune.cluster import Resources
from tune.worker import Job, train_fn_per_worker


def train_on_group(
    job: Job,
    config: Mapping[str, Any],
    storage: str,
    resources: Resources,
    name: str,
    *,
    num_sharing_runs: int = 1,
    share_embeddings: bool = False,
    callbacks: tuple[Any, ...] = (),
) -> None:
    """Do a job on a TorchTrainer group of `resources.num_workers` workers; its results are in the run's folder.

    Args:
        job: see `tune.worker.work`.
        config: of a `RunConfig`, as a dict.
        storage: absolute path shared by all workers.
        resources: of the group.
        name: of the Ray Train run.
        num_sharing_runs: see `tune.worker.work`.
        share_embeddings: see `tune.worker.work`.
        callbacks: of Ray Train, such as the one that hands rows to Tune; without one no row goes through Ray.

    Raises:
        FloatingPointError: the run diverged; with callbacks that is said in a last row instead.
        UserError: likewise.
        ray.train.TrainingFailedError: whatever else went wrong, again and again.
    """
    import ray.train
    import ray.train.torch

    trainer = ray.train.torch.TorchTrainer(
        train_fn_per_worker,
        train_loop_config={
            "job": job,
            "config": dict(config),
            "storage": storage,
            "num_threads": resources.num_threads,
            "num_gpus": resources.gpus_per_worker,
            "num_sharing_runs": num_sharing_runs,
            "share_embeddings": share_embeddings,
            "reports": bool(callbacks),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=resources.per_worker,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(Path(storage) / "ray"),
            # A group that cannot start is retried for ever by default; five times is a minute or two.
            failure_config=ray.train.FailureConfig(max_failures=2, controller_failure_limit=5),
            callbacks=list(callbacks),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    error = trainer.fit().return_value
    if error is not None:
        raise error


def train_driver_fn(
    sample: Mapping[str, Any], *, storage: str, resources: Resources, num_sharing_runs: int, share_embeddings: bool
) -> None:
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
        num_sharing_runs=num_sharing_runs,
        share_embeddings=share_embeddings,
        callbacks=(TuneReportCallback(),),
    )
