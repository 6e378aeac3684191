"""One run's way into MLflow: found or created, rows mirrored from its file, closed; every step can be repeated."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from tune.tracking_rows import METRICS_FILE, RowTail, numbers

if TYPE_CHECKING:
    from mlflow import MlflowClient

_Value = TypeVar("_Value")
Status = Literal["FINISHED", "KILLED", "FAILED"]

# MLflow's limits.
_NAME_LENGTH = 250
_PARAM_LENGTH = 6000
_TAG_LENGTH = 8000
_KEY = re.compile(r"[A-Za-z0-9_.:/=+@-]{1,200}")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunIdentity:
    """What a run is found by, and what it is created with.

    Its tag `run_key` names it; below `parent_id` (a run id) where it is a child.
    """

    experiment_id: str
    key: str
    name: str
    parent_id: str | None = None

    def __post_init__(self) -> None:
        """Refuse a key that could break out of a filter string, which knows no escapes."""
        if not _KEY.fullmatch(self.key):
            raise ValueError(f"a key is 1 to 200 letters, digits or _.:/=+@-, not {self.key!r}")

    @property
    def filter(self) -> str:
        """The MLflow filter that finds the run again."""
        found = f"tags.run_key = '{self.key}'"
        return found + (f" AND tags.`mlflow.parentRunId` = '{self.parent_id}'" if self.parent_id else "")

    @property
    def tags(self) -> dict[str, str]:
        """The tags the filter looks for, written when the run is created."""
        return {"run_key": self.key} | ({"mlflow.parentRunId": self.parent_id} if self.parent_id else {})


@dataclass(frozen=True)
class Closing:
    """How a run ends: its status, what is logged last, and a folder of artifacts."""

    status: Status
    metrics: Mapping[str, float] = field(default_factory=dict)
    artifacts: Path | None = None


class RunMirror:
    """Brings MLflow up to the state of one run; used by one thread at a time.

    `deliver` may raise whatever MLflow raises, at any point. The next call then looks at what MLflow holds and
    sends what is missing, so that a batch whose answer was lost is not logged twice.
    """

    def __init__(
        self,
        client: MlflowClient,
        identity: RunIdentity,
        *,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        folder: Path | None,
    ) -> None:
        self.identity = identity
        self.run_id: str | None = None
        self._client = client
        self._params = flat_params(params)
        self._tags = _clean(tags, _TAG_LENGTH) | identity.tags
        self._tail = None if folder is None else RowTail(folder / METRICS_FILE)
        self._closing: Closing | None = None
        self._forget()

    @property
    def settled(self) -> bool:
        """Closed in MLflow, and no tag is waiting."""
        return self._closed and not self._unsent_tags

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags with the next delivery; works on a closed run too."""
        cleaned = _clean(tags, _TAG_LENGTH)
        self._tags |= cleaned
        self._unsent_tags |= cleaned

    def close(self, closing: Closing, tags: Mapping[str, str]) -> None:
        """Close the run, with its last tags, once all its rows are delivered."""
        if self._closed:
            self._forget()
        self._closing = closing
        self.tag(tags)

    def deliver(self) -> bool:
        """Send what MLflow does not hold yet; whether MLflow was called at all.

        Raises:
            MlflowException, OSError: MLflow or its artifact store refused or did not answer.
        """
        try:
            return self._deliver()
        except BaseException:
            # The call may have been carried out all the same.
            self._attached = False
            raise

    def _deliver(self) -> bool:
        called = not self._attached
        if not self._attached:
            self._attach()
        if self._tail is not None and not self._closed:
            for epoch, row in self._tail.new_rows(final=self._closing is not None):
                self._queue(row, epoch)
        called |= self._send()
        if self._closing is not None:
            self._close(self._closing)
            called = True
        return called

    def _forget(self) -> None:
        self._attached = False
        self._closed = False
        self._changed = False
        self._status = "RUNNING"
        self._logged: dict[tuple[str, int], float] = {}
        self._unsent_metrics: dict[tuple[str, int], tuple[float, int]] = {}
        self._unsent_params: dict[str, str] = {}
        self._unsent_tags: dict[str, str] = {}

    def _attach(self) -> None:
        found = self._client.search_runs([self.identity.experiment_id], self.identity.filter, max_results=1)
        if found:
            run = found[0]
        else:
            run = self._client.create_run(
                self.identity.experiment_id,
                tags=self._tags | self.identity.tags,
                run_name=self.identity.name[:_NAME_LENGTH] or self.identity.key,
            )
        self.run_id = run.info.run_id
        self._status = run.info.status
        # Changed params of a found run stay as they are: MLflow refuses to rewrite them.
        self._unsent_params = {name: value for name, value in self._params.items() if name not in run.data.params}
        self._unsent_tags = {name: value for name, value in self._tags.items() if run.data.tags.get(name) != value}
        # Only tags are sent to a closed run.
        names = () if self._closed else run.data.metrics
        self._logged = {
            (metric.key, metric.step): metric.value
            for name in names
            for metric in self._client.get_metric_history(run.info.run_id, name)
        }
        for place in self._logged.keys() & self._unsent_metrics.keys():
            if _same(self._logged[place], self._unsent_metrics[place][0]):
                del self._unsent_metrics[place]
        # A finished child that is only looked at again keeps its status and its end time.
        stopped = ("KILLED", "FAILED") if self.identity.parent_id else ("KILLED", "FAILED", "FINISHED")
        if not self._closed and self._closing is None and self._status in stopped:
            self._revive()
        self._attached = True

    def _revive(self) -> None:
        self._client.update_run(self.run_id, status="RUNNING")
        self._status = "RUNNING"

    def _queue(self, row: Mapping[str, float], epoch: int) -> None:
        for name, value in _clean_names(row).items():
            place = (name, epoch)
            if place not in self._logged and place not in self._unsent_metrics:
                self._unsent_metrics[place] = (value, _now_ms())

    def _send(self) -> bool:
        from mlflow.entities import Metric, Param, RunTag

        if not (self._unsent_metrics or self._unsent_params or self._unsent_tags):
            return False
        if self._unsent_metrics and self._closing is None and self._status == "FINISHED":
            self._revive()
        # The client splits this into batches of the size MLflow takes.
        self._client.log_batch(
            self.run_id,
            metrics=[
                Metric(name, value, moment, step) for (name, step), (value, moment) in self._unsent_metrics.items()
            ],
            params=[Param(name, value) for name, value in self._unsent_params.items()],
            tags=[RunTag(name, value) for name, value in self._unsent_tags.items()],
            synchronous=True,
        )
        self._changed |= bool(self._unsent_metrics)
        self._logged |= {place: value for place, (value, _) in self._unsent_metrics.items()}
        for sent in (self._unsent_metrics, self._unsent_params, self._unsent_tags):
            sent.clear()
        return True

    def _close(self, closing: Closing) -> None:
        last_epoch = max((step for _, step in self._logged), default=0)
        for name, value in _clean_names(numbers(closing.metrics)).items():
            if not _same(self._logged.get((name, last_epoch)), value):
                self._unsent_metrics[name, last_epoch] = (value, _now_ms())
        self._send()
        if self._changed or self._status != closing.status:
            self._client.set_terminated(self.run_id, status=closing.status)
            self._status = closing.status
        if closing.artifacts is not None:
            if closing.artifacts.is_dir():
                self._client.log_artifacts(self.run_id, str(closing.artifacts))
            else:
                _logger.warning("run %s: there is no folder %s of artifacts", self.identity.key, closing.artifacts)
        self._closing = None
        self._closed = True
        self._changed = False
        self._logged.clear()  # hundreds of closed runs are kept, to be tagged


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


def _param_text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return json.dumps(value, default=str, ensure_ascii=False)
    return str(value)


def _clean(texts: Mapping[str, object], length: int) -> dict[str, str]:
    return {name: str(value)[:length] for name, value in _clean_names(texts).items()}


def _clean_names(values: Mapping[str, _Value]) -> dict[str, _Value]:
    """Names with the characters MLflow allows, so that one odd name cannot hold back a whole batch."""
    return {re.sub(r"[^\w.\- :/]", "_", str(name))[:_NAME_LENGTH] or "_": value for name, value in values.items()}


def _same(logged: float | None, value: float) -> bool:
    return logged is not None and (logged == value or (math.isnan(logged) and math.isnan(value)))


def _now_ms() -> int:
    return int(time.time() * 1000)
