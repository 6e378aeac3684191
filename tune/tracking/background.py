"""The thread that brings MLflow up to a running search: polls, retries with pauses that grow, never fails silently."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Collection, Iterator

from refilled.errors import UserError
from tune.tracking.outbox import RunState
from tune.tracking.store import shown_uri, store_trouble
from tune.tracking.sync import Sync

_POLL_S = 0.3
_LONGEST_PAUSE_S = 30.0
_PAUSE_WHILE_AWAITED_S = 0.5
_NOTE_S = 5.0  # between notes of what MLflow has

_logger = logging.getLogger(__name__)


class BackgroundSync:
    """Runs a search's `Sync` until stopped.

    Calls from other threads leave states behind and return; nobody waits for MLflow who does not ask to.

    Args:
        sync: Of the search; from now on touched by the thread alone.
        is_trouble_known: It was said already that the store cannot be used; it is said again only after it could.
    """

    def __init__(self, sync: Sync, *, is_trouble_known: bool) -> None:
        self._sync = sync
        self._wake = threading.Event()
        self._stop = threading.Event()
        # What follows is read and written under the condition.
        self._changed = threading.Condition()
        self._states: list[RunState] = []
        self._run_ids: dict[str, str] = {}
        self._awaited = 0
        self._passes = 0
        self._clean_pass = 0
        # What follows is touched by the thread alone.
        self._failed_passes = 0
        self._noted_s = time.monotonic()
        self._warned = is_trouble_known
        self._thread = threading.Thread(target=self._serve, name="mlflow-sync", daemon=True)
        self._thread.start()

    def put(self, state: RunState) -> None:
        """MLflow is to have this state of a run."""
        with self._changed:
            self._states.append(state)

    def run_ids(self, keys: Collection[str], timeout_s: float) -> dict[str, str]:
        """MLflow's ids of runs; those that it has not taken within the time are left out."""
        with self._hurried():
            self._changed.wait_for(lambda: self._run_ids.keys() >= set(keys) or self._stop.is_set(), timeout_s)
            return {key: self._run_ids[key] for key in keys if key in self._run_ids}

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything known at the time of the call is in MLflow; whether it is."""
        with self._hurried():
            target = self._passes + 1
            self._changed.wait_for(lambda: self._clean_pass >= target or self._stop.is_set(), timeout_s)
            return self._clean_pass >= target

    def stop(self, timeout_s: float) -> list[str]:
        """Bring what is left within `timeout_s` and end the thread.

        Returns:
            The keys of runs of which MLflow lacks something, or may.
        """
        is_whole = self.flush(timeout_s)
        self._stop.set()
        self._wake.set()
        self._thread.join(_PAUSE_WHILE_AWAITED_S)  # longer only if it hangs in a call, which ends with the process
        return [] if is_whole else sorted({*self._sync.pending, *(state.key for state in self._states)})

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
                    states, self._states = self._states, []
                for state in states:
                    self._sync.put(state)
                is_clean = self._bring_all()
                with self._changed:
                    if is_clean:
                        self._clean_pass = number
                    self._changed.notify_all()
                self._wake.wait(self._pause_s())
                self._wake.clear()
        finally:
            # Only a defect ends the loop early; its traceback is printed by the thread, and nobody waits for it.
            self._stop.set()
            with self._changed:
                self._changed.notify_all()
        self._sync.note_taken()

    def _bring_all(self) -> bool:
        """One pass over the runs up to the first that fails; whether MLflow has all that they had."""
        called = False
        for key, run in list(self._sync.pending.items()):
            if self._stop.is_set():
                return False
            try:
                called |= self._sync.bring(key)
            except Exception as error:
                # Whatever MLflow, its database driver, HTTP client or artifact store raises: training goes on. One
                # run's refusal must not stop the others, an outage must not be tried once a run: next time the next
                # run is tried first.
                self._sync.pending[key] = self._sync.pending.pop(key)
                self._failed_passes += 1
                self._warn(key, error)
                return False
            self._note_id(key, run.existing_id())
        self._failed_passes = 0
        if called and time.monotonic() > self._noted_s + _NOTE_S:
            self._sync.note_taken()
            self._noted_s = time.monotonic()
        if called and self._warned:
            self._warned = False
            _logger.info("MLflow at %s holds everything again", shown_uri(self._sync.uri))
        return True

    def _note_id(self, key: str, run_id: str) -> None:
        if self._run_ids.get(key) != run_id:
            with self._changed:
                self._run_ids[key] = run_id
                self._changed.notify_all()

    def _warn(self, key: str, error: Exception) -> None:
        if self._warned:
            return
        from mlflow.exceptions import MlflowException

        self._warned = True
        expected = isinstance(error, (MlflowException, OSError, UserError))
        trouble = store_trouble(self._sync.uri, error)
        _logger.warning(
            "%s; run %s goes on, its files keep everything, and it is sent again later",
            trouble,
            key,
            exc_info=None if expected else error,
        )

    def _pause_s(self) -> float:
        longest_s = _PAUSE_WHILE_AWAITED_S if self._awaited else _LONGEST_PAUSE_S
        return float(min(_POLL_S * 2 ** min(self._failed_passes, 10), longest_s))
