"""What a run asks of its surroundings, and the folder that answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from refilled import distributed
from refilled.storage.run_folder import Row, RunFolder


class Carrier(Protocol):
    """What a run asks of its surroundings."""

    def load(self) -> dict[str, Any] | None:
        """The state last saved, if any."""

    def save(self, state: dict[str, Any]) -> None:
        """Keep the state of an epoch border; called before that epoch's row is reported."""

    def report(self, row: Row) -> None:
        """Take an epoch's row; may end the run by raising."""

    def repeat(self, rows: list[Row]) -> None:
        """Take the rows of the state that was loaded again, all of its run so far."""

    def finish(self, row: Row, model: dict[str, Any]) -> None:
        """Keep the finished student."""


class FolderCarrier:
    """Carries a run in its folder; with `on_report` it also passes every row on, to Ray Tune or Ray Train.

    Every worker reads the folder, which they share; only rank 0 writes.
    """

    def __init__(self, folder: RunFolder, on_report: Callable[[Row], None] | None = None) -> None:
        self._folder = folder
        self._on_report = on_report

    def load(self) -> dict[str, Any] | None:
        """The folder's last whole checkpoint, as rank 0 reads it: another worker might see an older or a newer one."""
        return distributed.from_rank_zero(self._folder.load_checkpoint() if distributed.rank() == 0 else None)

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint."""
        if distributed.rank() == 0:
            self._folder.save_checkpoint(state)

    def report(self, row: Row) -> None:
        """Append to the folder's rows, then pass on."""
        if distributed.rank() == 0:
            self._folder.append_row(row)
        if self._on_report is not None:
            self._on_report(row)

    def repeat(self, rows: list[Row]) -> None:
        """Pass on every row, in order, and keep those that the folder has lost.

        Whoever decides by rows may have died with the process that reported them, and must see each before the next.
        """
        for row in rows:
            self.report(row)

    def finish(self, row: Row, model: dict[str, Any]) -> None:
        """Close the folder."""
        if distributed.rank() == 0:
            self._folder.finish(row, model)
        distributed.agree(True)  # nobody goes on before the folder is whole
