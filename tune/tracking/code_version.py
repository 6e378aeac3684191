"""Which code a run was made by."""

from __future__ import annotations

import subprocess
from pathlib import Path

import refilled


def code_version() -> str:
    """The package's version, with the commit where the code runs from a checkout."""
    root = Path(refilled.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return refilled.__version__
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return refilled.__version__
    return f"{refilled.__version__}+{described}"
