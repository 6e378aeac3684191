"""What runs on Ray's workers: the border where dicts become configurations.

Three carriers bring the same loop to a worker: a plain Ray task, a Tune trial, and a member of a Ray Train group.
Functions here are small and are found by name on every node; torch is imported inside, where the work is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from refilled.config import Precision, RunConfig

if TYPE_CHECKING:
    from refilled.compute import Compute

Job = Literal["teacher", "run", "refit"]
Row = dict[str, Any]


def work(
    job: Job,
    config: Mapping[str, Any],
    storage: str,
    *,
    num_threads: int,
    num_gpus: float,
    num_sharing_runs: int = 1,
    on_report: Callable[[Row], None] | None = None,
) -> None:
    """Do one job on this worker or this group of workers; what comes of it is in the run's folder.

    Args:
        job: pre-train the configuration's teacher, do its run, or do its run as a refit and read the test set.
        config: of a `RunConfig`, as a dict.
        storage: absolute path shared by all workers.
        num_threads: of torch.
        num_gpus: this worker's share; above 0 the run computes on its GPU.
        num_sharing_runs: runs that ask the same teacher about the same images, and would share its bank.
        on_report: takes the rows.
    """
    from refilled.execution import execute, refit
    from refilled.teacher import pretrain_once

    run = RunConfig.from_dict(config)
    compute = _compute(run.precision, num_threads, num_gpus)
    if job == "teacher":
        pretrain_once(run, Path(storage), compute)
    elif job == "refit":
        refit(run, Path(storage), compute, on_report, num_sharing_runs=num_sharing_runs)
    else:
        execute(run, Path(storage), compute, on_report, num_sharing_runs=num_sharing_runs)


def trial(sample: Mapping[str, Any], *, storage: str, num_threads: int, num_gpus: float, num_sharing_runs: int) -> None:
    """One Tune trial on one worker; `sample` is what the searcher suggests, its `config` a whole run."""
    import ray.tune

    work(
        "run",
        sample["config"],
        storage,
        num_threads=num_threads,
        num_gpus=num_gpus,
        num_sharing_runs=num_sharing_runs,
        on_report=ray.tune.report,
    )


def train_fn_per_worker(arguments: dict[str, Any]) -> None:
    """A member of a Ray Train group; where rows are wanted every member reports every row, as Ray Train asks."""
    import ray.train

    work(
        arguments["job"],
        arguments["config"],
        arguments["storage"],
        num_threads=arguments["num_threads"],
        num_gpus=arguments["num_gpus"],
        num_sharing_runs=arguments["num_sharing_runs"],
        on_report=ray.train.report if arguments["reports"] else None,
    )


def _compute(precision: Precision, num_threads: int, num_gpus: float) -> Compute:
    """The worker's device; the process may have served another trial before, so nothing of it is left to chance."""
    import torch

    from refilled.compute import Compute

    torch.set_num_threads(num_threads)
    torch.set_grad_enabled(True)
    device = torch.device("cuda", torch.cuda.current_device()) if num_gpus else torch.device("cpu")
    return Compute(device=device, precision=precision)
