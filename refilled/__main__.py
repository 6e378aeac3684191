"""The command `refilled`: search, train, report and sync under one name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from refilled import __version__

_COMMANDS = {  # by name, since the method knows neither the platform nor the reports, and loading them takes seconds
    "search": ("tune.search", "search the best settings of every method in every cell, refit, test"),
    "train": ("tune.train", "train one configuration on 1..N workers"),
    "report": ("analysis.report", "tables and figures of a search, from what MLflow holds"),
    "sync": ("tune.sync", "give MLflow what it has not got yet"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given.pop(0) if given else "--help"
    if name in ("--help", "-h"):
        lines = [f"  refilled {each:8}{about}" for each, (_, about) in _COMMANDS.items()]
        print("\n".join(["Usage: refilled COMMAND [ARGUMENTS]", "", *lines, "", "refilled COMMAND --help says more."]))
        return 0
    if name == "--version":
        print(f"refilled {__version__}")
        return 0
    if name not in _COMMANDS:
        print(f"refilled: the command must be {', '.join(_COMMANDS)}, got {name!r}.", file=sys.stderr)
        return 2
    code: int = importlib.import_module(_COMMANDS[name][0]).command(given)
    return code


if __name__ == "__main__":
    sys.exit(main())
