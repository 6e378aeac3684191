"""Opening an MLflow store: in bounded time, quietly, and with one clear sentence where it cannot be used."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from refilled.errors import UserError
from refilled.secrets import password_of, without_passwords
from refilled.storage import Storage
from tune.tracking.moves import IS_BESIDE, beside, follow_move

if TYPE_CHECKING:
    from mlflow import MlflowClient

_ENVIRONMENT = {
    # MLflow's own seven retries of 120 s each block a call for minutes when the server is gone.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
_LOG_LEVELS = {
    "mlflow": logging.WARNING,
    "alembic": logging.WARNING,
    # These two print what is raised as well, once per attempt; the exception is reported once, by us.
    "mlflow.store.db.utils": logging.CRITICAL,
    "urllib3.connectionpool": logging.ERROR,
}
_SERVERS = ("http", "https")
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_DATABASE_ANSWER_S = 10
_CAUSE_LENGTH = 160


class UnusableStoreError(UserError):
    """A store that does not answer, or answers only to refuse; `trouble` says so without the advice."""

    def __init__(self, trouble: str) -> None:
        super().__init__(
            f"tracking_uri: {trouble}; "
            "give a server that answers, such as http://HOST:5000, or sqlite:///FILE in a folder that can be written"
        )
        self.trouble = trouble


def resolve_tracking_uri(uri: str | None, storage: Storage) -> str:
    """The URI given, or the SQLite file `mlflow.db` in the storage folder.

    Raises:
        UserError: It is no store's address, or the storage folder's path cannot be part of one; or storage is this
            machine's copy of an object store, which may be gone tomorrow, and the URI is not a server's, which keeps
            artifacts elsewhere.
    """
    if storage.is_remote and not (uri and is_server(uri)):
        raise UserError(
            f"tracking_uri must be a server, such as http://HOST:5000, where storage is an object store, "
            f"got {uri or 'none'}."
        )
    if uri:
        require_store(uri)
        return uri
    root = storage.root.resolve()
    if re.search(r"\?|%[0-9A-Fa-f]{2}", str(root)):
        raise UserError(
            f"storage must have no question mark and no % before two hexadecimal digits in its path, which a URI reads "
            f"otherwise, got {storage.location!r}."
        )
    return f"sqlite:///{root / 'mlflow.db'}"


def quiet_mlflow() -> None:
    """Bound MLflow's retries and quieten its loggers; settings already in the environment win."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401  (configures its loggers when imported, so it must come before the levels)

    for name, level in _LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)


def shown_uri(uri: str) -> str:
    """The URI as it may be printed: without its password."""
    return without_passwords(uri)


def store_trouble(uri: str, error: BaseException | str) -> str:
    """What is wrong with a store, in half a sentence without passwords."""
    if isinstance(error, UnusableStoreError):
        return error.trouble
    cause = str(error)
    if "Max retries exceeded" in cause:  # the end of what is otherwise a page about one refused connection
        status = re.search(r"too many (\d+) error responses", cause)
        cause = f"the server's answer is status {status[1]}" if status else "no server answers there"
    if password := password_of(uri):
        cause = without_passwords(cause).replace(password, "***")
    cause = " ".join(cause.split()).rstrip(".")
    if len(cause) > _CAUSE_LENGTH:
        cause = cause[:_CAUSE_LENGTH] + "..."
    return f"MLflow at {shown_uri(uri)} cannot be used ({cause})"


def unusable_store(uri: str, error: BaseException | str) -> UnusableStoreError:
    """The sentence for a store that cannot be used, whatever the reason."""
    return UnusableStoreError(store_trouble(uri, error))


def open_store(uri: str, *, create: bool) -> MlflowClient:
    """A client whose store exists and has answered.

    Args:
        uri: Address of a server or a database.
        create: Create a missing SQLite file and its tables (a writer); a reader never creates anything.

    Raises:
        UserError: The store cannot be used, or does not exist and must not be created; a server or database that does
            not answer is waited for about 10 s.
    """
    require_store(uri)
    scheme = _scheme(uri)
    if path := sqlite_path(uri):
        with _sqlite_ready(uri, path, create=create):
            client = _answering_client(uri)
            follow_move(path, is_writer=create)
            return client
    if scheme in _DATABASES:
        _require_connection(uri, scheme)
    return _answering_client(uri)


def require_store(uri: str) -> None:
    """Refuse what cannot be a store's address, without asking anybody.

    Raises:
        UserError: It is neither a server's nor a database's.
    """
    if _scheme(uri) not in _SERVERS + _DATABASES:
        raise unusable_store(uri, "this is neither a server's nor a database's address")


