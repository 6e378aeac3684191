"""Artifacts that lie beside the SQLite file that names them, and go where it goes."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

_ARTIFACTS = "artifacts"  # the folder beside a SQLite file
IS_BESIDE = "refilled.artifacts_beside_file"  # tag of the experiments whose artifacts are in it
_LOCATIONS = (  # where MLflow keeps addresses of artifacts
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def beside(path: Path) -> str:
    """The address of the folder of artifacts beside a SQLite file."""
    return (path.parent.resolve() / _ARTIFACTS).as_uri()


def follow_move(path: Path, *, is_writer: bool) -> None:
    """Correct the locations of artifacts that lie beside a SQLite file, where the folder of both was moved or copied.

    MLflow has no relative locations: it resolves one against the current directory when the experiment is created. A
    reader leaves alone what it cannot write, and a file that was copied without its artifacts.
    """
    if not is_writer and not ((path.parent / _ARTIFACTS).is_dir() and os.access(path, os.W_OK)):
        return
    here = beside(path)
    find = "SELECT artifact_location FROM experiments JOIN experiment_tags USING (experiment_id) WHERE key = ?"
    with contextlib.closing(sqlite3.connect(path, timeout=20, isolation_level=None)) as database:
        moved = {place for (place,) in database.execute(find, (IS_BESIDE,)) if place != here}
        if not moved:
            return
        database.execute("BEGIN IMMEDIATE")
        for before in moved:
            database.execute("UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?", (here, before))
            start, length = f"{before}/", len(before) + 1
            for table, column in _LOCATIONS:
                change = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?"
                database.execute(change, (f"{here}/", length + 1, length, start))
        database.execute("COMMIT")
