"""What MLflow is to be given of a search: state files in the storage, each replaced as a whole when something changes.

    STORAGE/searches/KEY/state.json        the search itself: its experiment, where it is sent, and what a run has
    STORAGE/searches/KEY/runs/RUN.json     a run: key, name, params, tags, folder, when it began, how it ended
    STORAGE/searches/KEY/taken-HASH.json   what MLflow at one address has of it; saves work, may be lost

They are on the disk, and in the object store where the storage is one, before the call that writes them returns, so
that any machine can give MLflow what it lacks. The epochs' numbers are not here: they stay in the run folders. Paths in
the storage are relative to it, the address of its own SQLite file is null, and passwords are left out.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic
from filelock import FileLock, Timeout

from refilled.config import content_hash
from refilled.errors import StorageFullError, UserError
from refilled.storage import Storage
from tune.tracking.rows import last_written_ms
from tune.tracking.store import shown_uri, sqlite_path

Status = Literal["FINISHED", "KILLED", "FAILED"]

_ADDED = (
    "artifacts_digest",
    "registered",
)  # to an ending, since states were first kept; written where they say something
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:=+@-]{0,199}")

_logger = logging.getLogger(__name__)


def now_ms() -> int:
    """The time as MLflow counts it, in milliseconds since 1970."""
    return int(time.time() * 1000)


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    Attributes:
        status: Finished, stopped or failed.
        metrics: What is logged last.
        artifacts: A folder of artifacts.
        artifacts_digest: Hash of what may change in it; with another one it is sent again. Empty: nothing changes.
        registered: Names of registered models whose champion the run's model becomes, and when that was said, in
            milliseconds since 1970.
        ended_ms: When.
    """

    status: Status
    metrics: Mapping[str, float] = field(default_factory=dict)
    artifacts: Path | None = None
    artifacts_digest: str = ""
    registered: Mapping[str, int] = field(default_factory=dict)
    ended_ms: int = field(default_factory=now_ms, compare=False)


@dataclass(frozen=True)
class RunState:
    """One run as MLflow is to have it; `params` and `tags` are texts within its limits.

    Attributes:
        key: What the run is found again by; becomes its tag `run_key`.
        name: For people.
        params: Settings by dotted name.
        tags: All its tags.
        folder: Run folder with its rows; none for the search itself.
        started_ms: When it was first kept.
        ending: How it ended; none while it is open.
    """

    key: str
    name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    folder: Path | None = None
    started_ms: int = field(default_factory=now_ms, compare=False)
    ending: Ending | None = None

    def __post_init__(self) -> None:
        """Refuse a key that could break out of a filter string, which knows no escapes, or of a folder."""
        if not _KEY.fullmatch(self.key):
            raise ValueError(f"a key is 1 to 200 letters, digits or _.:=+@-, not {self.key!r}")

    def after(self, known: RunState | None) -> RunState:
        """This state with the times of an earlier one: it began when it began first, and what is equal ended then."""
        if known is None:
            return self
        ending = known.ending if self.ending == known.ending else self.ending
        return dataclasses.replace(self, started_ms=known.started_ms, ending=ending)

    def without_driver(self, storage: Storage) -> RunState:
        """This state after its driver is gone: a run that was open was killed when its last row was written."""
        if self.ending is not None:
            return self
        last_ms = 0 if self.folder is None else last_written_ms(storage, self.folder)
        return dataclasses.replace(self, ending=Ending("KILLED", ended_ms=max(last_ms, self.started_ms)))


@dataclass(frozen=True)
class SearchState(RunState):
    """The search itself, the parent of its runs: also its experiment, and the address it is sent to as it is kept."""

    experiment: str = ""
    uri: str | None = None


