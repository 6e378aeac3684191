"""The only writer to MLflow: what a search says of its runs, kept in its outbox and brought to MLflow by a thread.

The outbox and the runs' `metrics.jsonl` are the record, MLflow is a copy of them. Nothing here makes training wait: a
call returns when a state is on the disk, and what MLflow does not take is sent again later, by this process, by the
next one of the same search, or by `python tune/sync.py` on any machine that sees the storage.
"""

from __future__ import annotations

import dataclasses
import logging
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from refilled.errors import UserError
from refilled.storage import Storage
from tune.tracking.background import BackgroundSync
from tune.tracking.outbox import (
    Ending,
    Outbox,
    RunState,
    SearchState,
    Status,
    has_answered,
    kept_uri,
    now_ms,
)
from tune.tracking.store import UnusableStoreError, resolve_tracking_uri, shown_uri, unusable_store
from tune.tracking.sync import Connection, Sync
from tune.tracking.texts import clean_params, clean_tags

__all__ = ["Status", "Tracker", "resolve_tracking_uri"]

_RUN_IDS_S = 10.0
_DRAIN_S = 30.0
_INTERRUPTED_DRAIN_S = 5.0  # whoever ends a job waits 10 to 30 s before they kill it
_LONGEST_NAME = 500

_logger = logging.getLogger(__name__)


