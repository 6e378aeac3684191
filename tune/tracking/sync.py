"""Bringing MLflow up to the states of a search; every step can be repeated, by any process, on any machine.

A run is found by its tag `run_key` below its search. Before anything is sent, what MLflow holds is looked at; and a
number is sent with a time that follows from the run alone, so that MLflow takes it for the one it has, should two
processes send it at once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from refilled.storage import Storage
from tune.tracking.outbox import Ending, Outbox, RunState, kept_uri
from tune.tracking.rows import Rows, numbers
from tune.tracking.store import find_or_create_experiment, open_store, sqlite_path
from tune.tracking.students import register
from tune.tracking.texts import NAME_LENGTH, clean_names

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_logger = logging.getLogger(__name__)


class Connection:
    """One experiment in one MLflow store, connected when it is first needed; used by one thread at a time.

    Args:
        uri: Tracking URI.
        experiment: Name of the experiment, created where it is missing.
        storage: Where the searches lie.
    """

    def __init__(self, uri: str, experiment: str, storage: Storage) -> None:
        self.uri = uri
        self._experiment = experiment
        self.storage = storage

    @cached_property
    def client_and_experiment(self) -> tuple[MlflowClient, str]:
        """The client and the experiment's id.

        Raises:
            UnusableStoreError: The store does not answer, or does not take the experiment.
            UserError: The experiment was deleted.
        """
        client = open_store(self.uri, create=True)
        file = sqlite_path(self.uri)
        # Beside the file that names them, so that they move together; a database elsewhere has no such place.
        root = self.storage.root if file is None else file.parent
        return client, find_or_create_experiment(client, self.uri, self._experiment, root / "artifacts")


class RunSync:
    """Brings MLflow up to the state of one run.

    `sync` may raise whatever MLflow raises, at any point. The next call then looks at what MLflow holds again.

    Args:
        connection: The store and the experiment.
        state: What MLflow is to have.
        parent: The search it is a child of, which is found or created first; none: it is a search itself.

    Attributes:
        state: The same; `update` replaces it.
        run_id: MLflow's id; none until it was found or created.
        is_done: MLflow has the state, and how the run ended.
        was_looked_at, was_created, was_changed, num_values_sent: What `sync` has done in all.
    """

    def __init__(self, connection: Connection, state: RunState, parent: RunSync | None) -> None:
        self.state = state
        self.run_id: str | None = None
        self.is_done = False
        self.was_looked_at = False
        self.was_created = False
        self.was_changed = False
        self.num_values_sent = 0
        self._connection = connection
        self._parent = parent
        self._run: Run | None = None  # as MLflow has it; none until it was looked at
        self._forget()

    @property
    def _client(self) -> MlflowClient:
        return self._connection.client_and_experiment[0]

    def update(self, state: RunState) -> None:
        """MLflow is to have another state; to a run that ended alike only its tags are sent."""
        if self._has_ended and state.ending != self.state.ending:
            self._forget()
        self.state = state
        self.is_done = False

    def sync(self) -> bool:
        """Send what MLflow does not hold yet; whether MLflow was called at all.

        Raises:
            MlflowException, OSError, UserError: MLflow or its artifact store refused or did not answer.
        """
        try:
            return self._sync()
        except BaseException:
            self._run = None  # the call may have been carried out all the same
            raise

    def existing_id(self) -> str:
        """MLflow's id of the run, which is found or created where nobody did so yet."""
        if self.run_id is None:
            self.run_id = str(self._found_or_created().info.run_id)
        return self.run_id

    def _forget(self) -> None:
        self._run = None
        self._has_ended = False
        self._rows: Rows | None = None
        self._logged: dict[tuple[str, int], float] = {}  # by name and step
        self._unsent: dict[tuple[str, int], tuple[float, int]] = {}  # with the time

    def _sync(self) -> bool:
        called = self._run is None
        run = self._attach() if self._run is None else self._run
        ending = self.state.ending
        if self._rows is not None and not self._has_ended:
            for row in self._rows.read(look=ending is not None):
                self._queue(row.numbers, row.epoch, self.state.started_ms + int(1000 * row.elapsed_s))
        called |= self._send(run)
        if ending is not None:
            if not self._has_ended:
                self._end(run, ending)
                called = True
            self.is_done = True
        return called

    def _attach(self) -> Run:
        """Look at what MLflow holds."""
        run = self._found_or_created()
        self.run_id, self.was_looked_at = run.info.run_id, True
        if not self._has_ended:
            self._logged = {
                (metric.key, metric.step): metric.value
                for name in run.data.metrics
                for metric in self._client.get_metric_history(run.info.run_id, name)
            }
            self._unsent.clear()
            self._rows = None if self.state.folder is None else Rows(self._connection.storage, self.state.folder)
            if self.state.ending is None and run.info.status != "RUNNING":
                self._client.update_run(run.info.run_id, status="RUNNING")
                run = self._client.get_run(run.info.run_id)
        self._run = run
        return run

    def _found_or_created(self) -> Run:
        """The run of this key below this parent, as MLflow has it; made where it is missing."""
        found = self._all_of_this_key()
        if not found:
            client, experiment_id = self._connection.client_and_experiment
            state = self.state
            client.create_run(
                experiment_id, state.started_ms, tags=self._tags(), run_name=state.name[:NAME_LENGTH] or state.key
            )
            self.was_created, self._has_ended = True, False
            # A request whose answer is lost is made again, and another process may have made it too.
            found = self._all_of_this_key()
        found.sort(key=lambda run: (run.info.run_id != self.run_id, not run.data.metrics, run.info.run_id))
        for twin in found[1:]:
            if twin.info.status == "RUNNING" and not twin.data.metrics:
                self._client.delete_run(twin.info.run_id)
        return found[0]

    def _all_of_this_key(self) -> list[Run]:
        client, experiment_id = self._connection.client_and_experiment
        wanted = f"tags.run_key = '{self.state.key}'"
        if self._parent is not None:
            wanted += f" AND tags.`mlflow.parentRunId` = '{self._parent.existing_id()}'"
        return list(client.search_runs([experiment_id], wanted, max_results=10))

    def _tags(self) -> dict[str, str]:
        of_parent = {} if self._parent is None else {"mlflow.parentRunId": self._parent.existing_id()}
        return {**self.state.tags, "run_key": self.state.key, **of_parent}

    def _queue(self, values: Mapping[str, float], step: int, time_ms: int) -> None:
        for name, value in clean_names(values).items():
            if (name, step) not in self._logged and (name, step) not in self._unsent:
                self._unsent[name, step] = value, time_ms

    def _send(self, run: Run) -> bool:
        from mlflow.entities import Metric, Param, RunTag

        # Changed params of a found run stay as they are: MLflow refuses to rewrite them.
        params = {name: value for name, value in self.state.params.items() if name not in run.data.params}
        tags = {name: value for name, value in self._tags().items() if run.data.tags.get(name) != value}
        if not (self._unsent or params or tags):
            return False
        # The client splits this into batches of the size MLflow takes.
        self._client.log_batch(
            run.info.run_id,
            metrics=[Metric(name, value, moment, step) for (name, step), (value, moment) in self._unsent.items()],
            params=[Param(name, value) for name, value in params.items()],
            tags=[RunTag(name, value) for name, value in tags.items()],
            synchronous=True,
        )
        run.data.params.update(params)
        run.data.tags.update(tags)
        self.was_changed = True
        self.num_values_sent += len(self._unsent)
        self._logged |= {place: value for place, (value, _) in self._unsent.items()}
        self._unsent.clear()
        return True

    def _end(self, run: Run, ending: Ending) -> None:
        last_epoch = max((step for _, step in self._logged), default=0)
        for name, value in clean_names(numbers(ending.metrics)).items():
            if not _same(self._logged.get((name, last_epoch)), value):
                self._unsent[name, last_epoch] = value, ending.ended_ms
        self._send(run)
        if (run.info.status, run.info.end_time) != (ending.status, ending.ended_ms):
            self._client.set_terminated(run.info.run_id, status=ending.status, end_time=ending.ended_ms)
            self.was_changed = True
        if ending.artifacts is not None:
            self._connection.storage.pull(ending.artifacts)
            if ending.artifacts.is_dir():
                self._client.log_artifacts(run.info.run_id, str(ending.artifacts))
                for name, time_ms in ending.registered.items():
                    register(self._client, run, name, time_ms)
            else:
                _logger.warning("run %s: there is no folder %s of artifacts", self.state.key, ending.artifacts)
        self._has_ended = True
        self._logged.clear()  # hundreds of ended runs are kept, to be tagged


