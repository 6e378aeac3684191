"""The only writer to MLflow: one thread of the driver mirrors the runs' `metrics.jsonl` files.

The files are the record, MLflow is a copy of them; what is told beside them is kept in a journal in the storage folder.
Nothing here makes training wait: a call returns at once, the thread delivers, and what MLflow does not take is sent
again later, by this process, by the next one of the same search, or by `python tune/sync.py`.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from refilled.errors import UserError
from tune.tracking.connection import Connection
from tune.tracking.delivery import Delivery
from tune.tracking.journal import Journal, has_answered, kept_uri
from tune.tracking.record import Closing, RunRecord, Status, clean_tags, flat_params
from tune.tracking.runs import RunMirror
from tune.tracking.store import UnusableStoreError, resolve_tracking_uri, shown_uri, unusable_store

__all__ = ["Status", "Tracker", "replay_command", "resolve_tracking_uri"]

_START_S = 30.0
_RUN_IDS_S = 10.0
_DRAIN_S = 30.0
_LONGEST_NAME = 500

_logger = logging.getLogger(__name__)


def replay_command(storage: Path) -> str:
    """What a person types to send what MLflow lacks of the searches in a storage folder."""
    return f"python tune/sync.py {shlex.quote(str(storage))}"


class Tracker:
    """One search in MLflow: an experiment, the search as parent run, trials and refits as its children.

    Runs are found again by their keys, so that a command that is run twice, or goes on after a crash, continues the
    runs it had. Use it as a context manager, or call `close`: a run or search that was not closed by then is marked
    KILLED (the search FAILED where an exception ends the block).

    Args:
        uri: Tracking URI, see `resolve_tracking_uri`.
        experiment: Name of the experiment.
        artifact_root: Where a new experiment of a database keeps artifacts; none: `artifacts` beside a SQLite file. A
            server decides for itself.
        storage: Folder in which everything told is kept until MLflow has it; none: it is lost with the process.

    Raises:
        UserError: The store or the experiment cannot be used; raised before any thread or run exists. A store that
            took a search of this storage folder before may be away: that is a warning, and it is caught up later.
    """

    def __init__(
        self, uri: str, experiment: str, *, artifact_root: Path | None = None, storage: Path | None = None
    ) -> None:
        if not experiment.strip() or len(experiment) > _LONGEST_NAME:
            raise UserError(f"experiment: must be a name of 1 to {_LONGEST_NAME} characters, not {experiment!r:.40}")
        self._uri = uri
        self._experiment = experiment
        self._storage = storage
        self._connection = Connection(uri, experiment, artifact_root)
        try:
            self._connection.connect()
        except UnusableStoreError as error:
            if not self._answered_before():
                raise
            _logger.warning("%s; the search goes on, and MLflow is caught up when it answers again", error.trouble)
        self._journal = Journal.in_memory()
        self._search: RunMirror | None = None
        self._known_keys: set[str] = set()
        self._open_keys: set[str] = set()
        self._search_open = False
        self._is_closed = False
        self._delivery = Delivery(uri, is_trouble_known=not self._connection.is_connected)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._search_open and isinstance(error, Exception):
            self.finish_search(status="FAILED")
        self.close()

    def start_search(self, key: str, *, name: str, params: Mapping[str, object], tags: Mapping[str, str]) -> str | None:
        """Create the parent run, or go on with the one of that key, and with what its journal still has to send.

        Returns:
            Its run id; none where MLflow is away for now.

        Raises:
            UserError: MLflow did not take it, and never took a search of this storage folder.
        """
        # Children carry `search_key` too, so the search itself is found by its `run_key`, like every other run.
        record = RunRecord(key, name, flat_params(params), clean_tags({**tags, "search_key": key}), folder=None)
        if self._storage is not None:
            self._journal = Journal.of_search(self._storage, self._experiment, key)
        told = self._journal.told
        earlier = [] if self._kept_uri in told.delivered else list(told.runs.values())
        record = self._journal.start_search(record, self._experiment, self._kept_uri)
        self._search, self._search_open = RunMirror(self._connection, record, None), True
        self._known_keys.add(key)
        self._delivery.add(key, self._search)
        run_id = self._id_of_search() if self._connection.is_connected else None
        for each in earlier:
            self._add_run(each)
        return run_id

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
        record = RunRecord(key, name, flat_params(params), clean_tags(tags), folder.absolute())
        self._add_run(self._journal.open_run(record))

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
        self._close(key, Closing(status, dict(metrics), artifacts and artifacts.absolute()), clean_tags(tags or {}))

    def tag_run(self, key: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run, open or closed; returns at once."""
        self._require_known(key)
        cleaned = clean_tags(tags)
        self._journal.tag_run(key, cleaned)
        self._delivery.change(key, lambda mirror: mirror.tag(cleaned))

    def finish_search(
        self, *, status: Status, metrics: Mapping[str, float] | None = None, artifacts: Path | None = None
    ) -> None:
        """End the parent run; returns at once."""
        if self._search is None:
            raise RuntimeError("start_search comes before finish_search")
        self._search_open = False
        self._close(self._search.key, Closing(status, dict(metrics or {}), artifacts and artifacts.absolute()), {})

    def run_id(self, key: str, timeout_s: float = _RUN_IDS_S) -> str | None:
        """MLflow's id of a run; none where MLflow did not take it within the time."""
        return self.run_ids([key], timeout_s)[key]

    def run_ids(self, keys: Collection[str], timeout_s: float = _RUN_IDS_S) -> dict[str, str | None]:
        """MLflow's ids of runs; none for those that MLflow did not take within the time, which is that of all."""
        for key in keys:
            self._require_known(key)
        found = self._delivery.run_ids(keys, timeout_s)
        return {key: found.get(key) for key in keys}

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything known at the time of the call is in MLflow; whether it is."""
        return self._delivery.flush(timeout_s)

    def close(self, timeout_s: float = _DRAIN_S) -> None:
        """Deliver what is left within `timeout_s` and stop the thread; says by a warning what could not be."""
        if self._is_closed:
            return
        self._is_closed = True
        for key in sorted(self._open_keys):
            self.close_run(key, status="KILLED", metrics={})
        if self._search_open:
            self.finish_search(status="KILLED")
        if self._delivery.stop(timeout_s):
            self._journal.note_delivery(self._kept_uri)
        else:
            left = self._delivery.undelivered
            _logger.warning(
                "MLflow at %s has not taken everything of %d run(s) (%s); the files in their run folders are complete "
                "and are sent %swhen the same command is run again",
                shown_uri(self._uri),
                len(left),
                ", ".join(left[:5]) + (", ..." if len(left) > 5 else ""),
                "" if self._storage is None else f"by `{replay_command(self._storage)}`, or ",
            )
        self._journal.close()

    @property
    def _kept_uri(self) -> str | None:
        return shown_uri(self._uri) if self._storage is None else kept_uri(self._uri, self._storage)

    def _answered_before(self) -> bool:
        return self._storage is not None and has_answered(self._storage, self._uri)

    def _id_of_search(self) -> str | None:
        """The parent run's id, once MLflow took it or refused."""
        assert self._search is not None
        key = self._search.key
        error = self._delivery.first_outcome(key, _START_S)
        if error is None:
            self._journal.note_answer(self._kept_uri)
            return self._delivery.run_ids([key], 0.0)[key]
        if self._answered_before():
            return None
        self._search_open = False
        self._is_closed = True
        self._delivery.abandon()
        self._journal.discard()
        raise error if isinstance(error, UserError) else unusable_store(self._uri, error) from error

    def _add_run(self, record: RunRecord) -> None:
        self._known_keys.add(record.key)
        if record.closing is None:
            self._open_keys.add(record.key)
        self._delivery.add(record.key, RunMirror(self._connection, record, self._search))

    def _close(self, key: str, closing: Closing, tags: Mapping[str, str]) -> None:
        known = self._journal.close_run(key, closing, tags)
        self._delivery.change(key, lambda mirror: mirror.close(known, tags))

    def _require_known(self, key: str) -> None:
        if key not in self._known_keys:
            raise KeyError(f"no run {key!r} was opened")
