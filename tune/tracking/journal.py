"""What was told of a search, on the disk before the call returns; what MLflow has not taken is sent from here.

`STORAGE/tracking/` holds a file a search, one JSON object a line, each with `told`:

    search     the search began: key, name, params, tags, experiment, uri
    run        a run of it was opened: key, name, params, tags, folder
    close      a run, or the search itself, ended: key, status, metrics, tags, artifacts
    tag        a run was tagged: key, tags
    answered   MLflow at `uri` took the search
    delivered  MLflow at `uri` holds everything above

A URI that is null is the storage folder's own SQLite file; passwords are left out. Paths in the storage folder are
relative to it. The epochs' numbers are not here: they stay in the run folders.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from refilled.errors import UserError
from tune.tracking.record import Closing, RunRecord
from tune.tracking.store import resolve_tracking_uri, shown_uri, sqlite_path
from tune.tracking.told import Line, Told, answered_line, delivered_line

_FOLDER = "tracking"
_logger = logging.getLogger(__name__)


class Journal:
    """One search's journal, which one process at a time holds.

    `told` is what it says. A line that cannot be written is a warning, no error: MLflow may take what it said.
    """

    def __init__(self, told: Told, path: Path | None = None, lock: FileLock | None = None) -> None:
        self.told = told
        self._path = path
        self._lock = lock
        self._file: IO[bytes] | None = None if path is None else path.open("ab", buffering=0)
        self._is_torn = False
        self._before: tuple[RunRecord | None, str | None] = None, None
        self._writing = threading.Lock()

    @classmethod
    def in_memory(cls) -> Journal:
        """One that is lost with the process."""
        return cls(Told(Path()))

    @classmethod
    def of_search(cls, storage: Path, experiment: str, key: str) -> Journal:
        """The journal of a search, made where it is missing; a further one where another process holds the first.

        Raises:
            UserError: It cannot be written.
        """
        from refilled.config import content_hash

        stem = content_hash([experiment, key])
        number = 1
        try:
            (storage / _FOLDER).mkdir(parents=True, exist_ok=True)
            while (journal := cls.held(storage, _file_name(stem, number))) is None:
                number += 1
        except OSError as error:
            raise UserError(
                f"storage must be a folder that can be written, but its {_FOLDER}/ in {storage} cannot ({error})."
            ) from error
        return journal

    @classmethod
    def held(cls, storage: Path, name: str) -> Journal | None:
        """The journal of that file name in the storage folder, read and tidied; none where another process holds it.

        Raises:
            OSError: It cannot be read or written.
        """
        path = storage / _FOLDER / name
        lock = FileLock(path.with_suffix(".lock"), thread_local=False)  # may be closed by another thread
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        try:
            told = Told(storage.absolute())
            if path.exists():
                _load(path, told)
            return cls(told, path, lock)
        except BaseException:
            lock.release()
            raise

    def start_search(self, record: RunRecord, experiment: str, uri: str | None) -> RunRecord:
        """The search begins, or begins again; returns all that is known of it, without how it ended."""
        self._before = self.told.search, self.told.uri
        self._tell(self.told.search_line(record, experiment, uri))
        return self.told.record(record.key)

    def open_run(self, record: RunRecord) -> RunRecord:
        """A run is open; returns all that is known of it, without how it ended.

        A run that is opened again, as all earlier ones are when a search goes on, gets no line where that says nothing
        new; how it ended before then stays true until it ends again.
        """
        known = self.told.runs.get(record.key)
        if known is None or known.told_again(record) != dataclasses.replace(known, closing=None):
            self._tell(self.told.run_line(record))
        return dataclasses.replace(self.told.runs[record.key], closing=None)

    def close_run(self, key: str, closing: Closing, tags: Mapping[str, str]) -> Closing:
        """A run, or the search, has ended; returns that, with the time at which it was said first."""
        known = self.told.record(key)
        if known.closing != closing or known.tagged(tags) != known:
            self._tell(self.told.close_line(key, closing, tags))
        return self.told.record(key).closing or closing

    def tag_run(self, key: str, tags: Mapping[str, str]) -> None:
        """A run, open or not, has more tags."""
        known = self.told.record(key)
        if known.tagged(tags) != known:
            self._tell({"told": "tag", "key": key, "tags": dict(tags)})

    def note_answer(self, uri: str | None) -> None:
        """A store took the search."""
        if uri not in self.told.answered:
            self._tell(answered_line(uri))

    def note_delivery(self, uri: str | None) -> None:
        """A store holds everything told up to now."""
        self.note_answer(uri)
        if uri not in self.told.delivered:
            self._tell(delivered_line(uri))

    def close(self) -> None:
        """Let others have it."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._lock is not None:
            self._lock.release()

    def discard(self) -> None:
        """Take back that the search began, which no store took, and let others have the journal."""
        record, uri = self._before
        if record is not None:
            self._tell(self.told.search_line(record, self.told.experiment, uri))
            if record.closing is not None:
                self._tell(self.told.close_line(record.key, record.closing, {}))
        elif self._path is not None:
            self._path.unlink()
        self.close()

    def _tell(self, line: Line) -> None:
        with self._writing:
            self.told.add(line)
            if self._file is None:
                return
            try:
                text = b"\n" + _bytes(line) if self._is_torn else _bytes(line)
                if self._file.write(text) != len(text):
                    raise OSError("only a part of a line was taken")
                os.fsync(self._file.fileno())
                self._is_torn = False
            except OSError as error:
                if not self._is_torn:
                    _logger.warning("%s cannot be written (%s); what it lacks goes to MLflow alone", self._path, error)
                self._is_torn = True


