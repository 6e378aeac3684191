"""What runs on Ray's workers: the border where dicts become configurations.

Four carriers bring the same loop to a worker: a plain Ray task, a Tune trial, the helper of one, and a member of a Ray
Train group. Functions here are small and are found by name on every node; torch is imported inside, where the work is.

Most of these processes live from job to job, so every job begins by putting torch's and Python's global state where it
is in a new process (`known_process_state`).
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from refilled.config import Precision, RunConfig
from refilled.errors import DataChangedError, UserError, storage_full
from refilled.metrics import Report, TrialEnd
from refilled.storage import Storage

if TYPE_CHECKING:
    from refilled.training.compute import Compute

Job = Literal["teacher", "embeddings", "run", "refit"]
Body = Callable[..., None]
"""`work`, or what a measurement puts in its place."""


class WorkersLostError(Exception):
    """Workers of a group ended again and again; the message says how."""


FINAL_ERRORS = (FloatingPointError, UserError, WorkersLostError)
"""What would only come again: a run that diverged, bad input, workers that do not live."""


def work(
    job: Job,
    config: Mapping[str, Any],
    storage: Storage,
    *,
    num_threads: int,
    num_gpus: float,
    on_report: Report | None = None,
) -> None:
    """Do one job on this worker or this group of workers; what comes of it is in the storage.

    Args:
        job: Pre-train the configuration's teacher, compute its embedding cache, do its run, or do its run as a refit
            and read the test set.
        config: A `RunConfig` as a dict.
        storage: Shared by all workers.
        num_threads: Threads of torch.
        num_gpus: This worker's share; above 0 the run computes on its GPU.
        on_report: Takes the rows of a run.
    """
    from refilled.execution import embed_once, execute, pretrain_once, refit

    run = RunConfig.from_dict(config)
    with known_process_state(run.seed, num_threads):
        compute = _compute(run.precision, num_gpus)
        if job == "teacher":
            pretrain_once(run, storage, compute)
        elif job == "embeddings":
            embed_once(run, storage, compute)
        elif job == "refit":
            refit(run, storage, compute, on_report)
        else:
            execute(run, storage, compute, on_report)


def trial(sample: Mapping[str, Any], *, arguments: Mapping[str, Any], body: Body = work) -> None:
    """One Tune trial on one worker.

    Args:
        sample: What the searcher suggests; its `config` is a whole run.
        arguments: Those of `work`, but for `job`, `config` and `on_report`.
        body: Takes the arguments of `work`.
    """
    import ray.tune

    def train(report: Report) -> None:
        body("run", sample["config"], **arguments, on_report=report)

    report_trial(train, ray.tune.report)


def report_trial(train: Callable[[Report], None], send: Callable[[dict[str, Any]], None]) -> None:
    """Run a trial; report a final error as the trial's end, because Tune would try again after an exception.

    Args:
        train: Runs it, and passes its rows on.
        send: Takes a row, or how the trial ended, as a dict.
    """
    try:
        train(lambda row: send(row.to_dict()))
    except Exception as error:
        end = trial_end(error)
        if end is None:
            raise
        send(end.to_dict())


def trial_end(error: Exception) -> TrialEnd | None:
    """What a final error says of a trial; none of an error after which the trial may be tried again."""
    full = storage_full(error)
    if full is not None:
        return TrialEnd("storage_full", str(full))
    if isinstance(error, DataChangedError):
        return TrialEnd("data_changed", str(error))
    if isinstance(error, FINAL_ERRORS):
        return TrialEnd("diverged" if isinstance(error, FloatingPointError) else "failed", str(error))
    return None


def train_fn_per_worker(arguments: dict[str, Any]) -> Exception | None:
    """A member of a Ray Train group; where rows are wanted every member reports every row, as Ray Train asks.

    Returns:
        An error that is final: Ray Train would try again if it were raised.
    """
    import ray.train

    wanted = dict(arguments)
    if wanted.pop("reports"):
        report_trial(lambda report: work(**wanted, on_report=report), ray.train.report)
        return None
    try:
        work(**wanted)
    except FINAL_ERRORS as error:
        return error
    except OSError as error:
        if full := storage_full(error):
            return full
        raise
    return None


@contextlib.contextmanager
def known_process_state(seed: int, num_threads: int) -> Iterator[None]:
    """Torch's and Python's global state as in a new process, whatever the job before left behind.

    Modes that belong to a thread (gradients, inference, autocast, denormals) are set for the calling one. What a job
    could only change by replacing parts of a library, and what a process can set once (torch's threads between
    operators), is left alone.

    Args:
        seed: The seed of torch's, NumPy's and Python's generators. No number of a run comes from them; should one
            ever, it would depend on the run and not on what ran before.
        num_threads: Threads of torch.
    """
    import numpy as np
    import torch

    from refilled.user_code import forget_modules

    with torch.inference_mode(False):  # gradients on, in all their modes
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.set_num_threads(num_threads)
        torch.set_flush_denormal(False)
        torch.autograd.set_detect_anomaly(False)
        if torch.are_deterministic_algorithms_enabled():  # the setter loads torch's compiler, for 2 s
            torch.use_deterministic_algorithms(False)
        _reset_precision()
        _reset_autocast()
        forget_modules()
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        # After so many graphs of one function torch.compile would run it as it is, which rounds differently. The
        # module is loaded where something was compiled; loading it takes longer than a short trial.
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        yield


def _reset_precision() -> None:
    """How libraries multiply float32, and which of their algorithms they choose."""
    import torch

    backends = torch.backends
    backends.fp32_precision = "none"  # type: ignore[attr-defined]  # a property of the module object
    torch.set_float32_matmul_precision("highest")
    for library, usual in ((backends.mkldnn, "none"), (backends.cudnn, "tf32")):
        library.conv.fp32_precision = usual
        library.rnn.fp32_precision = usual
    backends.mkldnn.set_flags(True, False)  # type: ignore[no-untyped-call]
    backends.cudnn.enabled = True
    backends.cudnn.benchmark = False
    backends.cudnn.deterministic = False
    backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True


def _reset_autocast() -> None:
    """Off, with the usual types, and without the weights that a trial that is over has left in its cache."""
    import torch

    for device, dtype in (("cpu", torch.bfloat16), ("cuda", torch.float16)):
        torch.set_autocast_enabled(device, False)
        torch.set_autocast_dtype(device, dtype)
    depth = torch.autocast_increment_nesting()
    while depth > 0:
        depth = torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(True)


def _compute(precision: Precision, num_gpus: float) -> Compute:
    import torch

    from refilled.training.compute import Compute

    device = torch.device("cuda", torch.cuda.current_device()) if num_gpus else torch.device("cpu")
    return Compute(device=device, precision=precision)
