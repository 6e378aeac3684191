"""REFILLED: generalised knowledge distillation via relationship matching."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_FACE = {"load": "refilled.loading"}  # looked up when used: importing the package must not load torch


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FACE[name]), name)
