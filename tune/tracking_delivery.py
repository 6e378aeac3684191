"""The thread that delivers to MLflow: polls the runs, retries with pauses that grow, and never fails silently."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator

from tune.tracking_runs import RunMirror
from tune.tracking_store import shown_uri, store_trouble

_POLL_S = 0.3
_LONGEST_PAUSE_S = 30.0
_PAUSE_WHILE_AWAITED_S = 0.5

_logger = logging.getLogger(__name__)


class Delivery:
    """Delivers runs until stopped.

    Calls from other threads only queue commands; the runs themselves are touched by the thread alone, so that
    nobody waits for MLflow who does not ask to.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._awaited = 0
        self._passes = 0
        self._clean_pass = 0
        self._run_ids: dict[str, str] = {}
        # What follows is touched by the thread alone.
        self._mirrors: dict[str, RunMirror] = {}
        self._live: dict[str, RunMirror] = {}
        self._failures: dict[str, tuple[int, float]] = {}
        self._failed_passes = 0
        self._warned = False
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

    def run_id(self, key: str, timeout_s: float) -> str:
        """MLflow's id of a run that was added.

        Raises:
            TimeoutError: MLflow did not take the run in time.
        """
        with self._hurried():
            self._changed.wait_for(lambda: key in self._run_ids or self._stop.is_set(), timeout_s)
            if key not in self._run_ids:
                raise TimeoutError(f"MLflow at {shown_uri(self._uri)} has not taken run {key} within {timeout_s:g} s")
            return self._run_ids[key]

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything known at the time of the call is in MLflow; whether it is."""
        with self._hurried():
            target = self._passes + 1
            self._changed.wait_for(lambda: self._clean_pass >= target or self._stop.is_set(), timeout_s)
            return self._clean_pass >= target

    def stop(self, timeout_s: float) -> None:
        """Deliver what is left within `timeout_s` and end the thread; a warning says what could not be."""
        if self._stop.is_set():
            return
        delivered = self.flush(timeout_s)
        self._stop.set()
        self._wake.set()
        self._thread.join(_PAUSE_WHILE_AWAITED_S)  # longer only if it hangs in a call, which ends with the process
        if not delivered:
            left = sorted(self._live)
            _logger.warning(
                "MLflow at %s has not taken everything of %d run(s) (%s); the files in their run folders are complete "
                "and are sent when the same command is run again",
                shown_uri(self._uri),
                len(left),
                ", ".join(left[:5]) + (", ..." if len(left) > 5 else ""),
            )

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
        clean = True
        for key, mirror in list(self._live.items()):
            if self._stop.is_set():
                return False
            failures, failed_at = self._failures.get(key, (0, 0.0))
            if failures and time.monotonic() < failed_at + self._pause(failures):
                clean = False
                continue
            try:
                called = mirror.deliver()
            except Exception as error:
                # Whatever MLflow, its database driver, HTTP client or artifact store raises: training goes on.
                self._note_failure(key, failures, error)
                # One run's refusal must not stop the others, an outage must not be tried once a run: next time the
                # next run is tried first.
                self._live[key] = self._live.pop(key)
                self._failed_passes += 1
                return False
            self._failures.pop(key, None)
            if called:
                self._failed_passes = 0
            if mirror.run_id is not None:
                self._run_ids[key] = mirror.run_id
            if mirror.settled:
                self._live.pop(key)
        if clean and self._warned:
            self._warned = False
            _logger.info("MLflow at %s holds everything again", shown_uri(self._uri))
        return clean

    def _note_failure(self, key: str, failures: int, error: Exception) -> None:
        from mlflow.exceptions import MlflowException

        self._failures[key] = (failures + 1, time.monotonic())
        if self._warned:
            return
        self._warned = True
        expected = isinstance(error, (MlflowException, OSError))
        _logger.warning(
            "%s; run %s goes on, its files keep everything, and it is sent again later",
            store_trouble(self._uri, error),
            key,
            exc_info=None if expected else error,
        )

    def _pause(self, failures: int) -> float:
        longest = _PAUSE_WHILE_AWAITED_S if self._awaited else _LONGEST_PAUSE_S
        return float(min(_POLL_S * 2 ** min(failures, 10), longest))
