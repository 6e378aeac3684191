"""All that was told of one search, and its form as lines of a journal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tune.tracking.record import Closing, RunRecord, now_ms

Line = dict[str, Any]


class Told:
    """What the lines of a journal add up to.

    Args:
        storage: The folder that paths in it are written relative to, so that it can be moved.

    Attributes:
        search: The search itself; none where nothing was told yet.
        experiment: The MLflow experiment of the search.
        uri: Where it was mirrored last, as the journal keeps it.
        runs: The runs of the search by their keys, in the order they were told.
        answered: The stores that took the search.
        delivered: The stores that hold everything told.
    """

    def __init__(self, storage: Path) -> None:
        self.search: RunRecord | None = None
        self.experiment = ""
        self.uri: str | None = None
        self.runs: dict[str, RunRecord] = {}
        self.answered: set[str | None] = set()
        self.delivered: set[str | None] = set()
        self._storage = storage

    def record(self, key: str) -> RunRecord:
        """A run, or the search itself.

        Raises:
            KeyError: Nothing was told of it.
        """
        if self.search is not None and key == self.search.key:
            return self.search
        return self.runs[key]

    def add(self, line: Mapping[str, Any]) -> None:
        """Take in one line.

        Raises:
            KeyError, TypeError, ValueError: It is not a line of a journal; nothing was taken in.
        """
        match line["told"]:
            case "answered":
                self.answered.add(_uri(line))
                return
            case "delivered":
                self.delivered.add(_uri(line))
                return
            case "search":
                record, experiment, uri = self._opened(self.search, line), str(line["experiment"]), _uri(line)
                self.search, self.experiment, self.uri = record, experiment, uri
            case "run":
                record = self._opened(self.runs.get(line["key"]), line)
                self.runs[record.key] = record
            case "close":
                record = self.record(line["key"]).tagged(line["tags"])
                self._replace(dataclasses.replace(record, closing=self._closing(line)))
            case "tag":
                self._replace(self.record(line["key"]).tagged(line["tags"]))
            case other:
                raise ValueError(f"{other!r} is nothing that is told")
        self.delivered.clear()

    def lines(self) -> Iterator[Line]:
        """The shortest journal that adds up to this."""
        records = [*self.runs.values()]
        if self.search is not None:
            yield self.search_line(self.search, self.experiment, self.uri)
            records.append(self.search)
        for record in self.runs.values():
            yield self.run_line(record)
        for record in records:
            if record.closing is not None:
                yield self.close_line(record.key, record.closing, {})
        for uri in sorted(self.answered, key=str):
            yield answered_line(uri)
        for uri in sorted(self.delivered, key=str):
            yield delivered_line(uri)

    def search_line(self, record: RunRecord, experiment: str, uri: str | None) -> Line:
        """The search begins, or begins again."""
        return {"told": "search", **_about(record), "experiment": experiment, "uri": uri}

    def run_line(self, record: RunRecord) -> Line:
        """A run is open."""
        return {"told": "run", **_about(record), "folder": self._relative(record.folder)}

    def close_line(self, key: str, closing: Closing, tags: Mapping[str, str]) -> Line:
        """A run, or the search, has ended."""
        return {
            "told": "close",
            "key": key,
            "status": closing.status,
            "metrics": dict(closing.metrics),
            "tags": dict(tags),
            "artifacts": self._relative(closing.artifacts),
            "time_ms": closing.ended_ms,
        }

    def _opened(self, known: RunRecord | None, line: Mapping[str, Any]) -> RunRecord:
        record = RunRecord(
            key=str(line["key"]),
            name=str(line["name"]),
            params=dict(line["params"]),
            tags=dict(line["tags"]),
            folder=self._absolute(line.get("folder")),
            started_ms=int(line["time_ms"]),
        )
        return record if known is None else known.told_again(record)

    def _closing(self, line: Mapping[str, Any]) -> Closing:
        return Closing(
            status=line["status"],
            metrics=dict(line["metrics"]),
            artifacts=self._absolute(line["artifacts"]),
            ended_ms=int(line["time_ms"]),
        )

    def _replace(self, record: RunRecord) -> None:
        if self.search is not None and record.key == self.search.key:
            self.search = record
        else:
            self.runs[record.key] = record

    def _relative(self, path: Path | None) -> str | None:
        if path is None:
            return None
        whole = path.absolute()
        return str(whole.relative_to(self._storage) if whole.is_relative_to(self._storage) else whole)

    def _absolute(self, text: str | None) -> Path | None:
        return None if text is None else self._storage / text  # which is the text alone where that is absolute


def answered_line(uri: str | None) -> Line:
    """A store took the search."""
    return {"told": "answered", "uri": uri}


def delivered_line(uri: str | None) -> Line:
    """A store holds everything told up to now."""
    return {"told": "delivered", "uri": uri, "time_ms": now_ms()}


def _about(record: RunRecord) -> Line:
    return {
        "key": record.key,
        "name": record.name,
        "params": dict(record.params),
        "tags": dict(record.tags),
        "time_ms": record.started_ms,
    }


def _uri(line: Mapping[str, Any]) -> str | None:
    return None if line["uri"] is None else str(line["uri"])
