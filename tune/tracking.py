"""The only writer to MLflow: one thread of the driver mirrors the runs' `metrics.jsonl` files.

The files are the record, MLflow is a copy of them. Nothing here makes training wait: a call returns at once, the
thread delivers, and what MLflow does not take is sent again later.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from refilled.errors import UserError
from tune.tracking_delivery import Delivery
from tune.tracking_runs import Closing, RunIdentity, RunMirror, Status
from tune.tracking_store import (
    find_or_create_experiment,
    open_store,
    resolve_tracking_uri,
    sqlite_path,
    unusable_store,
)

__all__ = ["Status", "Tracker", "resolve_tracking_uri"]

_RUN_ID_S = 30.0
_DRAIN_S = 30.0
_LONGEST_NAME = 500


class Tracker:
    """One search in MLflow: an experiment, the search as parent run, trials and refits as its children.

    Runs are found again by their keys, so that a command that is run twice, or goes on after a crash, continues the
    runs it had. Use it as a context manager, or call `close`: a run or search that was not closed by then is marked
    KILLED (the search FAILED where an exception ends the block).

    Args:
        uri: Tracking URI, see `resolve_tracking_uri`.
        experiment: Name of the experiment.
        artifact_root: Where a new experiment of a SQLite store keeps artifacts; none: `artifacts` beside the file. A
            server decides for itself.

    Raises:
        UserError: The store or the experiment cannot be used; raised before any thread or run exists.
    """

    def __init__(self, uri: str, experiment: str, *, artifact_root: Path | None = None) -> None:
        if not experiment.strip() or len(experiment) > _LONGEST_NAME:
            raise UserError(f"experiment: must be a name of 1 to {_LONGEST_NAME} characters, not {experiment!r:.40}")
        self._uri = uri
        root = _checked_artifact_root(uri, artifact_root)
        self._client = open_store(uri, create=True)
        self._experiment_id = find_or_create_experiment(self._client, uri, experiment, root)
        self._search: RunMirror | None = None
        self._search_id = ""
        self._known_keys: set[str] = set()
        self._open_keys: set[str] = set()
        self._search_open = False
        self._delivery = Delivery(uri)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._search_open and isinstance(error, Exception):
            self.finish_search(status="FAILED")
        self.close()

    def start_search(self, key: str, *, name: str, params: Mapping[str, object], tags: Mapping[str, str]) -> str:
        """Create the parent run, or go on with the one of that key.

        Returns:
            Its run id.

        Raises:
            UserError: MLflow did not take it.
        """
        from mlflow.exceptions import MlflowException

        identity = RunIdentity(self._experiment_id, key, name)
        # Children carry `search_key` too, so the search itself is found by its `run_key`, like every other run.
        tags = {**tags, "search_key": key}
        mirror = RunMirror(self._client, identity, params=params, tags=tags, folder=None)
        try:
            mirror.deliver()
        except (MlflowException, OSError) as error:
            raise unusable_store(self._uri, error) from error
        self._search, self._search_id, self._search_open = mirror, str(mirror.run_id), True
        self._known_keys.add(key)
        self._delivery.add(key, mirror)
        return self._search_id

    def open_run(
        self, key: str, *, name: str, params: Mapping[str, object], tags: Mapping[str, str], folder: Path
    ) -> None:
        """Mirror the run that writes into `folder` as a child of the search; returns at once.

        Args:
            key: What the run is found again by, within the search; becomes the tag `run_key`.
            name: Its name in MLflow.
            params: Its settings, nested as they like; those of a run found again stay as they were.
            tags: Its tags; those of a run found again are set anew.
            folder: Run folder; `metrics.jsonl` need not exist yet.
        """
        if self._search is None:
            raise RuntimeError("start_search comes before open_run")
        identity = RunIdentity(self._experiment_id, key, name, parent_id=self._search_id)
        mirror = RunMirror(self._client, identity, params=params, tags=tags, folder=folder)
        self._known_keys.add(key)
        self._open_keys.add(key)
        self._delivery.add(key, mirror)

    def close_run(
        self,
        key: str,
        *,
        status: Status,
        metrics: Mapping[str, float],
        tags: Mapping[str, str] | None = None,
        artifacts: Path | None = None,
    ) -> None:
        """End a run after all rows of its file were sent; returns at once.

        Args:
            key: Key it was opened with.
            status: FINISHED; KILLED for a pruned or stopped run; FAILED.
            metrics: Logged last, at the step of the last epoch.
            tags: Tags that are known only now.
            artifacts: Folder whose files and folders are uploaded.
        """
        self._require_known(key)
        self._open_keys.discard(key)
        closing = Closing(status, dict(metrics), artifacts)
        self._delivery.change(key, lambda mirror: mirror.close(closing, tags or {}))

    def tag_run(self, key: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run, open or closed; returns at once."""
        self._require_known(key)
        self._delivery.change(key, lambda mirror: mirror.tag(tags))

    def finish_search(
        self, *, status: Status, metrics: Mapping[str, float] | None = None, artifacts: Path | None = None
    ) -> None:
        """End the parent run; returns at once."""
        if self._search is None:
            raise RuntimeError("start_search comes before finish_search")
        self._search_open = False
        closing = Closing(status, dict(metrics or {}), artifacts)
        self._delivery.change(self._search.identity.key, lambda mirror: mirror.close(closing, {}))

    def run_id(self, key: str) -> str:
        """MLflow's id of a run; waits until MLflow has it.

        Raises:
            TimeoutError: MLflow did not take the run within half a minute.
        """
        self._require_known(key)
        return self._delivery.run_id(key, _RUN_ID_S)

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything known at the time of the call is in MLflow; whether it is."""
        return self._delivery.flush(timeout_s)

    def close(self, timeout_s: float = _DRAIN_S) -> None:
        """Deliver what is left within `timeout_s` and stop the thread; says by a warning what could not be."""
        for key in sorted(self._open_keys):
            self.close_run(key, status="KILLED", metrics={})
        if self._search_open:
            self.finish_search(status="KILLED")
        self._delivery.stop(timeout_s)

    def _require_known(self, key: str) -> None:
        if key not in self._known_keys:
            raise KeyError(f"no run {key!r} was opened")


def _checked_artifact_root(uri: str, artifact_root: Path | None) -> Path | None:
    """The folder of a SQLite store's artifacts; MLflow alone would put them into the current directory."""
    path = sqlite_path(uri)
    if path is None:
        return None
    root = artifact_root or path.parent / "artifacts"
    existing = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise unusable_store(uri, f"artifact folder {root}: {existing} is not a folder")
    return root
