"""The thread that delivers to MLflow: polls the runs, retries with pauses that grow, and never fails silently."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator

from refilled.errors import UserError
from tune.tracking.runs import RunMirror
from tune.tracking.store import UnusableStoreError, shown_uri, store_trouble

_POLL_S = 0.3
_LONGEST_PAUSE_S = 30.0
_PAUSE_WHILE_AWAITED_S = 0.5

_logger = logging.getLogger(__name__)


class Delivery:
    """Delivers runs until stopped.

    Calls from other threads only queue commands; the runs themselves are touched by the thread alone, so that
    nobody waits for MLflow who does not ask to.

    Args:
        uri: Of the store, for what is said.
        is_trouble_known: It was said already that the store cannot be used; it is said again only after it could.
    """

    def __init__(self, uri: str, *, is_trouble_known: bool = False) -> None:
        self._uri = uri
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._awaited = 0
        self._passes = 0
        self._clean_pass = 0
        self._run_ids: dict[str, str] = {}
        self._errors: dict[str, Exception] = {}
        # What follows is touched by the thread alone.
        self._mirrors: dict[str, RunMirror] = {}
        self._live: dict[str, RunMirror] = {}
        self._failures: dict[str, tuple[int, float]] = {}
        self._failed_passes = 0
        self._warned = is_trouble_known
        self._thread = threading.Thread(target=self._serve, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def add(self, key: str, mirror: RunMirror) -> None:
        """Deliver this run from now on; it takes the place of one with the same key."""

        def apply() -> None:
            self._mirrors[key] = self._live[key] = mirror

        self._commands.put(apply)

    def change(self, key: str, change: Callable[[RunMirror], None]) -> None:
        """Change a run that was added, and deliver it again."""

        def apply() -> None:
            change(self._mirrors[key])
            self._live[key] = self._mirrors[key]

        self._commands.put(apply)

    def run_ids(self, keys: Collection[str], timeout_s: float) -> dict[str, str]:
        """MLflow's ids of runs that were added; those it has not taken within the time are left out."""
        with self._hurried():
            self._changed.wait_for(lambda: self._run_ids.keys() >= set(keys) or self._stop.is_set(), timeout_s)
            return {key: self._run_ids[key] for key in keys if key in self._run_ids}

    def first_outcome(self, key: str, timeout_s: float) -> Exception | None:
        """Wait until MLflow took a run, and return nothing, or refused it once, and return why."""
        with self._hurried():
            self._changed.wait_for(
                lambda: key in self._run_ids or key in self._errors or self._stop.is_set(), timeout_s
            )
            if key in self._run_ids:
                return None
            return self._errors.get(key, TimeoutError(f"no answer within {timeout_s:g} s"))

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything known at the time of the call is in MLflow; whether it is."""
        with self._hurried():
            target = self._passes + 1
            self._changed.wait_for(lambda: self._clean_pass >= target or self._stop.is_set(), timeout_s)
            return self._clean_pass >= target

    @property
    def undelivered(self) -> list[str]:
        """The keys of runs of which MLflow lacks something, or may; to be asked when the thread has ended."""
        return sorted(self._live)

    def stop(self, timeout_s: float) -> bool:
        """Deliver what is left within `timeout_s` and end the thread; whether everything is in MLflow."""
        delivered = self.flush(timeout_s)
        self._stop.set()
        self._wake.set()
        self._thread.join(_PAUSE_WHILE_AWAITED_S)  # longer only if it hangs in a call, which ends with the process
        return delivered

    def abandon(self) -> None:
        """End the thread without delivering anything more."""
        self._stop.set()
        self._wake.set()

    @contextlib.contextmanager
    def _hurried(self) -> Iterator[None]:
        """Hold the condition; the thread starts a pass now and retries often while someone waits."""
        with self._changed:
            self._awaited += 1
            self._wake.set()
            try:
                yield
            finally:
                self._awaited -= 1

    def _serve(self) -> None:
        try:
            while not self._stop.is_set():
                with self._changed:
                    self._passes += 1
                    number = self._passes
                while not self._commands.empty():
                    self._commands.get()()
                clean = self._deliver_all()
                with self._changed:
                    if clean:
                        self._clean_pass = number
                    self._changed.notify_all()
                self._wake.wait(self._pause(self._failed_passes))
                self._wake.clear()
        finally:
            # Only a defect ends the loop early; its traceback is printed by the thread, and nobody waits for it.
            self._stop.set()
            with self._changed:
                self._changed.notify_all()

    def _deliver_all(self) -> bool:
        """One pass over the runs; whether all was delivered."""
        clean, called = True, False
        for key, mirror in list(self._live.items()):
            if self._stop.is_set():
                return False
            failures, failed_at = self._failures.get(key, (0, 0.0))
            if failures and time.monotonic() < failed_at + self._pause(failures):
                clean = False
                continue
            try:
                called_now = mirror.deliver()
            except Exception as error:
                # Whatever MLflow, its database driver, HTTP client or artifact store raises: training goes on.
                self._note_failure(key, failures, error)
                # One run's refusal must not stop the others, an outage must not be tried once a run: next time the
                # next run is tried first.
                self._live[key] = self._live.pop(key)
                self._failed_passes += 1
                return False
            self._failures.pop(key, None)
            if called_now:
                called, self._failed_passes = True, 0
            if mirror.run_id != self._run_ids.get(key):
                self._note_id(key, mirror)
            if mirror.settled:
                self._live.pop(key)
        if clean and called and self._warned:
            self._warned = False
            _logger.info("MLflow at %s holds everything again", shown_uri(self._uri))
        return clean

    def _note_id(self, key: str, mirror: RunMirror) -> None:
        with self._changed:
            self._run_ids[key] = mirror.existing_id()
            self._changed.notify_all()

    def _note_failure(self, key: str, failures: int, error: Exception) -> None:
        self._failures[key] = (failures + 1, time.monotonic())
        with self._changed:
            self._errors[key] = error
            self._changed.notify_all()
        if self._warned:
            return
        from mlflow.exceptions import MlflowException

        self._warned = True
        expected = isinstance(error, (MlflowException, OSError, UserError))
        trouble = error.trouble if isinstance(error, UnusableStoreError) else store_trouble(self._uri, error)
        _logger.warning(
            "%s; run %s goes on, its files keep everything, and it is sent again later",
            trouble,
            key,
            exc_info=None if expected else error,
        )

    def _pause(self, failures: int) -> float:
        longest = _PAUSE_WHILE_AWAITED_S if self._awaited else _LONGEST_PAUSE_S
        return float(min(_POLL_S * 2 ** min(failures, 10), longest))
