"""Train one configuration on 1..N workers of a Ray Train TorchTrainer.

    python tune/train.py                                               the digits, one worker
    python tune/train.py cifar100 --data parquet:DIR --overlap 0.4 --student wrn-16-1 --workers 2
    python tune/train.py --workers 1:4                                 as many of 1 to 4 as the cluster has room for
    python tune/train.py --refit                                       all training images, then the test set, once

The same command again finds the finished run, or continues an interrupted one.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console

from refilled.config import Config, RunConfig, SearchConfig
from refilled.config.fields import NonNegativeFloat, PositiveFloat
from refilled.errors import UserError
from refilled.methods import has_embedding_stage
from refilled.presets import preset
from tune.backend.cluster import connect, fit, ray_cluster, ray_environment
from tune.cli import run_command, term_configs

if TYPE_CHECKING:
    from refilled.storage.run_folder import RunFolder
    from tune.backend.worker import Job
    from tune.plan import Plan
    from tune.studies.cells import Cell

HELP = "Train one student with one method on 1..N workers, and log it to MLflow."
POLL_S = 0.5
_WORKERS = re.compile(r"[0-9]{1,6}(:[0-9]{1,6})?")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """One run, and where it runs and is kept; the fields beside `run` mean what they mean in a search."""

    run: RunConfig = field(default_factory=RunConfig)
    """The run."""
    refit: bool = False
    """Train on all training images, hold nothing out, and read the test set at the end."""
    workers: str = "1"
    """Workers of the TorchTrainer, or LEAST:MOST of them; the result does not depend on their number."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs of one worker; torch uses as many threads, at least one."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """GPUs of one worker."""
    storage: str = "runs"
    """Folder of caches, teachers, run folders and the MLflow store; or of an object store: s3://BUCKET/FOLDER."""
    tracking_uri: str | None = None
    """MLflow tracking URI; none: a SQLite file in the storage folder."""
    experiment: str = "refilled"
    """MLflow experiment."""

    def __post_init__(self) -> None:
        """Check also the workers, which `as_search` would name differently."""
        super().__post_init__()
        self.require(
            bool(_WORKERS.fullmatch(self.workers)) and 1 <= self.least_workers <= self.most_workers,
            "workers",
            "a number of at least 1, or LEAST:MOST such as 1:4",
        )

    @property
    def least_workers(self) -> int:
        """Workers without which the run waits."""
        return int(self.workers.split(":")[0])

    @property
    def most_workers(self) -> int:
        """Workers that the run takes where there is room."""
        return int(self.workers.split(":")[-1])

    def as_search(self) -> SearchConfig:
        """The search of one cell and one trial that plans and checks this run, and whose checks are these fields'."""
        # A search trains methods of one stage for the epochs of both; here they are what is given.
        is_whole = has_embedding_stage(self.run.method)
        return SearchConfig(
            run=self.run if is_whole else dataclasses.replace(self.run, epochs=(0, self.run.epochs[1])),
            methods=(self.run.method,),
            overlaps=(self.run.overlap,),
            teachers=(self.run.teacher,),
            students=(self.run.student,),
            images_per_class=(self.run.images_per_class or "all",),
            trials=1,
            seeds=1,
            workers_per_trial=self.least_workers,
            cpus_per_worker=self.cpus_per_worker,
            gpus_per_worker=self.gpus_per_worker,
            storage=self.storage,
            tracking_uri=self.tracking_uri,
            experiment=self.experiment,
        )


def start(preset_name: str, methods: tuple[str, ...]) -> TrainConfig:
    """A preset's run, of the first teacher and student of its grid, with the method that is given, if any.

    Raises:
        UserError: Several methods are given.
    """
    search = preset(preset_name)
    if len(methods) > 1:
        raise UserError(f"--method must be one method, got {', '.join(methods)}; tune/search.py compares several.")
    run = dataclasses.replace(search.run, teacher=search.teachers[0], student=search.students[0])
    run = dataclasses.replace(run, method=methods[0] if methods else run.method)
    return TrainConfig(run=run, storage=search.storage, experiment=search.experiment)


