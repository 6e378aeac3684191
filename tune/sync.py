"""Send what MLflow lacks of the searches in a storage.

python tune/sync.py STORAGE [--tracking-uri URI]     send what MLflow lacks, or all of it to another one

STORAGE is a folder or an object store's, on any machine that sees it. Safe to repeat and to interrupt: every run is
looked up first, and only what MLflow lacks is sent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from refilled.command import new_app, run_app
from refilled.errors import UserError
from refilled.storage import Storage
from tune.tracking.outbox import Outbox, SearchState
from tune.tracking.store import resolve_tracking_uri, shown_uri, store_trouble, unusable_store
from tune.tracking.sync import Connection, RunSync, Sync

_FAILURES_IN_A_ROW = 3

app = new_app("sync", "Send what MLflow lacks of the searches in a storage.")


@dataclass
class _Sent:
    """What came of a search's runs; `failed` holds the reasons, `known` is the number that was not looked at."""

    created: int = 0
    completed: int = 0
    found: int = 0
    known: int = 0
    values: int = 0
    failed: list[str] = dataclasses.field(default_factory=list)

    def add(self, run: RunSync) -> None:
        """Count a run that was brought."""
        self.values += run.num_values_sent
        self.created += run.was_created
        self.completed += run.was_changed and not run.was_created
        self.found += run.was_looked_at and not run.was_changed and not run.was_created
        self.known += not run.was_looked_at

    def __str__(self) -> str:
        return (
            f"{self.created} run(s) sent, {self.completed} completed, {self.found + self.known} found whole; "
            f"{self.values} metric value(s) sent"
        )


@app.default
def sync(storage: str, *, tracking_uri: str | None = None, again: bool = False) -> None:
    """Send what MLflow lacks of every search in a storage; one that is running on this machine is left to itself.

    Args:
        storage: Storage folder of the searches, or an object store's.
        tracking_uri: Where to send; none: where each search was sent last. Another store gets a whole copy.
        again: Look at every run in MLflow even where it is known to be there.
    """
    root = _existing(storage)
    failed, damaged, num_found = list[str](), list[str](), 0
    try:
        for outbox in Outbox.all(root):
            num_found += 1
            search = outbox.search
            if search is None:
                damaged.append(outbox.key)
            elif not outbox.hold():
                print(f"{_title(search)}: the running search has it and sends it itself; left alone")
            else:
                with contextlib.closing(outbox):
                    failed += _sync_search(outbox, search, tracking_uri, again=again)
    except OSError as error:
        raise UserError(f"storage: {storage} cannot be read and written ({error})") from error
    if not num_found:
        raise UserError(f"storage: must be the storage of searches, but {storage} holds none")
    if failed:
        raise UserError(f"{len(failed)} run(s) could not be sent whole: {failed[0]}; the same command sends the rest")
    if damaged:
        raise UserError(
            f"{len(damaged)} search(es) could not be sent: state.json of {damaged[0]} is damaged; the search itself, "
            "run again, writes it anew"
        )


def command(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_app(app, arguments)


def _existing(location: str) -> Storage:
    """A storage that is there already: this command begins none.

    Raises:
        UserError: It is not, or it cannot be written.
    """
    storage = Storage.at(location)
    if not storage.is_remote and not storage.root.is_dir():
        raise UserError(f"storage: must be the storage of searches, but {location} is no folder")
    storage.require_writable()
    return storage


def _sync_search(outbox: Outbox, search: SearchState, tracking_uri: str | None, *, again: bool) -> list[str]:
    """Send one search and print what was done; returns why runs could not be sent."""
    uri = tracking_uri or _uri_of(search, outbox.storage)
    states = Sync(Connection(uri, search.experiment, outbox.storage), outbox, again=again)
    for state in (search, *outbox.runs.values()):
        states.put(state.without_driver(outbox.storage))
    try:
        sent = _send(states, search.key)
    finally:
        states.note_taken()
    if sent.known == len(outbox.runs) + 1:
        print(f"{_title(search)}: nothing is missing, MLflow at {shown_uri(uri)} has taken all of it")
    else:
        print(f"{_title(search)}: {sent}; MLflow at {shown_uri(uri)}")
    return sent.failed


def _send(states: Sync, search_key: str) -> _Sent:
    """Send the search's runs, the first in front, and the search itself last, so that it ends last.

    Raises:
        UserError: Several runs in a row could not be sent.
    """
    sent, in_a_row = _Sent(), 0
    for key, run in sorted(states.pending.items(), key=lambda item: item[0] == search_key):
        try:
            states.bring(key)
        except Exception as error:  # whatever MLflow's client or its artifact store raises must not stop the others
            sent.failed.append(f"{key}: {store_trouble(states.uri, error)}")
            in_a_row += 1
            if in_a_row == _FAILURES_IN_A_ROW:
                raise unusable_store(states.uri, error) from error
            continue
        in_a_row = 0
        sent.add(run)
    return sent


def _uri_of(search: SearchState, storage: Storage) -> str:
    if search.uri is not None and ":***@" in search.uri:
        raise UserError(f"tracking_uri: must be given with its password, which is not kept; it was {search.uri}")
    return resolve_tracking_uri(search.uri, storage)


def _title(search: SearchState) -> str:
    return f"search {search.name!r} ({search.key}) of experiment {search.experiment!r}"


if __name__ == "__main__":
    sys.exit(command())
