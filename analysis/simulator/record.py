"""Train random settings of real problems and keep their learning curves, for `table.py` to answer from.

    python -m analysis.simulator.record digits-0 digits-0.4 digits-1 --trials 600 --storage DIR
    python -m analysis.simulator.record cifar-0.4 --data parquet:DIR --trials 200 --storage DIR

Row 0 of a table is the problem's own settings, with which every search begins; the others are drawn by Optuna's
RandomSampler through `space.sample`. Rows that a table holds already are kept, and trials are run folders of the
storage, so the same command again goes on where it was, and a larger `--trials` adds to what is there. Tables are
written to `--out` as they grow.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gzip
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import optuna
import torch

from analysis.machine import machine_line
from analysis.simulator.problems import problems
from analysis.simulator.table import CURVES
from refilled.config import RunConfig
from refilled.execution import execute, pretrain_once, run_folder
from refilled.metrics import EpochMetrics
from refilled.stages import needs_teacher
from refilled.storage import Storage
from refilled.training.compute import Compute
from tune.studies.space import as_data, default_point, sample

SAVE_EVERY = 50
Point = dict[str, Any]


def points(run: RunConfig, count: int, seed: int) -> list[tuple[Point, Point]]:
    """Parameters and overrides of a table's rows; a larger count begins with the same ones."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    study.enqueue_trial(default_point(run))
    drawn = []
    for _ in range(count):
        trial = study.ask()
        overrides = sample(trial, run)
        drawn.append((trial.params, overrides))
    return drawn


def train(run: RunConfig, storage: Storage) -> list[EpochMetrics]:
    """The rows of one run; fewer than its epochs where the loss was no longer finite."""
    torch.set_num_threads(1)
    with contextlib.suppress(FloatingPointError):  # the table then answers with what was reported before
        execute(run, storage, Compute(torch.device("cpu"), run.precision))
    return run_folder(run, storage).rows()


def compact(number: int, params: Point, rows: Sequence[EpochMetrics]) -> dict[str, Any]:
    """A table's row: parameters, validation accuracy by epoch, the best of stage classifier, seconds by stage."""
    seconds = {stage: [row.epoch_s for row in rows if row.stage == stage] for stage in ("embedding", "classifier")}
    return {
        "number": number,
        "params": {
            name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in params.items()
        },
        "stages": "".join(row.stage[0] for row in rows),
        "val_accuracy": [round(row.val_accuracy or 0.0, 6) for row in rows],
        "best_val_accuracy": max((round(row.best_val_accuracy or 0.0, 6) for row in rows), default=0.0),
        "epoch_s": {stage: round(sum(each) / len(each), 5) for stage, each in seconds.items() if each},
    }


def write_table(path: Path, name: str, run: RunConfig, seed: int, rows: dict[int, dict[str, Any]]) -> None:
    """Replace a table; the same rows give the same bytes."""
    table = {
        "problem": name,
        "machine": machine_line(1),
        "sampler_seed": seed,
        "run": _without_folder(run).to_dict(),
        "space": as_data(run),
        "trials": [rows[number] for number in sorted(rows)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(table, separators=(",", ":")).encode()
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(gzip.compress(content, 9, mtime=0))
    temporary.replace(path)


def rows_of(path: Path, run: RunConfig, seed: int) -> dict[int, dict[str, Any]]:
    """The rows of a table of the same problem and draws, by number; none where it is of others."""
    if not path.exists():
        return {}
    stored = json.loads(gzip.decompress(path.read_bytes()))
    is_same = (
        RunConfig.from_dict(stored["run"]) == _without_folder(run)
        and stored["space"] == json.loads(json.dumps(as_data(run)))
        and stored["sampler_seed"] == seed
    )
    return {row["number"]: row for row in stored["trials"]} if is_same else {}


def _without_folder(run: RunConfig) -> RunConfig:
    """Where CIFAR-100 lies says nothing about the numbers."""
    return dataclasses.replace(run, data=run.data if ":" not in run.data else "cifar100")


def record(name: str, run: RunConfig, arguments: argparse.Namespace, pool: ProcessPoolExecutor) -> None:
    """Record one problem, teacher first."""
    if needs_teacher(run):
        pool.submit(_pretrain, run, arguments.storage).result()
    drawn = points(run, arguments.trials, arguments.seed)
    path = arguments.out / f"{name}.json.gz"
    rows = rows_of(path, run, arguments.seed)
    jobs = {
        pool.submit(train, run.with_overrides(overrides), arguments.storage): number
        for number, (_, overrides) in enumerate(drawn)
        if number not in rows
    }
    num_wanted = len(rows) + len(jobs)
    for job in as_completed(jobs):
        number = jobs[job]
        rows[number] = compact(number, drawn[number][0], job.result())
        if len(rows) % SAVE_EVERY == 0 or len(rows) == num_wanted:
            write_table(path, name, run, arguments.seed, rows)
            best = max(row["best_val_accuracy"] for row in rows.values())
            near = sum(row["best_val_accuracy"] >= 0.99 * best for row in rows.values())
            print(f"{name}: {len(rows)} of {num_wanted}, best {best:.4f}, {near} within 1 % of it", flush=True)


def _pretrain(run: RunConfig, storage: Storage) -> None:
    torch.set_num_threads(1)
    pretrain_once(run, storage, Compute(torch.device("cpu"), run.precision))


def main() -> None:
    """Record the named problems, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="+", choices=sorted(problems()))
    parser.add_argument("--data", default="cifar100", help="where CIFAR-100 is: cifar100 or parquet:DIR")
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--storage", type=Storage.open, required=True)
    parser.add_argument("--out", type=Path, default=CURVES)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    runs = problems(arguments.data)
    context = get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context, initializer=os.nice, initargs=(10,)) as pool:
        for name in arguments.problems:
            record(name, runs[name], arguments, pool)


if __name__ == "__main__":
    main()