class Tracker:
    """One search in MLflow: an experiment, the search as parent run, trials and refits as its children.

    Runs are found again by their keys, so that a command that is run twice, or goes on after a crash, continues the
    runs it had. Use it as a context manager, or call `close`: a run or search that was not closed by then is marked
    KILLED (the search FAILED where an exception ends the block).

    Args:
        uri: Tracking URI, kept as an attribute; see `resolve_tracking_uri`.
        experiment: Name of the experiment.
        storage: Keeps what MLflow is to have, and the artifacts of an experiment of a database.

    Raises:
        UserError: The store or the experiment cannot be used; raised before any thread or run exists. A store that
            took a search of this storage folder before may be away: that is a warning, and it is caught up later.
    """

    def __init__(self, uri: str, experiment: str, storage: Storage) -> None:
        if not experiment.strip() or len(experiment) > _LONGEST_NAME:
            raise UserError(f"experiment: must be a name of 1 to {_LONGEST_NAME} characters, not {experiment!r:.40}")
        self.uri = uri
        self._experiment = experiment
        self._storage = storage
        self._connection = Connection(uri, experiment, storage)
        self._is_away = False
        try:
            _ = self._connection.client_and_experiment
        except UnusableStoreError as error:
            self._goes_on_without(error)
        self._outbox: Outbox | None = None
        self._background: BackgroundSync | None = None
        self._is_closed = False
        self._open_keys: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_search_open and isinstance(error, Exception):
            self.finish_search(status="FAILED")
        self.close(_DRAIN_S if error is None or isinstance(error, Exception) else _INTERRUPTED_DRAIN_S)

    def start_search(self, key: str, *, name: str, params: Mapping[str, object], tags: Mapping[str, str]) -> str | None:
        """Create the parent run, or go on with the one of that key, and with what MLflow lacks of it.

        Returns:
            Its run id; none where MLflow is away for now.

        Raises:
            UserError: MLflow did not take it, and never took a search of this storage folder.
        """
        # Children carry `search_key` too, so the search itself is found by its `run_key`, like every other run.
        uri = kept_uri(self.uri, self._storage)
        all_tags = clean_tags({**tags, "search_key": key})
        search = SearchState(key, name, clean_params(params), all_tags, experiment=self._experiment, uri=uri)
        outbox = Outbox(self._storage, key)
        sync = Sync(self._connection, outbox)
        state = search.after(outbox.search)
        sync.put(state)
        if not self._is_away:
            try:
                sync.bring(key)
            except Exception as error:  # whatever MLflow raises
                self._goes_on_without(error)
        outbox.hold()  # a `tune/sync.py` that has it now does no harm
        outbox.put(state)
        for each in outbox.runs.values():
            sync.put(each.without_driver(self._storage))
        self._outbox = outbox
        run_id = sync.pending[key].run_id
        self._background = BackgroundSync(sync, is_trouble_known=self._is_away)
        return run_id

    def open_run(
        self,
        key: str,
        *,
        name: str,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        folder: Path,
        ending: Ending | None = None,
    ) -> None:
        """Mirror the run that writes into `folder` as a child of the search; returns at once.

        Args:
            key: What the run is found again by, within the search.
            name: Its name in MLflow.
            params: Its settings by dotted name; in MLflow those of a run found again stay as they were.
            tags: Its tags; those of a run found again are set anew.
            folder: Run folder.
            ending: How it ended, if it has; a finished run that is opened again stays finished until it ends otherwise.
        """
        known = self._started("open_run").runs.get(key)
        if ending is None and known is not None and known.ending is not None and known.ending.status == "FINISHED":
            ending = known.ending
        self._put(RunState(key, name, clean_params(params), clean_tags(tags), folder.absolute(), ending=ending))
        if ending is None:
            self._open_keys.add(key)

    def close_run(
        self,
        key: str,
        *,
        status: Status,
        metrics: Mapping[str, float],
        artifacts: Path | None = None,
        artifacts_digest: str = "",
    ) -> None:
        """End a run after all rows of its file were sent; returns at once. What it is registered as, it stays.

        Args:
            key: Key it was opened with.
            status: FINISHED; KILLED for a pruned or stopped run; FAILED.
            metrics: Logged last, at the step of the last epoch.
            artifacts: Folder whose files and folders are uploaded.
            artifacts_digest: Hash of what may change in it; with another one than before it is uploaded again.
        """
        known = self._known(key)
        registered = {} if known.ending is None else known.ending.registered
        ending = Ending(status, dict(metrics), artifacts and artifacts.absolute(), artifacts_digest, registered)
        self._put(dataclasses.replace(known, ending=ending))
        self._open_keys.discard(key)

    def register(self, key: str, name: str) -> None:
        """Make the model of a run that has ended the champion of a registered model, in place of another run's.

        Args:
            key: Key the run was opened with.
            name: Of the registered model, see `students.registered_name`.
        """
        for other in list(self._started("register").runs.values()):
            ending = other.ending
            if ending is None or (name in ending.registered) == (other.key == key):
                continue
            registered = {each: time_ms for each, time_ms in ending.registered.items() if each != name}
            if other.key == key:
                registered[name] = now_ms()
            self._put(dataclasses.replace(other, ending=dataclasses.replace(ending, registered=registered)))

    def tag_run(self, key: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run, open or closed; returns at once."""
        known = self._known(key)
        self._put(dataclasses.replace(known, tags={**known.tags, **clean_tags(tags)}))

    def finish_search(
        self, *, status: Status, metrics: Mapping[str, float] | None = None, artifacts: Path | None = None
    ) -> None:
        """End the parent run; returns at once."""
        search = self._started("finish_search").search
        assert search is not None
        ending = Ending(status, dict(metrics or {}), artifacts and artifacts.absolute())
        self._put(dataclasses.replace(search, ending=ending))

    def run_id(self, key: str, timeout_s: float = _RUN_IDS_S) -> str | None:
        """MLflow's id of a run; none where MLflow did not take it within the time."""
        return self.run_ids([key], timeout_s)[key]

    def run_ids(self, keys: Collection[str], timeout_s: float = _RUN_IDS_S) -> dict[str, str | None]:
        """MLflow's ids of runs; none for those that MLflow did not take within the time, which is that of all."""
        for key in keys:
            self._known(key)
        found = {} if self._background is None else self._background.run_ids(keys, timeout_s)
        return {key: found.get(key) for key in keys}

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything known at the time of the call is in MLflow; whether it is."""
        return self._background is None or self._background.flush(timeout_s)

    def close(self, timeout_s: float = _DRAIN_S) -> None:
        """Bring MLflow what is left within `timeout_s` and stop; says by a warning what could not be."""
        if self._is_closed or self._outbox is None or self._background is None:
            return
        self._is_closed = True
        for key in sorted(self._open_keys):
            self.close_run(key, status="KILLED", metrics={})
        if self._is_search_open:
            self.finish_search(status="KILLED")
        left = self._background.stop(timeout_s)
        if left:
            _logger.warning(
                "MLflow at %s has not taken everything of %d run(s) (%s); the storage keeps it, and it is sent by "
                "`python tune/sync.py %s`, or when the same command is run again",
                shown_uri(self.uri),
                len(left),
                ", ".join(left[:5]) + (", ..." if len(left) > 5 else ""),
                shlex.quote(self._storage.location),
            )
        self._outbox.close()

    @property
    def _is_search_open(self) -> bool:
        return self._outbox is not None and self._outbox.search is not None and self._outbox.search.ending is None

    def _goes_on_without(self, error: Exception) -> None:
        """Accept that a store is away; where it never took a search of this storage, raise that it cannot be used."""
        unusable = error if isinstance(error, UserError) else unusable_store(self.uri, error)
        if not isinstance(unusable, UnusableStoreError) or not has_answered(self._storage, self.uri):
            raise unusable from error
        _logger.warning("%s; the search goes on, and MLflow is caught up when it answers again", unusable.trouble)
        self._is_away = True

    def _started(self, call: str) -> Outbox:
        if self._outbox is None:
            raise RuntimeError(f"start_search comes before {call}")
        return self._outbox

    def _known(self, key: str) -> RunState:
        outbox = self._started("a run")
        if key not in outbox.runs:
            raise KeyError(f"no run {key!r} was opened")
        return outbox.runs[key]

    def _put(self, state: RunState) -> None:
        assert self._outbox is not None
        assert self._background is not None
        self._background.put(self._outbox.put(state))
