"""Which checks of a contract fail, for tests that run it against what is broken on purpose."""

from __future__ import annotations

import inspect
import unittest
from pathlib import Path
from typing import Any


def checks_of(contract: type) -> set[str]:
    """Names of a contract's checks, `test_` left out."""
    return {name.removeprefix("test_") for name in dir(contract) if name.startswith("test_")}


def failures(contract: type, folder: Path, **attributes: Any) -> dict[str, str]:
    """Messages of the checks that fail, by name, of a class that inherits a contract.

    Args:
        contract: The class.
        folder: Where each check gets a `tmp_path` of its own.
        attributes: Of a class made from it.
    """
    made = type(f"Test{contract.__name__}", (contract,), {"__module__": contract.__module__, **attributes})
    found = {}
    for name in sorted(checks_of(contract)):
        check = getattr(made(), f"test_{name}")
        arguments = []
        if "tmp_path" in inspect.signature(check).parameters:
            arguments = [folder / name]
            arguments[0].mkdir()
        try:
            check(*arguments)
        except (AssertionError, ValueError, RuntimeError) as error:  # torch refuses some of it itself
            found[name] = str(error)
        except unittest.SkipTest:
            pass
    return found
