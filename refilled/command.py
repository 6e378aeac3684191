"""What every command line here does alike: user errors and interruptions are one sentence on stderr."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence

import cyclopts

from refilled.errors import UserError, storage_full
from refilled.interruption import Interrupted, end, exit_code_of, interruptible, sentence

USER_ERROR_EXIT_CODE = 2


def new_app(name: str, help_text: str) -> cyclopts.App:
    """An empty command that leaves printing errors and exiting to `run_app`."""
    return cyclopts.App(
        name=name,
        help=help_text,
        version_flags=[],
        print_error=False,
        exit_on_error=False,
        suppress_keyboard_interrupt=False,
        result_action="return_value",
    )


def run_app(app: cyclopts.App, arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: its own, 0 where it returns none, or 2 after a user error."""

    def action() -> int:
        code = app(list(sys.argv[1:] if arguments is None else arguments))
        return code if isinstance(code, int) else 0

    return exit_code(app.name[0], action)


def exit_code(name: str, action: Callable[[], int]) -> int:
    """What the action returns, or 2 after a user error, whose sentence goes to stderr behind the command's name.

    After an interruption it is 128 and the signal's number, with a sentence, too. Anything else is a defect of the
    program and keeps its traceback.
    """
    try:
        with interruptible():
            return action()
    except KeyboardInterrupt as error:
        print(f"{name}: {sentence(error, sys.argv[1:])}", file=sys.stderr)
        if isinstance(error, Interrupted):
            end(error.number)
        return exit_code_of(signal.SIGINT)
    except (UserError, cyclopts.CycloptsError) as error:
        told: Exception = error
    except Exception as error:
        full = storage_full(error)  # wherever it was met, in whichever library
        if full is None:
            raise
        told = full
    print(f"{name}: {' '.join(str(told).split())}", file=sys.stderr)
    return USER_ERROR_EXIT_CODE