class Outbox:
    """The state files of one search.

    A file that cannot be written is a warning, no error: MLflow may take what it says, and it is tried again with the
    next one.

    Args:
        storage: Where they lie.
        key: Key of the search.

    Attributes:
        storage, key: The same.
        search: The search; none where nothing is kept of it yet.
        runs: Its runs by their keys, the first one kept in front.
    """

    def __init__(self, storage: Storage, key: str) -> None:
        self.storage = storage
        self.key = key
        self._folder = _searches(storage) / key
        self._lock = FileLock(self._folder / "outbox.lock", thread_local=False)  # may be closed by another thread
        self._unwritten: dict[Path, dict[str, Any]] = {}
        storage.pull(self._folder)
        search = self._read(self._folder / "state.json", SearchState)
        self.search = search if isinstance(search, SearchState) else None
        read = [self._read(path, RunState) for path in (self._folder / "runs").glob("*.json")]
        runs = sorted((run for run in read if run is not None), key=lambda run: (run.started_ms, run.key))
        self.runs = {run.key: run for run in runs}

    @classmethod
    def all(cls, storage: Storage) -> Iterator[Outbox]:
        """Those of a storage, one after the other."""
        storage.pull(_searches(storage))
        for path in sorted(_searches(storage).glob("*/state.json")):
            yield cls(storage, path.parent.name)

    def hold(self) -> bool:
        """Keep the search for this process among those of this machine; whether nobody else has it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        return True

    def close(self) -> None:
        """Let others have it."""
        self._write_all()
        self._lock.release()

    def put(self, state: RunState) -> RunState:
        """Keep a state in the place of the one before, unless it says the same; returns what is kept."""
        is_search = isinstance(state, SearchState)
        known = self.search if is_search else self.runs.get(state.key)
        state = state.after(known)
        if state == known:
            return known
        if isinstance(state, SearchState):
            self.search = state
        else:
            self.runs[state.key] = state
        path = self._folder / ("state.json" if is_search else f"runs/{state.key}.json")
        self._unwritten[path] = self.as_json(state)
        self._write_all()
        return state

    def as_json(self, state: RunState) -> dict[str, Any]:
        """A state as its file has it."""
        data = dataclasses.asdict(state) | {"folder": self._relative(state.folder)}
        if state.ending is not None:
            data["ending"]["artifacts"] = self._relative(state.ending.artifacts)
            for name in _ADDED:
                if not data["ending"][name]:
                    del data["ending"][name]
        return data

    def taken(self, uri: str | None) -> Taken:
        """What MLflow at an address, as it is kept, has of the search."""
        return Taken(self.storage, self._folder / f"taken-{content_hash(uri)}.json")

    def _write_all(self) -> None:
        had_failed = len(self._unwritten) > 1
        try:
            for path, data in list(self._unwritten.items()):
                path.parent.mkdir(parents=True, exist_ok=True)
                self.storage.write_json(path, data)
                del self._unwritten[path]
        except (OSError, StorageFullError) as error:
            if not had_failed:
                _logger.warning("%s cannot be written (%s); what it says goes to MLflow alone", path, error)

    def _read(self, path: Path, kind: type[RunState]) -> RunState | None:
        """The state in a file; none where there is no file, and, after a warning, where it is damaged."""
        try:
            state = pydantic.TypeAdapter(kind).validate_python(self.storage.read_json(path))
        except FileNotFoundError:
            return None
        except (UserError, pydantic.ValidationError) as error:
            _logger.warning("%s; MLflow is not given what it said", _trouble(path, error))
            return None
        ending = state.ending
        if ending is not None:
            ending = dataclasses.replace(ending, artifacts=self._absolute(ending.artifacts))
        return dataclasses.replace(state, folder=self._absolute(state.folder), ending=ending)

    def _relative(self, path: Path | None) -> str | None:
        if path is None:
            return None
        whole, root = path.absolute(), self.storage.root
        return str(whole.relative_to(root) if whole.is_relative_to(root) else whole)

    def _absolute(self, path: Path | None) -> Path | None:
        return None if path is None else self.storage.root / path  # which is the path alone where that is absolute


class Taken:
    """What MLflow at one address has of a search: MLflow's ids, and a hash of each state that it has whole.

    Attributes:
        search_id: MLflow's id of the search; what it has is another's where this is not the search's id there.
    """

    def __init__(self, storage: Storage, path: Path) -> None:
        self._storage = storage
        self._path = path
        self.search_id: str | None = None
        self._runs: dict[str, list[str]] = {}
        try:
            data = storage.read_json(path)
            self.search_id, self._runs = data["search_id"], dict(data["runs"])
        except (FileNotFoundError, UserError, KeyError, TypeError, ValueError):
            pass  # it is made again

    def id_of(self, key: str, state: Mapping[str, Any]) -> str | None:
        """MLflow's id of a run whose state it has whole."""
        run_id, digest = self._runs.get(key, (None, None))
        return run_id if digest == content_hash(state) else None

    def add(self, key: str, run_id: str, state: Mapping[str, Any]) -> None:
        """MLflow has a run whole."""
        self._runs[key] = [run_id, content_hash(state)]

    def drop(self, key: str) -> None:
        """A run is about to be changed there."""
        if self._runs.pop(key, None) is not None:
            self.write()

    def begin(self, search_id: str) -> None:
        """MLflow has the search under an id, and nothing else is known."""
        self.search_id, self._runs = search_id, {}
        self.write()

    def write(self) -> None:
        """Keep it, if that can be done."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._storage.write_json(self._path, {"search_id": self.search_id, "runs": self._runs})
        except (OSError, StorageFullError) as error:
            _logger.debug("%s cannot be written (%s)", self._path, error)


def kept_uri(uri: str, storage: Storage) -> str | None:
    """An address as it is kept: none for the storage folder's own file, and without its password."""
    path = sqlite_path(uri)
    is_own = path is not None and path.resolve() == (storage.root / "mlflow.db").resolve()
    return None if is_own else shown_uri(uri)


def has_answered(storage: Storage, uri: str) -> bool:
    """Whether MLflow at an address took a search of a storage before."""
    storage.pull(_searches(storage))
    return any(_searches(storage).glob(f"*/taken-{content_hash(kept_uri(uri, storage))}.json"))


def _trouble(path: Path, error: UserError | pydantic.ValidationError) -> str:
    if isinstance(error, UserError):
        return str(error).rstrip(".")
    first = error.errors()[0]
    return f"{path} is not the state of a run ({'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']})"


def _searches(storage: Storage) -> Path:
    return storage.root / "searches"
