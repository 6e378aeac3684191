"""A lock in an object store: an object that is made only where there is none, and renewed while it is held.

The holder rewrites it every few seconds. A lease that does not change for several times as long belongs to nobody any
more, and whoever sees that first takes it over: by a write that the store takes only while the object is what was seen.
Clocks of different machines are never compared. A holder that the store does not hear of for long may so lose its lease
and not know it in time; then two machines make the same thing, of the same content.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from typing import Any

RENEW_S = 5.0
LOST_S = 20.0  # without a change

_log = logging.getLogger(__name__)


class Lease:
    """One lease, held by one machine at a time; who may act for the machine is for its own locks to say.

    Args:
        store: The object store, from obstore.
        path: Where the object is in it.
        machine: Names this machine.
    """

    def __init__(self, store: Any, path: str, machine: str) -> None:
        self._store, self._path, self._machine = store, path, machine
        self._counter = itertools.count()
        self._version: dict[str, str] = {}  # of the object as this lease wrote it last
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease {path}", daemon=True)

    def acquire(self, timeout_s: float) -> bool:
        """Take the lease within a time; whether that was possible. A dead holder's is free after `LOST_S`."""
        deadline_s = time.monotonic() + timeout_s
        seen: str | None = None
        seen_since_s = looked_s = time.monotonic()
        while not self._put("create"):
            holder, version = self._look()
            now_s = time.monotonic()
            # While the store answers nobody, its holder cannot renew it either.
            if version.get("e_tag") != seen or now_s - looked_s > RENEW_S:
                seen, seen_since_s = version.get("e_tag"), now_s
            looked_s = now_s
            is_free = holder == self._machine or now_s - seen_since_s >= LOST_S
            if version and is_free and self._put(version):
                break
            if version and time.monotonic() >= deadline_s:
                return False
            time.sleep(max(0.0, min(RENEW_S / 5, deadline_s - time.monotonic())))
        self._thread.start()
        return True

    def release(self) -> None:
        """Give the lease up, unless another machine has it by now."""
        import obstore
        from obstore.exceptions import BaseError

        self._released.set()
        self._thread.join()
        try:
            if self._version and self._keep():  # which asks once more whose it is
                obstore.delete(self._store, self._path)
        except (BaseError, OSError) as error:  # the work is done, and what nobody renews is free soon
            _log.warning("The lease %s cannot be given up (%s).", self._path, str(error).splitlines()[0])

    def _put(self, mode: Any) -> bool:
        """Write the object if it is not there ("create"), or is still what its version says; whether that was so."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        content = json.dumps({"machine": self._machine, "number": next(self._counter), "time": time.time()})
        try:
            self._version = _version(obstore.put(self._store, self._path, content.encode(), mode=mode))
        except (AlreadyExistsError, PreconditionError, FileNotFoundError):
            return False
        return True

    def _look(self) -> tuple[str, dict[str, str]]:
        """Who holds the lease, and what tells its state from any other; nothing where nobody holds it."""
        import obstore

        try:
            found = obstore.get(self._store, self._path)
            return str(json.loads(bytes(found.bytes()))["machine"]), _version(found.meta)
        except FileNotFoundError:
            return "", {}

    def _keep(self) -> bool:
        """Renew the lease; false, after a warning, where another machine has it, or had it and is done."""
        if self._put(self._version):
            return True
        holder, version = self._look()
        if holder == self._machine and self._put(version):  # the store took a write, and its answer was lost
            return True
        _log.warning("The lease %s was lost to another machine, which may do the same work.", self._path)
        self._version = {}
        return False

    def _renew(self) -> None:
        from obstore.exceptions import BaseError

        while not self._released.wait(RENEW_S):
            try:
                if not self._keep():
                    return
            except (BaseError, OSError) as error:  # the store is away; the lease may be lost meanwhile
                _log.warning("The lease %s cannot be renewed (%s).", self._path, str(error).splitlines()[0])


def _version(about: Any) -> dict[str, str]:
    """What names one state of an object: its tag, and where the store has one its version."""
    return {name: about[name] for name in ("e_tag", "version") if about.get(name) is not None}
