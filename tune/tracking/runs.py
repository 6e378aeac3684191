"""One run's way into MLflow: found or created, rows mirrored from its file, closed; every step can be repeated."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tune.tracking.connection import Connection
from tune.tracking.record import NAME_LENGTH, Closing, RunRecord, clean_names, clean_tags, now_ms
from tune.tracking.rows import METRICS_FILE, RowTail, numbers

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_logger = logging.getLogger(__name__)


class RunMirror:
    """Brings MLflow up to the state of one run; used by one thread at a time.

    `deliver` may raise whatever MLflow raises, at any point. The next call then looks at what MLflow holds and
    sends what is missing, so that a batch whose answer was lost is not logged twice.

    Args:
        connection: The store and the experiment.
        record: What was told of the run; one that has ended is closed once all its rows are delivered.
        parent: The search it is a child of, which is found or created first; none: it is a search itself.
    """

    def __init__(self, connection: Connection, record: RunRecord, parent: RunMirror | None) -> None:
        self.key = record.key
        self.run_id: str | None = None
        self.was_created = False
        self.was_changed = False
        self.num_values_sent = 0
        self._connection = connection
        self._record = record
        self._parent = parent
        self._tags = dict(record.tags)
        self._tail = None if record.folder is None else RowTail(record.folder / METRICS_FILE)
        self._closing = record.closing
        self._may_have_twins = False
        self._forget()

    @property
    def _client(self) -> MlflowClient:
        return self._connection.connect()[0]

    @property
    def settled(self) -> bool:
        """Closed in MLflow, and no tag is waiting."""
        return self._closed and not self._unsent_tags

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags with the next delivery; works on a closed run too."""
        cleaned = clean_tags(tags)
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
            MlflowException, OSError, UserError: MLflow or its artifact store refused or did not answer.
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

    def _found_or_created(self) -> Run:
        """The run of this key below this parent, as MLflow has it; made where it is missing."""
        client, experiment_id = self._connection.connect()
        self._tags["run_key"] = self.key
        if self._parent is not None:
            self._tags["mlflow.parentRunId"] = self._parent.existing_id()
        found = self._all_of_this_key()
        if found:
            self._may_have_twins |= len(found) > 1
            return next((run for run in found if run.info.run_id == self.run_id), found[0])
        self._may_have_twins = True
        name = self._record.name[:NAME_LENGTH] or self.key
        created = client.create_run(experiment_id, self._record.started_ms, tags=self._tags, run_name=name)
        self.was_created = True
        return created

    def _all_of_this_key(self) -> list[Run]:
        client, experiment_id = self._connection.connect()
        wanted = f"tags.run_key = '{self.key}'"
        if self._parent is not None:
            wanted += f" AND tags.`mlflow.parentRunId` = '{self._tags['mlflow.parentRunId']}'"
        return list(client.search_runs([experiment_id], wanted, max_results=10, order_by=["attributes.run_id ASC"]))

    def _delete_twins(self) -> None:
        """Delete what a request to create the run has made whose answer never came; nothing was ever sent there."""
        if not self._may_have_twins:
            return
        for run in self._all_of_this_key():
            if run.info.run_id != self.run_id and run.info.status == "RUNNING" and not run.data.metrics:
                self._client.delete_run(run.info.run_id)
        self._may_have_twins = False

    def existing_id(self) -> str:
        """MLflow's id of the run, which is found or created where nobody did so yet."""
        if self.run_id is None:
            self.run_id = str(self._found_or_created().info.run_id)
        return self.run_id

    def _attach(self) -> None:
        run = self._found_or_created()
        self.run_id = run.info.run_id
        self._status = run.info.status
        # Changed params of a found run stay as they are: MLflow refuses to rewrite them.
        self._unsent_params = {
            name: value for name, value in self._record.params.items() if name not in run.data.params
        }
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
        stopped = ("KILLED", "FAILED") if self._parent else ("KILLED", "FAILED", "FINISHED")
        if not self._closed and self._closing is None and self._status in stopped:
            self._revive()
        self._attached = True

    def _revive(self) -> None:
        self._client.update_run(self.run_id, status="RUNNING")
        self._status = "RUNNING"

    def _queue(self, row: Mapping[str, float], epoch: int) -> None:
        for name, value in clean_names(row).items():
            place = (name, epoch)
            if place not in self._logged and place not in self._unsent_metrics:
                self._unsent_metrics[place] = (value, now_ms())

    def _send(self) -> bool:
        from mlflow.entities import Metric, Param, RunTag

        if not (self._unsent_metrics or self._unsent_params or self._unsent_tags):
            return False
        if self._unsent_metrics and self._closing is None and self._status == "FINISHED":
            self._revive()
        self.was_changed = True
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
        self.num_values_sent += len(self._unsent_metrics)
        self._logged |= {place: value for place, (value, _) in self._unsent_metrics.items()}
        for sent in (self._unsent_metrics, self._unsent_params, self._unsent_tags):
            sent.clear()
        return True

    def _close(self, closing: Closing) -> None:
        last_epoch = max((step for _, step in self._logged), default=0)
        for name, value in clean_names(numbers(closing.metrics)).items():
            if not _same(self._logged.get((name, last_epoch)), value):
                self._unsent_metrics[name, last_epoch] = (value, now_ms())
        self._send()
        self._delete_twins()
        if self._changed or self._status != closing.status:
            self.was_changed = True
            self._client.set_terminated(self.run_id, status=closing.status, end_time=closing.ended_ms)
            self._status = closing.status
        if closing.artifacts is not None:
            if closing.artifacts.is_dir():
                self._client.log_artifacts(self.run_id, str(closing.artifacts))
            else:
                _logger.warning("run %s: there is no folder %s of artifacts", self.key, closing.artifacts)
        self._closing = None
        self._closed = True
        self._changed = False
        self._logged.clear()  # hundreds of closed runs are kept, to be tagged


def _same(logged: float | None, value: float) -> bool:
    return logged is not None and (logged == value or (math.isnan(logged) and math.isnan(value)))
