"""Storage in an object store: every machine works in a folder of its own, and what must outlive it is copied at once.

An object store (`s3://bucket/folder`, `gs://bucket/folder`) has no locks, no renames and no appending, so nothing works
in it directly. `open_storage` gives a folder on this machine to work in. From then on this process uploads every file
that it completes under that folder, before anybody is told of it, and downloads what another machine has completed
when it is looked for here. Objects appear whole or not at all, as files do here.

Nothing is uploaded of the decoded images, of locks, and of databases and journals, which stay on the machine. A
storage that is a plain folder has no mirror, and every function here does nothing for it.

Locks hold on one machine. Machines that need the same teacher, bank or stage at once each make it, all from the same
content hash; the last to end leaves its own. That costs work and no result: whatever is made from a teacher is named by
its weights.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from refilled.errors import UserError

T = TypeVar("T")
FOLDERS = frozenset({"banks", "embeddings", "prototypes", "runs", "searches", "teachers", "timings"})
FILES = frozenset({"summary.json"})
WORK_FOLDER = "REFILLED_WORK_FOLDER"  # environment: where machines keep their copies, if not in the user's cache
RETRIES_S = (1, 2, 4, 8, 16, 32, 60)  # between tries of what failed: two minutes, in which a store comes back
_TIMEOUTS_S = {"connect_timeout": 10.0, "request_timeout": 30.0}  # of one request, for at most some MB
_CHUNK_BYTES = 2**22
_log = logging.getLogger(__name__)


class Mirror:
    """One folder of an object store and its copy on this machine.

    Attributes:
        url: of the folder in the store.
        root: the copy.
    """

    def __init__(self, url: str) -> None:
        """Connect to the store; credentials and other settings come from the store's usual environment variables.

        Raises:
            UserError: it is no URL of a store, or the store does not let this process write.
        """
        import pyarrow
        import pyarrow.fs

        if "?" in url:
            raise UserError(f"storage must have no settings in its URL, which the environment has, got {url}.")
        self.url = url.rstrip("/")
        self.root = _work_folder(self.url)
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            self._store, self._prefix = pyarrow.fs.FileSystem.from_uri(self.url)
            if isinstance(self._store, pyarrow.fs.S3FileSystem):  # which by itself would wait for ever
                endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
                self._store = pyarrow.fs.S3FileSystem(
                    region=self._store.region, endpoint_override=endpoint, **_TIMEOUTS_S
                )
            with self._store.open_output_stream(f"{self._prefix}/{probe}") as stream:
                stream.write(b"may be deleted")
            self._store.delete_file(f"{self._prefix}/{probe}")
        except (OSError, pyarrow.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"storage must be a folder, or s3:// or gs:// with a bucket and folder that can be written, got {url} "
                f"({reason})."
            ) from error

    def holds(self, path: Path) -> bool:
        """Whether a file belongs in the store."""
        parts = path.relative_to(self.root).parts
        is_passing = any(part.endswith((".partial", ".lock", ".tmp")) or part.startswith(".") for part in parts)
        return bool(parts) and not is_passing and (parts[0] in FOLDERS or (len(parts) == 1 and parts[0] in FILES))

    def push(self, path: Path) -> None:
        """Upload a file, replacing the one in the store."""

        def upload() -> None:
            with path.open("rb") as source, self._store.open_output_stream(self._place(path)) as sink:
                shutil.copyfileobj(source, sink, _CHUNK_BYTES)

        _again_and_again(upload, path)

    def copy(self, path: Path, other: Path) -> None:
        """Let the store have a file, which was just renamed here, under its new name too."""

        def copy() -> bool:
            try:
                self._store.copy_file(self._place(path), self._place(other))
            except OSError:
                if self._store.get_file_info(self._place(path)).is_file:
                    raise
                return False
            return True

        if not _again_and_again(copy, path):  # a kill came before its upload
            self.push(other)

    def pull(self, folder: Path) -> None:
        """Make a folder's files as they are in the store; files that only this machine has stay."""
        import pyarrow.fs

        selector = pyarrow.fs.FileSelector(self._place(folder), allow_not_found=True, recursive=True)
        for each in _again_and_again(lambda: self._store.get_file_info(selector), folder):
            path = self.root / Path(each.path).relative_to(self._prefix)
            if each.is_file and self.holds(path):
                self._download(path, each)

    def fetch(self, path: Path) -> bool:
        """Make one file as it is in the store; whether it is there."""
        about = self._about(path)
        return about.is_file and self._download(path, about)

    def download(self, path: Path, target: Path) -> bool:
        """Write what the store has under a path to another place on this machine; whether it has it."""

        def download() -> bool:
            try:
                source = self._store.open_input_stream(self._place(path))
            except FileNotFoundError:
                return False
            with source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, _CHUNK_BYTES)
            return True

        return _again_and_again(download, path)

    def remove(self, path: Path) -> None:
        """Delete a file in the store, if it is there."""

        def delete() -> None:
            try:
                self._store.delete_file(self._place(path))
            except FileNotFoundError:
                return

        _again_and_again(delete, path)

    def has(self, path: Path) -> bool:
        """Whether a file is in the store."""
        return bool(self._about(path).is_file)

    def _about(self, path: Path) -> Any:
        return _again_and_again(lambda: self._store.get_file_info(self._place(path)), path)

    def _download(self, path: Path, about: Any) -> bool:
        """Whether the file is there, as the store has it; its time here is the one it has there."""
        status = path.stat() if path.exists() else None
        if status is not None and (status.st_size, status.st_mtime_ns) == (about.size, about.mtime_ns):
            return True
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            if not self.download(path, temporary):  # removed since
                return False
            os.utime(temporary, ns=(about.mtime_ns, about.mtime_ns))
            os.replace(temporary, path)
            return True
        finally:
            temporary.unlink(missing_ok=True)

    def _place(self, path: Path) -> str:
        return f"{self._prefix}/{path.relative_to(self.root).as_posix()}"


