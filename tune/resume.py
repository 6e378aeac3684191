"""Before a search begins: that nobody else runs it, and that the user means to continue what is there."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
from filelock import FileLock, Timeout
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from rich.prompt import Confirm

from refilled.errors import UserError
from tune.plan import Plan


@contextlib.contextmanager
def only_driver(plan: Plan) -> Iterator[None]:
    """Keep the search's studies for this process while the block runs.

    A second driver would take the first one's running trials for a dead driver's. Searches that share no study run
    side by side.

    Raises:
        UserError: Another process has one of the studies.
    """
    folder = plan.storage.root / "searches"
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as locks:
        for name, study in sorted((study.name, study) for study in plan.studies.values()):
            lock = FileLock(folder / f"{_file_name(name)}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise UserError(
                    f"Cell {study.key} is being searched on {plan.storage.location} by another process already; wait "
                    f"for it, or choose another experiment."
                ) from error
            locks.callback(lock.release)
        yield


@contextlib.contextmanager
def only_driver_of_database(plan: Plan, storage: BaseStorage) -> Iterator[None]:
    """Keep the search's studies for this process among drivers of other machines, which share only a PostgreSQL.

    The server lets go of them when the connection ends, and looks whether a silent one still lives, so that the driver
    of a machine that is gone keeps nobody out for more than a minute. Other databases are files, for which the locks of
    `only_driver` do.

    Raises:
        UserError: Another process has one of the studies.
    """
    from sqlalchemy import text

    if not isinstance(storage, RDBStorage) or storage.engine.dialect.name != "postgresql":
        yield
        return
    with storage.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for setting, value in (("idle", 30), ("interval", 5), ("count", 6)):
            connection.execute(text(f"SET tcp_keepalives_{setting} = {value}"))
        for name, study in sorted((study.name, study) for study in plan.studies.values()):
            key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)
            if not connection.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": key}).scalar_one():
                raise UserError(
                    f"Cell {study.key} is being searched with the same study_storage by another process already; wait "
                    f"for it, or choose another experiment."
                )
        try:
            yield
        finally:
            connection.invalidate()  # ends it, and with it the locks, even where the server is away


def may_continue(plan: Plan, storage: BaseStorage) -> bool:
    """Whether to go on; says what is there, and asks on a terminal unless `resume` has the answer.

    Raises:
        UserError: There are trials, and `resume` says no.
    """
    search = plan.search
    states = [trial.state for trials in earlier_trials(plan, storage).values() for trial in trials]
    ended = sum(state.is_finished() for state in states)
    interrupted = states.count(TrialState.RUNNING)
    if not ended + interrupted:
        return True
    there = f"{ended} ended and {interrupted} interrupted trials of this search are there already"
    if search.resume is False:
        raise UserError(f"resume is off, but {there}; choose another experiment, or leave --no-resume out.")
    if search.resume is None and sys.stdin.isatty() and sys.stdout.isatty():
        return Confirm.ask(f"{there}. Continue? (Another --experiment starts anew.)", default=True)
    print(f"{there}; continuing.")
    return True


def earlier_trials(plan: Plan, storage: BaseStorage) -> dict[str, list[FrozenTrial]]:
    """What the studies of a search hold, by the cell's name; nothing is created."""
    names = set(optuna.get_all_study_names(storage))
    return {
        cell: optuna.load_study(study_name=study.name, storage=storage).get_trials(deepcopy=False)
        for cell, study in plan.studies.items()
        if study.name in names
    }


def _file_name(study: str) -> Path:
    """An experiment may have any name; a file's name is the hash at the study's end, which holds the experiment."""
    return Path(study[-16:])
