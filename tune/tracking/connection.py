"""One experiment in one MLflow store, connected when it is first needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tune.tracking.store import find_or_create_experiment, is_server, open_store, sqlite_path, unusable_store

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Connection:
    """A client and an experiment's id; used by one thread at a time.

    Args:
        uri: Tracking URI.
        experiment: Name of the experiment, created where it is missing.
        artifact_root: Where a new experiment of a database keeps artifacts; none: `artifacts` beside a SQLite file.

    Raises:
        UserError: The artifacts' folder cannot be one.
    """

    def __init__(self, uri: str, experiment: str, artifact_root: Path | None) -> None:
        self.uri = uri
        self._experiment = experiment
        self._artifact_root = _checked_artifact_root(uri, artifact_root)
        self._connected: tuple[MlflowClient, str] | None = None

    @property
    def is_connected(self) -> bool:
        """Whether the store has answered."""
        return self._connected is not None

    def connect(self) -> tuple[MlflowClient, str]:
        """The client and the experiment's id.

        Raises:
            UnusableStoreError: The store does not answer, or does not take the experiment.
            UserError: The experiment was deleted.
        """
        if self._connected is None:
            client = open_store(self.uri, create=True)
            found = find_or_create_experiment(client, self.uri, self._experiment, self._artifact_root)
            self._connected = client, found
        return self._connected


def _checked_artifact_root(uri: str, artifact_root: Path | None) -> Path | None:
    """The folder of a database's artifacts: MLflow alone would put them into the current directory, a job's copy.

    A server has its own.
    """
    path = sqlite_path(uri)
    root = artifact_root if artifact_root is not None or path is None else path.parent / "artifacts"
    if root is None or is_server(uri):
        return None
    existing = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise unusable_store(uri, f"artifact folder {root}: {existing} is not a folder")
    return root