def is_server(uri: str) -> bool:
    """Whether an address is a server's, not a database's."""
    return _scheme(uri) in _SERVERS


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite URI, None for any other store.

    Raises:
        UserError: A SQLite URI without a file; a store in memory would be lost and is seen by one thread only.
    """
    scheme, _, rest = uri.partition("://")
    if scheme.split("+")[0] != "sqlite":
        return None
    name = rest.partition("?")[0].removeprefix("/")
    if not rest.startswith("/") or name in ("", ":memory:"):
        raise unusable_store(uri, "it names no file")
    return Path(name)


def find_or_create_experiment(client: MlflowClient, uri: str, name: str, artifact_root: Path) -> str:
    """The id of the experiment of that name.

    Args:
        client: Client of the store.
        uri: Its address, for the error.
        name: Name of the experiment.
        artifact_root: Where a new experiment of a database keeps its artifacts; a server has a place of its own.

    Raises:
        UserError: The name is not one MLflow takes, or belongs to a deleted experiment.
    """
    from mlflow.exceptions import MlflowException

    # MLflow alone would put a database's artifacts into the current directory, a job's copy.
    location = None if is_server(uri) else artifact_root.resolve().as_uri()
    path = sqlite_path(uri)
    tags = {IS_BESIDE: "true"} if path is not None and location == beside(path) else {}
    try:
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(client.create_experiment(name, artifact_location=location, tags=tags))
            except MlflowException as error:
                # Another command may have created it between the two calls.
                experiment = client.get_experiment_by_name(name)
                if experiment is None:
                    raise error from None
        if experiment.lifecycle_stage != "active":
            raise UserError(
                f"experiment: {name!r} was deleted in MLflow at {shown_uri(uri)}; restore it there or choose another "
                "name"
            )
        if tags and experiment.artifact_location == location and IS_BESIDE not in experiment.tags:
            client.set_experiment_tag(experiment.experiment_id, IS_BESIDE, "true")
    except MlflowException as error:
        raise unusable_store(uri, f"experiment {name!r}: {error}") from error
    return str(experiment.experiment_id)


def _answering_client(uri: str) -> MlflowClient:
    quiet_mlflow()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, OSError, ValueError) as error:  # ValueError: a driver's option in the URI
        raise unusable_store(uri, error) from error
    return client


def _require_connection(uri: str, scheme: str) -> None:
    """Connect once before MLflow sees the address.

    MLflow would retry for 100 s, and keeps every other store of this process from being opened for as long.
    """
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.pool import NullPool

    bound = {"timeout" if scheme == "mssql" else "connect_timeout": _DATABASE_ANSWER_S}
    try:
        with create_engine(uri, poolclass=NullPool, connect_args=bound).connect():
            pass
    except (SQLAlchemyError, ImportError, OSError, ValueError, TypeError) as error:  # the last two: a driver's option
        raise unusable_store(uri, error) from error


@contextlib.contextmanager
def _sqlite_ready(uri: str, path: Path, *, create: bool) -> Iterator[None]:
    """Check the file before MLflow sees it (it would retry for 100 s) and leave no empty one behind on failure."""
    import filelock

    if not create and not path.exists():
        raise UserError(
            f"tracking_uri: there is no file {path}, which {shown_uri(uri)} names; give the file a search has written"
        )
    existed = True  # until it is known that nobody else is making it
    try:
        with contextlib.ExitStack() as stack:
            if create:
                path.parent.mkdir(parents=True, exist_ok=True)
                # Two commands that create the tables at the same time break each other.
                stack.enter_context(filelock.FileLock(f"{path}.lock", timeout=60))
                existed = path.exists()
            if not _has_mlflow_tables(path, create=create) and not create:
                raise unusable_store(uri, "the file holds no MLflow tables")
            yield
    except BaseException as error:
        if not existed and path.is_file():
            path.unlink()
        if isinstance(error, (OSError, sqlite3.Error)):  # filelock's Timeout is an OSError
            raise unusable_store(uri, error) from error
        raise


def _has_mlflow_tables(path: Path, *, create: bool) -> bool:
    mode = "rwc" if create else "ro"
    connection = sqlite3.connect(f"file:{quote(str(path))}?mode={mode}", uri=True, timeout=5)
    with contextlib.closing(connection):
        if create:
            connection.execute("BEGIN IMMEDIATE")  # takes the write lock: fails where the file cannot be written
            connection.rollback()
        found = connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'experiments'")
        return found.fetchone() is not None


def _scheme(uri: str) -> str:
    """For example `postgresql` of `postgresql+psycopg://...`; empty where the text is no address."""
    return uri.partition("://")[0].split("+")[0] if "://" in uri else ""
