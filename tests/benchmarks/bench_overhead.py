"""What a trial costs beside its training: seconds of a trial that does nothing, after the first.

    python tests/benchmarks/bench_overhead.py
    python tests/benchmarks/bench_overhead.py --trials 9 --recipe-trials 5 --workers 2

A trial that does nothing reports three rows, each after a small checkpoint is written. Ours is what `tune/search.py`
runs (`trial_function` and `run_trials` of `backend/tuner.py`) with that in place of `worker.work`; with two workers
every row also waits for both. The recipe is the one that Ray documents: a Tuner over a function that fits a
TorchTrainer with a TuneReportCallback, all with their defaults. Both get the same fixed list of trials, one after the
other. A trial's seconds are those from the end of the one before it to its own end, the first trial left out. The last
row of the table is ours with the study searcher over an SQLite file in place of the list.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tune"))

from analysis.machine import machine_line
from refilled.metrics import EpochMetrics, Report
from refilled.storage import Storage

EPOCHS = 3


def do_nothing(job: str, config: Mapping[str, Any], storage: Storage, *, on_report: Report, **others: Any) -> None:
    """In place of `tune.backend.worker.work`, on every rank."""
    from refilled.distributed import rank

    for epoch in range(1, EPOCHS + 1):
        if rank() == 0:
            storage.write_json(storage.root / "checkpoint.json", checkpoint(epoch))
        on_report(row(epoch))


def checkpoint(epoch: int) -> dict[str, Any]:
    """A small one."""
    return {"epoch": epoch, "weights": [0.0] * 1000}


def row(epoch: int) -> EpochMetrics:
    """What a run reports."""
    value = 0.5 + epoch / 100
    return EpochMetrics(
        epoch=epoch,
        stage="classifier",
        train_loss=1.0 / epoch,
        learning_rate=0.1,
        gradient_norm=1.0,
        gradient_norm_max=1.0,
        images_per_second=1.0,
        epoch_s=1.0,
        finished=epoch == EPOCHS,
        val_accuracy=value,
        best_val_accuracy=value,
        best_epoch=epoch,
    )


def train_nothing(config: dict[str, Any]) -> None:
    """A worker of the recipe's TorchTrainer."""
    import ray.train

    for epoch in range(1, EPOCHS + 1):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "checkpoint.json").write_text(json.dumps(checkpoint(epoch)))
            is_first = ray.train.get_context().get_world_rank() == 0
            ray.train.report(row(epoch).to_dict(), checkpoint=ray.train.Checkpoint(folder) if is_first else None)


def recipe(config: Mapping[str, Any], *, num_workers: int, storage: str) -> None:
    """A trial of the recipe."""
    import ray.train
    import ray.train.torch
    import ray.tune
    from ray.tune.integration.ray_train import TuneReportCallback

    ray.train.torch.TorchTrainer(
        train_nothing,
        scaling_config=ray.train.ScalingConfig(num_workers=num_workers),
        run_config=ray.train.RunConfig(
            name=f"train-{ray.tune.get_context().get_trial_id()}",
            storage_path=storage,
            callbacks=[TuneReportCallback()],
        ),
    ).fit()


def durations(run: Callable[[list[Any]], None]) -> list[float]:
    """Seconds of every trial after the first; `run` is given Tune's callbacks."""
    from ray.tune import Callback

    ends_s: list[float] = []

    class Clock(Callback):  # type: ignore[misc]  # Ray has no types
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            ends_s.append(time.perf_counter())

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            raise RuntimeError(f"a trial failed: {trial.get_error()}")

        def __getstate__(self) -> dict[str, Any]:
            return {}

    run([Clock()])
    return [end - start for start, end in itertools.pairwise(ends_s)]


def resources(num_workers: int) -> Any:
    """Of a trial."""
    from tune.backend.cluster import Resources

    return Resources(num_workers=num_workers, cpus_per_worker=0.5, gpus_per_worker=0.0, slots=1, slots_now=1)


