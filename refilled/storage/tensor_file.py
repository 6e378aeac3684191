"""Files of tensors and plain values: checked when read, and nothing in them is executed."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from refilled.errors import UserError


def tensor_bytes(value: dict[str, Any]) -> bytes:
    """The content of a file of tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def load_tensors(path: Path) -> dict[str, Any]:
    """Read tensors and plain values to the CPU, without executing anything from the file.

    Raises:
        UserError: Naming the file, when it is missing, damaged or holds other things.
    """
    damaged = f"{path} must be a whole file of tensors and plain values, but cannot be read."
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(damaged) from error
    if not _is_whole(content):
        raise UserError(damaged)
    try:
        value = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of what was made to look whole, the unpickler may raise anything
        raise UserError(damaged) from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a dictionary, got {type(value).__name__}.")
    return value


def _is_whole(content: bytes) -> bool:
    """Whether every part of the archive is as it was written; torch itself never compares the checksums it writes.

    torch stores and does not compress, so parts that claim to be larger than the file are damage, or a bomb.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            parts = archive.infolist()
            if sum(part.file_size for part in parts) > len(content):
                return False
            return bool(parts) and archive.testzip() is None
    except Exception:  # zipfile has no one exception for damage: struct, index, unicode, EOF and value errors, ...
        return False
