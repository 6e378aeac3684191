"""Sending a storage folder's searches to MLflow from their journals and run folders, without the searches' processes.

Safe to repeat and to interrupt: every run is looked up first, and only what MLflow lacks is sent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from refilled.command import new_app, run_app
from refilled.errors import UserError
from tune.tracking.connection import Connection
from tune.tracking.journal import Journal, journal_names, kept_uri
from tune.tracking.record import Closing, RunRecord
from tune.tracking.rows import METRICS_FILE
from tune.tracking.runs import RunMirror
from tune.tracking.store import resolve_tracking_uri, shown_uri, store_trouble, unusable_store
from tune.tracking.told import Told

_FAILURES_IN_A_ROW = 3

app = new_app("sync", "What MLflow lacks of the searches in a storage folder.")


@dataclass
class _Sent:
    """What came of a search's runs; `failed` holds the reasons."""

    created: int = 0
    completed: int = 0
    found: int = 0
    values: int = 0
    failed: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.created} run(s) sent, {self.completed} completed, {self.found} found whole; "
            f"{self.values} metric value(s) sent"
        )


@app.default
def replay(storage: Path, *, tracking_uri: str | None = None, again: bool = False) -> None:
    """Send what MLflow lacks of every search in a storage folder; a search that is running is left to itself.

    Args:
        storage: Storage folder of the searches.
        tracking_uri: Where to send; none: where each search was sent last. Another store gets a whole copy.
        again: Look at every run in MLflow even where the journal says that it is there.
    """
    names = journal_names(storage)
    if not names:
        raise UserError(f"storage: must be the storage folder of a search that was told to MLflow, not {storage}")
    failed: list[str] = []
    for name in names:
        try:
            journal = Journal.held(storage, name)
        except OSError as error:
            raise UserError(f"storage: {storage} cannot be read and written ({error})") from error
        if journal is None:
            print(f"{name}: a running search has it and sends it itself; left alone")
            continue
        try:
            failed += _replay_search(journal, name, storage, tracking_uri, again=again)
        finally:
            journal.close()
    if failed:
        raise UserError(f"{len(failed)} run(s) could not be sent whole: {failed[0]}; the same command sends the rest")


def command(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_app(app, arguments)


def _replay_search(journal: Journal, name: str, storage: Path, tracking_uri: str | None, *, again: bool) -> list[str]:
    """Send one search and print what was done; returns why runs could not be sent."""
    told = journal.told
    if told.search is None:
        return [f"{name} does not say which search it is of"]
    uri = tracking_uri or _uri_of(told, storage)
    title = f"search {told.search.name!r} ({told.search.key}) of experiment {told.experiment!r}"
    kept = kept_uri(uri, storage)
    if kept in told.delivered and not again:
        print(f"{title}: nothing is missing, MLflow at {shown_uri(uri)} has taken all of it")
        return []
    connection = Connection(uri, told.experiment, storage.absolute() / "artifacts")
    connection.connect()
    sent = _send(connection, told, told.search)
    print(f"{title}: {sent}; MLflow at {shown_uri(uri)}")
    if not sent.failed:
        journal.note_delivery(kept)
    return sent.failed


def _uri_of(told: Told, storage: Path) -> str:
    if told.uri is not None and ":***@" in told.uri:
        raise UserError(f"tracking_uri: must be given with its password, which is not kept; it was {told.uri}")
    return resolve_tracking_uri(told.uri, storage)


def _send(connection: Connection, told: Told, search: RunRecord) -> _Sent:
    """Send the search's runs in the order they were told, and the search itself last, so that it ends last.

    Raises:
        UserError: Several runs in a row could not be sent.
    """
    sent, in_a_row = _Sent(), 0
    parent = RunMirror(connection, _ended(search), None)
    mirrors = [RunMirror(connection, _ended(record), parent) for record in told.runs.values()]
    for mirror in [*mirrors, parent]:
        try:
            mirror.deliver()
        except Exception as error:  # whatever MLflow's client or its artifact store raises must not stop the others
            sent.failed.append(f"{mirror.key}: {store_trouble(connection.uri, error)}")
            in_a_row += 1
            if in_a_row == _FAILURES_IN_A_ROW:
                raise unusable_store(connection.uri, error) from error
            continue
        in_a_row = 0
        sent.values += mirror.num_values_sent
        if mirror.was_created:
            sent.created += 1
        elif mirror.was_changed:
            sent.completed += 1
        else:
            sent.found += 1
    return sent


def _ended(record: RunRecord) -> RunRecord:
    """A run as it ended; one that was open when its process died was killed, when its last row was written."""
    if record.closing is not None:
        return record
    rows = None if record.folder is None else record.folder / METRICS_FILE
    last_ms = int(rows.stat().st_mtime * 1000) if rows is not None and rows.exists() else record.started_ms
    return dataclasses.replace(record, closing=Closing("KILLED", ended_ms=max(last_ms, record.started_ms)))
