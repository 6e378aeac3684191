"""Signals that ask a command to end: it unwinds, says in one sentence what is done and how to go on, and exits so."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from refilled.secrets import without_passwords

# Ctrl-C; the end of a container or a time limit; a closed terminal; Slurm's `--signal=USR1`.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

# One Ctrl-C arrives more than once: from the terminal, from a parent that passes it on, from Ray's calls.
_SAME_S = 0.7

_come: list[tuple[int, float]] = []  # the signal that interrupted the command, and when
_last: list[Callable[[], None]] = []


class Interrupted(KeyboardInterrupt):
    """One of the signals came; its notes (`add_note`) say what was done until then.

    It is a `KeyboardInterrupt`, which every library lets pass that lets a user's Ctrl-C pass.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return signal.Signals(self.number).name


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` in the block when a signal comes; a second one ends the process.

    A closed terminal is no reason for a command that `nohup` started. Outside the main thread, where no signal
    arrives, the block runs as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _come.clear()
    _last.clear()

    def handle(number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if not _come:
            _come.append((number, now_s))
            raise Interrupted(number)
        if now_s > _come[0][1] + _SAME_S:
            end(number)

    caught = [each for each in _SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
    before = {each: signal.signal(each, handle) for each in caught}
    try:
        yield
    except KeyboardInterrupt as error:
        if isinstance(error, Interrupted) or not _come:
            raise
        named = Interrupted(_come[0][0])  # Ray's calls raise an interruption of their own in its place
        for note in getattr(error, "__notes__", []):
            named.add_note(note)
        raise named from error
    finally:
        _restore(before)


@contextlib.contextmanager
def own_handlers() -> Iterator[None]:
    """Take back the signals that what runs in the block leaves caught: a later interruption would pass unnoticed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.getsignal(each) for each in _SIGNALS}
    try:
        yield
    finally:
        # Where nobody catches SIGTERM, Ray's handler stays, which ends its processes.
        _restore({each: handler for each, handler in before.items() if callable(handler) or each != signal.SIGTERM})


@contextlib.contextmanager
def during(text: str) -> Iterator[None]:
    """Give an interruption in the block a note of what it came into."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(text)
        raise


def has_come() -> bool:
    """Whether the command that runs is interrupted, and ends now."""
    return bool(_come)


def at_end(action: Callable[[], None]) -> None:
    """Have something done by `end`, right before the process is gone."""
    _last.append(action)


def end(number: int) -> NoReturn:
    """End the process: threads that wait for Ray would hold up an exit of Python's until their jobs are done."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # closed, broken, or being written by what was cut off
        sys.stdout.flush()
        sys.stderr.flush()
    for action in _last:
        action()
    os._exit(exit_code_of(number))


def exit_code_of(number: int) -> int:
    """The exit code that shells give a process that a signal ended."""
    return 128 + number


def sentence(interrupted: KeyboardInterrupt, arguments: list[str]) -> str:
    """What a command says that was interrupted: by what, how far it was, how to go on."""
    by = str(interrupted) or signal.SIGINT.name
    done = "; ".join([by, *getattr(interrupted, "__notes__", ["what was done before is kept"])])
    return f"interrupted by {done}. The same command goes on from here: {_command(arguments)}"


def _command(arguments: list[str]) -> str:
    program = Path(sys.argv[0])
    if program.suffix == ".py":
        is_module = program.name == "__main__.py"
        start = ["python", "-m", program.parent.name] if is_module else ["python", os.path.relpath(program)]
    else:
        start = [program.name]
    return shlex.join([*start, *map(without_passwords, arguments)])


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
