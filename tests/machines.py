"""Machines that share nothing but an object store."""

from __future__ import annotations

from pathlib import Path

import pytest
from object_store import ObjectStore

from refilled.storage import Storage
from refilled.storage.object_storage import WORK_FOLDER


class Machines:
    """Work folders of machines; this process is at one at a time.

    Attributes:
        url: Of the storage that they share.
    """

    def __init__(self, folder: Path, store: ObjectStore, name: str, patch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._patch = patch
        self._environment = store.environment
        self._go_to_store()
        self.url = f"s3://{store.bucket}/{name}"

    def work_folder(self, name: str) -> Path:
        """Where a machine has its copies."""
        return self._folder / name

    def at(self, name: str) -> Storage:
        """Go to a machine; the storage as it is opened there."""
        self._go_to_store()
        self._patch.setenv(WORK_FOLDER, str(self.work_folder(name)))
        return Storage.open(self.url)

    def _go_to_store(self) -> None:
        """Others may have another store meanwhile."""
        for variable, value in self._environment.items():
            self._patch.setenv(variable, value)
