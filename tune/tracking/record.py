"""What is told of a run: its settings, tags and end, as MLflow takes them and as the journal keeps them."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

_Value = TypeVar("_Value")
Status = Literal["FINISHED", "KILLED", "FAILED"]

# MLflow's limits.
NAME_LENGTH = 250
_PARAM_LENGTH = 6000
_TAG_LENGTH = 8000
_KEY = re.compile(r"[A-Za-z0-9_.:/=+@-]{1,200}")


def now_ms() -> int:
    """The time as MLflow counts it, in milliseconds since 1970."""
    return int(time.time() * 1000)


@dataclass(frozen=True)
class Closing:
    """How a run ends: its status, what is logged last, a folder of artifacts, and when that was said."""

    status: Status
    metrics: Mapping[str, float] = field(default_factory=dict)
    artifacts: Path | None = None
    ended_ms: int = field(default_factory=now_ms, compare=False)


@dataclass(frozen=True)
class RunRecord:
    """One run as it was told so far; `params` and `tags` are texts within MLflow's limits.

    Attributes:
        key: what the run is found again by; becomes its tag `run_key`.
        name: for people.
        params: settings by dotted name.
        tags: all tags told up to now.
        folder: run folder whose `metrics.jsonl` is mirrored; none for the search itself.
        started_ms: when it was first told.
        closing: how it ended; none while it is open.
    """

    key: str
    name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    folder: Path | None
    started_ms: int = field(default_factory=now_ms, compare=False)
    closing: Closing | None = None

    def __post_init__(self) -> None:
        """Refuse a key that could break out of a filter string, which knows no escapes."""
        if not _KEY.fullmatch(self.key):
            raise ValueError(f"a key is 1 to 200 letters, digits or _.:/=+@-, not {self.key!r}")

    def told_again(self, later: RunRecord) -> RunRecord:
        """This run, opened a second time: what MLflow would not rewrite stays, what is new is added."""
        return dataclasses.replace(
            later,
            name=self.name,
            params={**later.params, **self.params},
            tags={**self.tags, **later.tags},
            started_ms=self.started_ms,
        )

    def tagged(self, tags: Mapping[str, str]) -> RunRecord:
        """This run with more tags."""
        return dataclasses.replace(self, tags={**self.tags, **tags})


def flat_params(params: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Settings as MLflow takes them: dotted names, texts, cut to its limits; None is "none", lists are JSON."""
    flat: dict[str, str] = {}
    for name, value in params.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            flat |= flat_params(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = _param_text(value)
    return flat if prefix else _clean(flat, _PARAM_LENGTH)


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
    return {name: str(value)[:length] for name, value in clean_names(texts).items()}