def main(config: TrainConfig) -> int:
    """Plan, train, report."""
    with ray_environment():
        from tune.plan import make_plan, require_exact_networks  # imports Ray, which reads its environment then
        from tune.tracking.tracker import Tracker, resolve_tracking_uri

        plan = make_plan(config.as_search())
        if config.most_workers > 1:
            require_exact_networks(plan.cells, plan.storage, config.most_workers)
        uri = resolve_tracking_uri(config.tracking_uri, plan.storage)
        with Tracker(uri, config.experiment, plan.storage) as tracker:
            for line in plan.remarks:
                Console().print(line, highlight=False)
            return _train(config, plan, tracker)


def _train(config: TrainConfig, plan: Plan, tracker: Any) -> int:
    from tune.backend.trainer import train_on_group
    from tune.tracking.recorder import Recorder

    cell = plan.cells[0]
    run = dataclasses.replace(cell.run, val_fraction=0.0) if config.refit else cell.run
    recorder = Recorder(tracker, plan)
    folder = recorder.folder(cell, run)
    console = Console()
    with ray_cluster(with_dashboard=True):
        resources = fit(plan.search)
        recorder.start_search(name=f"train {folder.path.name}")
        _open(recorder, cell, run, refit=config.refit)
        job: Job = "refit" if config.refit else "run"
        try:
            with _Follower(folder, console):
                train_on_group(
                    job,
                    run.to_dict(),
                    plan.storage,
                    resources,
                    f"{job}-{folder.path.name}",
                    most_workers=config.most_workers,
                    begin_anew=functools.partial(connect, with_dashboard=True),
                )
        except FloatingPointError as error:  # a result like others: these settings do not train
            recorder.close_trial(cell, run, "failed", None)
            tracker.finish_search(status="FAILED")
            print(f"train: the run diverged and has no result. {error}", file=sys.stderr)
            return 1
    row = folder.result()
    assert row is not None, "the group has finished it"
    if config.refit:
        test_accuracy = folder.test_accuracy()
        assert test_accuracy is not None, "the group has tested it"
        recorder.close_refit(cell, run, test_accuracy)
        console.print(f"Test accuracy {100 * test_accuracy:.2f} %")
    else:
        recorder.close_trial(cell, run, "complete", row, with_artifacts=True)
        assert row.best_val_accuracy is not None, "a run that is no refit has validation images"
        console.print(f"Validation accuracy {100 * row.best_val_accuracy:.2f} % (epoch {row.best_epoch})")
    tracker.finish_search(status="FINISHED")
    key = recorder.key(cell, run)
    shown = recorder.run_ids([key])[key] or f"of run_key {key}, not delivered yet,"
    print(f"Run folder: {folder.path}\nMLflow: run {shown} of experiment {config.experiment!r}")
    return 0


def _open(recorder: Any, cell: Cell, run: RunConfig, *, refit: bool) -> None:
    if refit:
        recorder.open_refit(cell, run, "method")
    else:
        recorder.open_trial(cell, run, 0, "given")


class _Follower:
    """Prints the rows of a run as they appear in its folder."""

    def __init__(self, folder: RunFolder, console: Console) -> None:
        self._folder = folder
        self._console = console
        self._num_printed = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow-rows", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._print()
        if isinstance(error, KeyboardInterrupt):
            error.add_note(f"training: {self._num_printed} epochs done, from the last checkpoint of which it goes on")

    def _follow(self) -> None:
        while not self._is_over.wait(POLL_S):
            self._print()

    def _print(self) -> None:
        self._folder.storage.refresh(self._folder.metrics_path)
        for row in self._folder.rows()[self._num_printed :]:
            value = row.val_accuracy
            accuracy = "" if value is None else f", validation accuracy {100 * value:.2f} %"
            self._console.print(
                f"epoch {row.epoch} ({row.stage}): loss {row.train_loss:.4f}{accuracy}, "
                f"{row.images_per_second:.0f} images/s",
                highlight=False,
            )
            self._num_printed += 1


def command(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(
        "train",
        HELP,
        start,
        main,
        terms=lambda config: term_configs(config.run, [config.run.method]),
        hidden={"run.sources"},
        inlined={"run", "run.terms"},
        arguments=arguments,
    )


if __name__ == "__main__":
    sys.exit(command())
