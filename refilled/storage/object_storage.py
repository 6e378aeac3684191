"""Storage in an object store (`s3://bucket/folder`, `gs://bucket/folder`), which has no renames and no appending.

Every machine works in a folder of its own. Files of `UPLOADED` that are completed there are uploaded before anybody is
told of them, and what another machine has completed is downloaded when it is looked for here. Objects appear whole or
not at all, as files do. Databases, locks and what every machine makes for itself stay on the machine. Locks hold
between machines by leases in the store.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refilled.errors import UserError
from refilled.storage.files import replace_file
from refilled.storage.lease import Lease
from refilled.storage.storage import Storage

UPLOADED = frozenset({"runs", "searches", "teachers"})  # folders of the storage; artifacts are published as a whole
UPLOADED_FILES = frozenset({"summary.json"})
SCHEMES = ("s3", "gs")
WORK_FOLDER = "REFILLED_WORK_FOLDER"  # environment: where machines keep their copies, if not in the user's cache
PATIENCE_S = 180.0  # in which a store comes back
PATIENCE_AT_START_S = 10.0  # with a store that was just named, perhaps wrongly
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ObjectStorage(Storage):
    """A folder of an object store, and its copy on this machine.

    Credentials and other settings come from the store's usual environment variables, or the machine's role.
    """

    @functools.cached_property
    def root(self) -> Path:
        """The copy on this machine; its name hashes the whole URL."""
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refilled"
        parent = Path(os.environ.get(WORK_FOLDER) or default).absolute()
        return parent / hashlib.sha256(self.location.encode()).hexdigest()[:16]

    @property
    def is_remote(self) -> bool:
        """Machines share no folder."""
        return True

    @functools.cached_property
    def _store(self) -> Any:
        return self._connect(PATIENCE_S)

    def _connect(self, patience_s: float) -> Any:
        """The store, whose library tries again by itself for so long."""
        from obstore.store import from_url

        return from_url(
            self.location,
            client_options={
                "timeout": datetime.timedelta(seconds=60),
                "connect_timeout": datetime.timedelta(seconds=10),
                "allow_http": True,  # an endpoint of one's own, which the environment names
            },
            retry_config={
                "max_retries": 30,
                "retry_timeout": datetime.timedelta(seconds=patience_s),
                "backoff": {
                    "init_backoff": datetime.timedelta(seconds=0.5),
                    "max_backoff": datetime.timedelta(seconds=15),
                    "base": 2,
                },
            },
        )

    def require_writable(self) -> None:
        """Prove that the store can be reached and takes objects.

        Raises:
            UserError: It is no URL of a store, or the store does not let this process write.
        """
        import obstore
        from obstore.exceptions import BaseError

        if "?" in self.location:
            raise UserError(
                f"storage must have no settings in its URL, which the environment has, got {self.location}."
            )
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            if self.location.partition("://")[0] not in SCHEMES:
                raise ValueError("no such kind of store")
            store = self._connect(PATIENCE_AT_START_S)
            obstore.put(store, probe, b"may be deleted")
            obstore.delete(store, probe)
            self.root.mkdir(parents=True, exist_ok=True)
        except (BaseError, OSError, ValueError) as error:
            raise UserError(
                f"storage must be a folder, or s3:// or gs:// with a bucket and folder that can be written, got "
                f"{self.location} ({_first_line(error)})."
            ) from error

    def rename(self, path: Path, other: Path) -> None:
        """Give a file another name, here and in the store."""
        import obstore

        super().rename(path, other)
        if not self._is_uploaded(path):
            return
        try:
            with self._naming(path):
                obstore.rename(self._store, self._place(path), self._place(other), overwrite=True)
        except FileNotFoundError:  # a kill came before its upload
            self.upload(other)

    def remove(self, path: Path) -> None:
        """Delete a file here and in the store, if it is there."""
        import obstore

        super().remove(path)
        if self._is_uploaded(path):
            with self._naming(path), contextlib.suppress(FileNotFoundError):
                obstore.delete(self._store, self._place(path))

    def upload(self, path: Path) -> None:
        """Replace a file in the store, if it belongs there."""
        if self._is_uploaded(path):
            self._put(path)

    def fetch(self, path: Path) -> bool:
        """Whether a file is here, after a look into the store where it is not."""
        return path.exists() or (self._is_uploaded(path) and self._update(path, self._about(path)))

    def refresh(self, path: Path) -> None:
        """Make a file as it is in the store now."""
        if self._is_uploaded(path):
            self._update(path, self._about(path))

    def pull(self, folder: Path) -> None:
        """Make a folder's files as they are in the store; files that only this machine has stay."""
        import obstore

        with self._naming(folder):
            found = [each for chunk in obstore.list(self._store, prefix=self._place(folder)) for each in chunk]
        for about in found:
            path = self.root / about["path"]
            if self._is_uploaded(path):
                self._update(path, about)

    def complete(self, folder: Path, last: str) -> None:
        """Upload a folder again unless the store has the file that is written last."""
        if self._about(folder / last) is None:
            files = [each for each in folder.rglob("*") if each.is_file() and self._is_uploaded(each)]
            files.sort(key=lambda path: path == folder / last)
            for each in files:
                self._put(each)

    def publish(self, folder: Path, names: list[str]) -> None:
        """Upload files of a finished folder, in this order; whoever looks for the last one finds all."""
        for name in names:
            self._put(folder / name)

    def obtain(self, folder: Path, name: str, target: Path) -> bool:
        """Download a folder's file to another place; whether the store has it."""
        return self._download(folder / name, target)

    def _acquire(self, path: Path, timeout_s: float, held: contextlib.ExitStack) -> bool:
        """Take the lock of this machine, then the lease of all."""
        with contextlib.ExitStack() as locked:
            if not super()._acquire(path, timeout_s, locked):
                return False
            lease = Lease(self._store, f"{self._place(path)}.lease", self._machine)
            with self._naming(path):
                if not lease.acquire(timeout_s):
                    return False
            held.enter_context(locked.pop_all())
            held.callback(lease.release)
        return True

    @functools.cached_property
    def _machine(self) -> str:
        """Names the copy on this machine, which outlives its processes."""
        path = self.root / "machine"
        if not path.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            # The lock of whatever is asked for may be another one than that of a process beside this one.
            with contextlib.suppress(FileExistsError):
                temporary = self.root / f".machine-{uuid.uuid4().hex}.tmp"
                replace_file(temporary, uuid.uuid4().hex.encode())
                try:
                    os.link(temporary, path)
                finally:
                    temporary.unlink()
        return path.read_text()

    def _is_uploaded(self, path: Path) -> bool:
        parts = path.relative_to(self.root).parts
        is_passing = any(part.endswith((".partial", ".lock", ".lease", ".tmp")) or part[:1] == "." for part in parts)
        if is_passing or not parts:
            return False
        return parts[0] in UPLOADED or (len(parts) == 1 and parts[0] in UPLOADED_FILES)

    def _put(self, path: Path) -> None:
        import obstore

        with self._naming(path):
            obstore.put(self._store, self._place(path), path)

    def _about(self, path: Path) -> Mapping[str, Any] | None:
        import obstore

        try:
            with self._naming(path):
                return obstore.head(self._store, self._place(path))
        except FileNotFoundError:
            return None

    def _update(self, path: Path, about: Mapping[str, Any] | None) -> bool:
        """Whether the file is there, as the store has it; its time here is the one it has there."""
        if about is None:
            return False
        time_ns = int(about["last_modified"].timestamp() * 1e9)
        status = path.stat() if path.exists() else None
        if status is not None and (status.st_size, status.st_mtime_ns) == (about["size"], time_ns):
            return True
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            if not self._download(path, temporary):  # removed since
                return False
            os.utime(temporary, ns=(time_ns, time_ns))
            os.replace(temporary, path)
            return True
        finally:
            temporary.unlink(missing_ok=True)

    def _download(self, path: Path, target: Path) -> bool:
        import obstore

        try:
            with self._naming(path):
                chunks = obstore.get(self._store, self._place(path)).stream(min_chunk_size=2**22)
                with target.open("wb") as file:
                    for chunk in chunks:
                        file.write(chunk)
        except FileNotFoundError:
            target.unlink(missing_ok=True)
            return False
        return True

    def _place(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    @contextlib.contextmanager
    def _naming(self, path: Path) -> Iterator[None]:
        """Raise the store's own errors, after all tries, as the operating system's, with their first line."""
        from obstore.exceptions import BaseError

        try:
            yield
        except BaseError as error:
            raise OSError(f"{self.location} fails for {self._place(path)}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    """The first line of the error's message; the library's go on with its own data structures."""
    return (str(error).splitlines() or [type(error).__name__])[0]