class Sync:
    """Brings MLflow at one address up to the states of one search; used by one thread at a time.

    Args:
        connection: The store and the experiment.
        outbox: Where the states are kept.
        again: Look at every run, also where MLflow is known to have it.

    Attributes:
        pending: What MLflow may lack something of, by key, in the order in which it is to be brought.
    """

    def __init__(self, connection: Connection, outbox: Outbox, *, again: bool = False) -> None:
        self.uri = connection.uri
        self.pending: dict[str, RunSync] = {}
        self._connection = connection
        self._outbox = outbox
        self._again = again
        self._taken = outbox.taken(kept_uri(connection.uri, outbox.storage))
        self._runs: dict[str, RunSync] = {}
        self._search: RunSync | None = None

    def put(self, state: RunState) -> None:
        """MLflow is to have this state of a run; the first one is the search's."""
        run = self._runs.get(state.key)
        if run is None:
            run = self._runs[state.key] = RunSync(self._connection, state, self._search)
            self._search = self._search or run
        else:
            run.update(state)
        self.pending[state.key] = run

    def bring(self, key: str) -> bool:
        """Bring MLflow up to one pending run; whether MLflow was called, which it is not where it is known to have it.

        Raises:
            MlflowException, OSError, UserError: MLflow or its artifact store refused or did not answer.
        """
        run = self.pending[key]
        assert self._search is not None
        search_id = self._search.existing_id()
        if self._taken.search_id != search_id:
            self._taken.begin(search_id)
        state = self._outbox.as_json(run.state)
        run_id = None if self._again or run.was_looked_at else self._taken.id_of(key, state)
        if run_id is not None:
            run.run_id = run_id
            del self.pending[key]
            return False
        self._taken.drop(key)
        called = run.sync()
        if run.is_done:
            del self.pending[key]
            self._taken.add(key, run.existing_id(), state)
        return called

    def note_taken(self) -> None:
        """Keep what MLflow has, so that nobody looks there for it again."""
        if self._taken.search_id is not None:
            self._taken.write()


def _same(logged: float | None, value: float) -> bool:
    return logged is not None and (logged == value or (math.isnan(logged) and math.isnan(value)))
