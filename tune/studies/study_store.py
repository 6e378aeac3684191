"""The storage of all studies: how it is opened, what it holds of a cell, and how a trial in it is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState

from refilled.config import RunConfig
from refilled.errors import UserError
from refilled.secrets import without_passwords
from tune.studies.space import default_point


@dataclass(frozen=True)
class StudyPlan:
    """What one cell's study is and how long it goes on."""

    key: str
    """Names the cell, for people and for `StudySearcher`'s questions."""
    name: str
    """Names the study in the storage: a hash of all that defines the cell."""
    run: RunConfig
    """The run that trials vary; its own settings are the first trial."""
    num_trials: int
    """The study's share of the budget: complete or pruned trials, those it already holds included."""
    num_epochs: int
    """Epochs of a complete trial, over all stages."""
    source_cells: tuple[str, ...] = ()
    """Keys of the source cells, whose winners are tried first; all of them come earlier in the list of plans."""
    group: str = ""
    """Studies of one group are compared with each other and get the same number of trials; empty: with none."""
    num_validation_images: int = 1000
    """Images that a trial's value is a share of; says how far chance alone moves it."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Kept with the study; plain JSON values."""


def open_storage(url: str) -> RDBStorage:
    """Open or create the database of all studies.

    Raises:
        UserError: When it cannot be reached, or another version of Optuna wrote it.
    """
    import sqlalchemy.exc

    # SQLite: wait for another process's transaction; servers: notice a connection that went away meanwhile.
    is_sqlite = url.startswith("sqlite")
    engine: dict[str, Any] = {"connect_args": {"timeout": 60}} if is_sqlite else {"pool_pre_ping": True}
    try:
        return RDBStorage(url, engine_kwargs=engine)
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError, RuntimeError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(
            f"study_storage must be the URL of a database that can be reached, such as sqlite:////path/studies.db, "
            f"got {without_passwords(url)!r} ({without_passwords(reason)})."
        ) from error


def open_study(plan: StudyPlan, storage: BaseStorage) -> optuna.Study:
    """Open or create a cell's study, with the run's own settings as its first trial."""
    study = optuna.create_study(study_name=plan.name, storage=storage, direction="maximize", load_if_exists=True)
    stored = study.user_attrs
    for name, value in {"cell": plan.key, **plan.attributes}.items():
        if name not in stored or stored[name] != value:
            study.set_user_attr(name, value)
    if all(trial.state == TrialState.WAITING for trial in study.get_trials(deepcopy=False)):
        study.enqueue_trial(default_point(plan.run), user_attrs={"origin": "default"}, skip_if_exists=True)
    return study


def ranked(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The complete ones, from the highest value down, the earliest of equals first."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return sorted(complete, key=lambda trial: (-(trial.value or 0.0), trial.number))


def overrides_of(trial: FrozenTrial) -> dict[str, Any]:
    """What a stored trial changed in its plan's run, as `with_overrides` takes it."""
    stored = trial.user_attrs["overrides"]
    return {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}


def epochs_trained(trial: FrozenTrial) -> int:
    """Epochs that a trial trained: those with a value."""
    return len(trial.intermediate_values)
