"""The storage of a search: a folder that its machines share, or an object store of which each machine has a copy."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from refilled import distributed
from refilled.errors import UserError
from refilled.storage.files import append_to_file, json_bytes, read_json, replace_file

if TYPE_CHECKING:
    from refilled.storage.artifacts import Artifacts

WAIT_S = 30.0  # how long a group waits for a lock before its workers talk to each other


@dataclass(frozen=True)
class Storage:
    """A folder. It is a value, which travels between processes and machines as its location.

    Paths that its methods take lie below `root`. What they write is whole after a kill at any moment; in an object
    store (`ObjectStorage`) it is also uploaded before they return, and what another machine has written is downloaded
    when it is asked for. In a folder `fetch`, `refresh` and `pull` find everything there already.

    Attributes:
        location: Absolute path of the folder, or URL of the object store's.
    """

    location: str

    @staticmethod
    def at(location: str | Path) -> Storage:
        """The storage at a folder or URL, which nothing is asked of yet."""
        if "://" in str(location):
            from refilled.storage.object_storage import ObjectStorage

            return ObjectStorage(str(location).rstrip("/"))
        return Storage(str(Path(location).expanduser().absolute()))

    @staticmethod
    def open(location: str | Path) -> Storage:
        """The storage at a folder or URL, made where it is missing and proven to take files.

        Raises:
            UserError: It cannot be written.
        """
        storage = Storage.at(location)
        storage.require_writable()
        return storage

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return type(self), (self.location,)

    @property
    def root(self) -> Path:
        """The folder on this machine."""
        return Path(self.location)

    @property
    def is_remote(self) -> bool:
        """Whether machines share an object store and no folder."""
        return False

    @property
    def artifacts(self) -> Artifacts:
        """Folders that are named by what made them."""
        from refilled.storage.artifacts import Artifacts

        return Artifacts(self)

    def require_writable(self) -> None:
        """Create the folder if need be and prove that files can be written to it.

        Raises:
            UserError: Naming the folder.
        """
        probe = self.root / f".probe-{uuid.uuid4().hex}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"storage must be a folder that can be written, got {self.location} ({error.strerror})."
            ) from error

    def write(self, path: Path, content: bytes) -> None:
        """Replace a file's content, as a whole.

        Raises:
            StorageFullError: There is no room; the file stays as it was.
        """
        replace_file(path, content)
        self.upload(path)

    def append(self, path: Path, content: bytes) -> None:
        """Add to the end of a file, which is made where it is missing; all or nothing, but for a kill.

        Raises:
            StorageFullError: There is no room.
        """
        append_to_file(path, content)
        self.upload(path)

    def write_json(self, path: Path, value: object) -> None:
        """Replace a file by a value's JSON."""
        self.write(path, json_bytes(value))

    def read_json(self, path: Path) -> Any:
        """The value of a JSON file.

        Raises:
            FileNotFoundError: It is not there.
            UserError: It is damaged.
        """
        self.fetch(path)
        return read_json(path)

    def rename(self, path: Path, other: Path) -> None:
        """Give a file that is there another name, in place of what has that name."""
        os.replace(path, other)

    def remove(self, path: Path) -> None:
        """Delete a file, if it is there."""
        path.unlink(missing_ok=True)

    def upload(self, path: Path) -> None:
        """Let other machines have a file that is complete here."""

    def fetch(self, path: Path) -> bool:
        """Whether a file is here, after a look at what other machines have written where it is not."""
        return path.exists()

    def refresh(self, path: Path) -> None:
        """Make a file that another machine goes on writing as it is now."""

    def pull(self, folder: Path) -> None:
        """Make the files of a folder as other machines have left them; files that only this machine has stay."""

    def complete(self, folder: Path, last: str) -> None:
        """Upload a folder again unless the file that is written last is there, as after a kill between the two."""

    def publish(self, folder: Path, names: list[str]) -> None:
        """Let other machines have files of a finished folder, in this order.

        Raises:
            OSError: They cannot.
        """

    def obtain(self, folder: Path, name: str, target: Path) -> bool:
        """Write what other machines have as a folder's file to another place here; whether they have it."""
        return False

    @contextlib.contextmanager
    def exclusive(self, path: Path, *, wait: bool = True) -> Iterator[bool]:
        """Let one process, or one group of workers, at a time work on `path`; others wait, on other machines too.

        Rank 0 holds the lock for its group. It is released when that process dies. While waiting the group talks to
        each other now and then, so that no collective runs into its time-out.

        Args:
            path: What is worked on; it need not exist.
            wait: Whether to wait while others work on it.

        Yields:
            Whether the work may be done here, always true where it waits.

        Raises:
            OSError: The lock cannot be had, on all workers alike.
        """
        timeout_s = WAIT_S if wait else 0.0
        with contextlib.ExitStack() as held:
            here = distributed.on_rank_zero(lambda: self._acquire(path, timeout_s, held))
            while wait and not here:
                here = distributed.on_rank_zero(lambda: self._acquire(path, timeout_s, held))
            yield here

    def _acquire(self, path: Path, timeout_s: float, held: contextlib.ExitStack) -> bool:
        """Take the lock of a path within a time; whether that was possible. `held` releases it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_path(path))
        try:
            lock.acquire(timeout=timeout_s)
        except Timeout:
            return False
        held.callback(lock.release)
        return True


def lock_path(path: Path) -> Path:
    """The file that whoever works on a path holds locked."""
    return path.with_name(f"{path.name}.lock")
