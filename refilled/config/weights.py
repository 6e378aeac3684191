"""How a run names weights: a file until a command has read them, their content after that."""

from __future__ import annotations

import re

_REFERENCE = re.compile(r"(?P<name>.+)@(?P<digest>[0-9a-f]{64})", re.DOTALL)


def weights_reference(name: str, digest: str) -> str:
    """What a run holds of weights that the storage has: the file's name, for people, and the digest of its content."""
    return f"{name}@{digest}"


def is_reference(text: str) -> bool:
    """Whether weights are named by their content."""
    return _REFERENCE.fullmatch(text) is not None


def digest_in(text: str) -> str:
    """The digest, without the file's name; of a file that nobody has read yet the text itself."""
    match = _REFERENCE.fullmatch(text)
    return match["digest"] if match else text


def name_in(text: str) -> str:
    """The file's name."""
    match = _REFERENCE.fullmatch(text)
    return match["name"] if match else text
