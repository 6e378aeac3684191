"""Names and texts as MLflow takes them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TypeVar

from refilled.secrets import without_passwords

_Value = TypeVar("_Value")

# MLflow's limits.
NAME_LENGTH = 250
_PARAM_LENGTH = 6000
_TAG_LENGTH = 8000


def clean_params(params: Mapping[str, object]) -> dict[str, str]:
    """Settings as MLflow takes them: texts; None is "none", lists are JSON."""
    return _clean({name: _param_text(value) for name, value in params.items()}, _PARAM_LENGTH)


def clean_tags(tags: Mapping[str, object]) -> dict[str, str]:
    """Tags as MLflow takes them."""
    return _clean(tags, _TAG_LENGTH)


def clean_names(values: Mapping[str, _Value]) -> dict[str, _Value]:
    """Names with the characters MLflow allows, so that one odd name cannot hold back a whole batch."""
    return {re.sub(r"[^\w.\- :/]", "_", str(name))[:NAME_LENGTH] or "_": value for name, value in values.items()}


def _param_text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return json.dumps(value, default=str, ensure_ascii=False)
    return str(value)


def _clean(texts: Mapping[str, object], length: int) -> dict[str, str]:
    return {name: without_passwords(str(value))[:length] for name, value in clean_names(texts).items()}