def ours(num_workers: int, num_trials: int, storage: Storage) -> list[float]:
    """Seconds of our trials from a list."""
    from fixed_list import FixedList, Watcher

    from tune.backend.tuner import run_trials, trial_function

    function = trial_function(resources(num_workers), storage, backend="auto", body=do_nothing)
    samples = [{"name": str(number), "config": {}} for number in range(num_trials)]
    return durations(
        lambda callbacks: run_trials(
            function, FixedList(samples), Watcher(), slots=1, name="ours", storage=storage, callbacks=callbacks
        )
    )


def ours_with_studies(num_workers: int, num_trials: int, storage: Storage) -> list[float]:
    """Seconds of our trials from a study."""
    from refilled.presets import smoke
    from tune.backend.tuner import run_trials, trial_function
    from tune.studies.searcher import Rules, StudyPlan, StudyScheduler, StudySearcher, open_storage

    plan = StudyPlan(key="cell", name="cell", run=smoke().run, num_trials=num_trials, num_epochs=EPOCHS)
    searcher = StudySearcher([plan], open_storage(f"sqlite:///{storage.root / 'studies.db'}"), Rules(pruner="none"))
    function = trial_function(resources(num_workers), storage, backend="auto", body=do_nothing)
    return durations(
        lambda callbacks: run_trials(
            function, searcher, StudyScheduler(searcher), slots=1, name="studies", storage=storage, callbacks=callbacks
        )
    )


def of_the_recipe(num_workers: int, num_trials: int, folder: Path) -> list[float]:
    """Seconds of the recipe's trials."""
    import ray.tune
    from fixed_list import FixedList

    function = ray.tune.with_parameters(recipe, num_workers=num_workers, storage=str(folder / "train"))
    samples = [{"name": str(number)} for number in range(num_trials)]
    return durations(
        lambda callbacks: ray.tune.Tuner(
            function,
            tune_config=ray.tune.TuneConfig(search_alg=FixedList(samples), num_samples=-1, max_concurrent_trials=1),
            run_config=ray.tune.RunConfig(name="recipe", storage_path=str(folder), callbacks=callbacks, verbose=0),
        ).fit()
    )


def say(what: str, num_workers: int, seconds: list[float], reference_s: float | None) -> None:
    """A line of the table."""
    median = statistics.median(seconds)
    ratio = f"{reference_s / median:>8.0f}" if reference_s else f"{'':>8}"
    span = f"{min(seconds):.2f} .. {max(seconds):.2f}"
    print(f"{what:<28} {num_workers:>7} {len(seconds):>6} {median:>8.3f} {span:>16} {ratio}", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12, help="of ours, the first included")
    parser.add_argument("--recipe-trials", type=int, default=4, help="of the recipe, the first included")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    # The recipe is measured with the defaults that its processes read; what ours sets for TorchTrainers is not set.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}
    import optuna
    import ray

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    num_cpus = max(4, max(arguments.workers) + 2)  # logical: the recipe's driver takes one, its workers one each
    ray.init(address="local", num_cpus=num_cpus, logging_level=logging.ERROR, log_to_driver=False)
    print(f"{machine_line(1)}, Ray {ray.__version__}, load {os.getloadavg()[0]:.1f} at the start")
    print(f"{'trials':<28} {'workers':>7} {'timed':>6} {'median s':>8} {'range':>16} {'x faster':>8}")
    with tempfile.TemporaryDirectory() as name:
        for num_workers in arguments.workers:
            folders = [Path(name) / f"{what}-{num_workers}" for what in ("recipe", "ours", "studies")]
            for folder in folders:
                folder.mkdir()
            theirs = of_the_recipe(num_workers, arguments.recipe_trials, folders[0])
            reference_s = statistics.median(theirs)
            say("the documented recipe", num_workers, theirs, None)
            say("ours", num_workers, ours(num_workers, arguments.trials, Storage.open(folders[1])), reference_s)
            studies = ours_with_studies(num_workers, arguments.trials, Storage.open(folders[2]))
            say("ours, studies in SQLite", num_workers, studies, reference_s)
    print(f"load {os.getloadavg()[0]:.1f} at the end")
    ray.shutdown()


if __name__ == "__main__":
    main()