_mirrors: dict[Path, Mirror] = {}  # by root; of this process


def open_storage(storage: str) -> Path:
    """The folder on this machine to work in: the one named, or a copy of the object store's.

    Raises:
        UserError: see `Mirror`.
    """
    if not is_url(storage):
        return Path(storage).absolute()
    root = _work_folder(storage.rstrip("/"))
    if root not in _mirrors:
        _mirrors[root] = Mirror(storage)
    return root


def is_url(storage: str) -> bool:
    """Whether a storage is an object store's and not a folder."""
    return "://" in storage


def location_of(root: Path) -> str:
    """What `open_storage` takes on any machine to come to the same storage."""
    mirror = _mirrors.get(root)
    return str(root) if mirror is None else mirror.url


def is_mirrored(path: Path) -> bool:
    """Whether a path lies in the copy of an object store."""
    return mirror_of(path) is not None


def mirror_of(path: Path) -> Mirror | None:
    """The mirror whose copy a path lies in."""
    return next((mirror for root, mirror in _mirrors.items() if path.is_relative_to(root)), None)


def push(path: Path) -> None:
    """Upload a file that is complete, where it belongs in a store."""
    mirror = mirror_of(path)
    if mirror is not None and mirror.holds(path):
        mirror.push(path)


def pull(folder: Path) -> None:
    """Download what the store has of a folder and this machine has not."""
    mirror = mirror_of(folder)
    if mirror is not None:
        mirror.pull(folder)


def fetch(path: Path) -> bool:
    """Whether a file is here, after a look into the store where it is not."""
    if path.exists():
        return True
    mirror = mirror_of(path)
    return mirror is not None and mirror.holds(path) and mirror.fetch(path)


def refresh(path: Path) -> None:
    """Make a file that another machine goes on writing as it is in the store now."""
    mirror = mirror_of(path)
    if mirror is not None and mirror.holds(path):
        mirror.fetch(path)


def moved(path: Path, other: Path) -> None:
    """Let the store have a file that was renamed here under the new name too; the old one is about to be written."""
    mirror = mirror_of(path)
    if mirror is not None and mirror.holds(path):
        mirror.copy(path, other)


def remove(path: Path) -> None:
    """Delete a file here and in the store, if it is there."""
    path.unlink(missing_ok=True)
    mirror = mirror_of(path)
    if mirror is not None and mirror.holds(path):
        mirror.remove(path)


def complete(folder: Path, last: str) -> None:
    """Upload a folder again unless the store has the file that is written last, as after a kill between the two."""
    mirror = mirror_of(folder)
    if mirror is None or mirror.has(folder / last):
        return
    files = sorted((each for each in folder.iterdir() if mirror.holds(each)), key=lambda each: each.name == last)
    for each in files:
        mirror.push(each)


def _work_folder(url: str) -> Path:
    """Where this machine keeps its copy; the hash is of the whole URL."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refilled"
    parent = Path(os.environ.get(WORK_FOLDER) or default).absolute()
    return parent / hashlib.sha256(url.encode()).hexdigest()[:16]


def _again_and_again(action: Callable[[], T], path: Path) -> T:
    """Do it, and again for minutes where the store fails; what fails for a reason in the files here is raised at once.

    Raises:
        OSError: of the last try.
    """
    for wait_s in RETRIES_S:
        try:
            return action()
        except OSError as error:
            if error.errno is not None:  # of this machine's own files; the store's errors have none
                raise
            _log.warning("The store of %s fails (%s); next try in %g s.", path, str(error).splitlines()[0], wait_s)
        time.sleep(wait_s)
    return action()
