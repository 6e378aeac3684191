"""A signal that Tune would catch without asking."""

from __future__ import annotations

import signal
import threading
from typing import Any

from ray.tune import Callback


class KeepsSignal(Callback):  # type: ignore[misc]  # Ray has no types
    """Takes a signal back when Tune's run begins, which would end at it as if all trials had come to their end.

    Args:
        number: The signal; its handler is the one at the time of this call.
    """

    def __init__(self, number: signal.Signals) -> None:
        self._number = number
        self._handler = signal.getsignal(number)

    def setup(self, **info: Any) -> None:
        """Tune has set its own handlers."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(self._number, self._handler)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks into a file that nobody reads, and handlers hold locks."""
        return {}
