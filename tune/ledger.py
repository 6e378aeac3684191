"""The storage of all studies: what it holds of a cell, how it is opened, and what a dead driver left in it."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState

from refilled.config import RunConfig
from refilled.errors import UserError
from tune.space import default_point


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
    """The study ends with this many complete or pruned trials, those it already holds included."""
    num_epochs: int
    """Epochs of a complete trial, over all stages."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Kept with the study; plain JSON values."""


def open_storage(url: str) -> RDBStorage:
    """Open or create the database of all studies.

    Raises:
        UserError: when it cannot be reached, or another version of Optuna wrote it.
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
            f"got {_without_password(url)!r} ({reason})."
        ) from error


def open_study(plan: StudyPlan, storage: BaseStorage, *, seed: int, pruner: BasePruner) -> optuna.Study:
    """Open or create a cell's study, clear up after a dead driver, and put the run's own settings first."""
    study = optuna.create_study(
        study_name=plan.name, storage=storage, direction="maximize", pruner=pruner, load_if_exists=True
    )
    stored = study.user_attrs
    for name, value in {"cell": plan.key, **plan.attributes}.items():
        if name not in stored or stored[name] != value:
            study.set_user_attr(name, value)
    trials = study.get_trials(deepcopy=False)
    study.sampler = _sampler(seed + int(hashlib.sha256(plan.key.encode()).hexdigest()[:8], 16) + len(trials), plan)
    if trials:
        _requeue_interrupted(study, trials)
    else:
        study.enqueue_trial(default_point(plan.run))
    return study


def overrides_of(trial: FrozenTrial) -> dict[str, Any]:
    """What a told trial changed in its plan's run, as `with_overrides` takes it."""
    stored = trial.user_attrs["overrides"]
    return {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}


def carry_over_values(study: optuna.Study, trial: optuna.Trial) -> dict[int, float]:
    """Tell a trial that goes on with an interrupted one's run what that one told already.

    The run continues from its folder and only repeats its last row, so nobody else would say the values before it.
    """
    number = trial.user_attrs.get("resumes")
    if number is None:
        return {}
    values = study.get_trials(deepcopy=False)[number].intermediate_values
    for epoch, value in values.items():
        trial.report(value, epoch)
    return dict(values)


def _sampler(seed: int, plan: StudyPlan) -> optuna.samplers.BaseSampler:
    """TPE. A small budget gets a smaller random start; `group` models conditional settings jointly with the rest."""
    with warnings.catch_warnings():
        # `group` is marked experimental since 2021; without it conditional settings are drawn independently.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=seed % 2**32, multivariate=True, group=True, n_startup_trials=min(10, max(4, plan.num_trials // 4))
        )


def _requeue_interrupted(study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
    """Fail the trials that a dead driver left RUNNING; their points are tried next.

    The point is queued before the trial is failed and names it, so that a driver that dies in between loses nothing
    and the next one queues nothing twice.
    """
    queued = {trial.user_attrs.get("resumes") for trial in trials}
    for trial in trials:
        if trial.state != TrialState.RUNNING:
            continue
        params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        if params and trial.number not in queued:
            study.enqueue_trial(params, user_attrs={"resumes": trial.number})
        study.tell(trial.number, state=TrialState.FAIL)


def _without_password(url: str) -> str:
    import sqlalchemy.exc
    from sqlalchemy.engine import make_url

    try:
        return make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return url