def journal_names(storage: Path) -> list[str]:
    """The file names of all journals of a storage folder."""
    return sorted(path.name for path in (storage / _FOLDER).glob("*.jsonl"))


def kept_uri(uri: str, storage: Path) -> str | None:
    """A URI as journals keep it: none for the storage folder's own file, and without its password."""
    path = sqlite_path(uri)
    is_own = path is not None and path.resolve() == sqlite_path(resolve_tracking_uri(None, storage))
    return None if is_own else shown_uri(uri)


def has_answered(storage: Path, uri: str) -> bool:
    """Whether some search of a storage folder was taken by the store before."""
    wanted = kept_uri(uri, storage)
    for name in journal_names(storage):
        told = Told(storage.absolute())
        _add_all((storage / _FOLDER / name).read_bytes(), told)
        if wanted in told.answered:
            return True
    return False


def _file_name(stem: str, number: int) -> str:
    return f"{stem}.jsonl" if number == 1 else f"{stem}-{number}.jsonl"


def _load(path: Path, told: Told) -> None:
    """Read a journal, and write it anew without what was said twice or half."""
    from refilled.storage.store import write_bytes  # imports torch

    content = path.read_bytes()
    if num_damaged := _add_all(content, told):
        kept = path.with_suffix(".damaged")
        write_bytes(kept, content)
        _logger.warning(
            "%s: left out %d damaged line(s), so what they said is not sent; %s is the file as it was",
            path,
            num_damaged,
            kept.name,
        )
    tidy = b"".join(map(_bytes, told.lines()))
    if tidy != content:
        write_bytes(path, tidy)


def _add_all(content: bytes, told: Told) -> int:
    """Take in all whole lines; returns how many of them are damaged."""
    num_damaged = 0
    for line in _whole_lines(content):
        try:
            told.add(json.loads(line))
        except (ValueError, KeyError, TypeError):
            num_damaged += 1
    return num_damaged


def _whole_lines(content: bytes) -> Iterable[bytes]:
    """What follows the last newline was being written when its process was killed."""
    lines: Iterator[bytes] = iter(content[: content.rfind(b"\n") + 1].split(b"\n"))
    return (line for line in lines if line.strip())


def _bytes(line: Line) -> bytes:
    return json.dumps(line).encode() + b"\n"
