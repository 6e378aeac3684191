"""REFILLED: generalised knowledge distillation via relationship matching.

`refilled.search(...)` does what the command `refilled search` does and returns the results as objects;
`refilled.load(FOLDER)` gives a trained student that can be asked. Everything else is in the modules.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Looked up when used: importing the package loads neither torch nor the platform, which the method does not know.
_FACE = {"load": "refilled.loading", "search": "tune.search"}


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FACE[name]), name)
