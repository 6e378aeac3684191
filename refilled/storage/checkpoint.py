"""The state of a run at epoch borders: the newest and the one before, in case the newest is damaged."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from refilled.errors import UserError
from refilled.storage import mirror
from refilled.storage.tensor_file import load_tensors, save_tensors

# `rows`: of all epochs so far; `student`, `terms` (of the present stage) and `optimizer`: their state_dicts. The
# teacher is found by the run's configuration, and schedules and draws are functions of the epoch.
STATE = frozenset({"rows", "student", "terms", "optimizer"})

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run folder. A kill at any moment leaves at least one whole one, once there was one."""

    def __init__(self, folder: Path) -> None:
        self.newest = folder / "checkpoint.pt"
        self.previous = folder / "checkpoint.previous.pt"

    def save(self, state: dict[str, Any]) -> None:
        """Keep a state, and the one before.

        Raises:
            StorageFullError: there is no room; what was there stays.
        """
        assert state.keys() == STATE
        if self.newest.exists():
            os.replace(self.newest, self.previous)
            mirror.moved(self.newest, self.previous)
        save_tensors(self.newest, state)

    def load(self) -> dict[str, Any] | None:
        """The newest state that can be read, none where there is none; a warning names what is damaged."""
        for path, instead in ((self.newest, "the one before is used"), (self.previous, "the run begins anew")):
            if not path.exists():
                continue
            try:
                state = load_tensors(path)
                if state.keys() != STATE or not state["rows"]:
                    raise UserError(f"{path} must hold a run's state, but does not.")
            except UserError as error:
                _log.warning("%s Instead %s.", error, instead if self.previous.exists() else "the run begins anew")
                continue
            return state
        return None

    def remove(self) -> None:
        """Drop all, when nobody needs them any more."""
        mirror.remove(self.newest)
        mirror.remove(self.previous)
