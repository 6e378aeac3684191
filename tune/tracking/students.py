"""Students in MLflow: their files by URI, and the names under which the best are registered."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from refilled.errors import UserError
from tune.tracking.store import open_store, shown_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_FILES = ("config.json", "model.pt")
MODEL = "model"  # folder of a run's artifacts that is an MLflow model
CHAMPION = "champion"  # the alias of a registered model's version
_REGISTERED_MS = "registered_ms"  # tag of a version: when it was said to be the champion
_TAGS = (
    *("cell", "overlap", "teacher", "student", "images_per_class", "method"),
    *("seed", "run_key", "data_digest", "code_version"),
)
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.-]+")
_MOST_OF_NAME = 200
_VARIABLE = "MLFLOW_TRACKING_URI"  # which `mlflow.set_tracking_uri` sets too


def download(uri: str, tracking_uri: str | None, folder: Path) -> None:
    """Write the `model.pt` and `config.json` of a run into a folder.

    Args:
        uri: `runs:/RUN_ID`, or `models:/NAME@ALIAS` or `models:/NAME/VERSION` of a registered student.
        tracking_uri: Where MLflow is; none: as its own variable says.
        folder: An empty folder.

    Raises:
        UserError: MLflow does not answer, or has no such run or model, or the run has no student.
    """
    where = tracking_uri or os.environ.get(_VARIABLE)
    if not where:
        raise UserError(f"tracking_uri must be given, or {_VARIABLE} be set, where a student is named by {uri}.")
    client = open_store(where, create=False)
    from mlflow.exceptions import MlflowException

    try:
        run_id = _run_id(client, uri)
        for name in _FILES:
            client.download_artifacts(run_id, name, str(folder))
    except (MlflowException, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{uri} must be a run with a student in MLflow at {shown_uri(where)} ({reason}).") from error


def registered_name(*parts: str) -> str:
    """A name that MLflow takes, and that its URIs take, made of parts with dashes between.

    What had to be replaced or cut makes room for a hash, so that different parts have different names.
    """
    whole = "-".join(parts)
    name = _NOT_IN_NAMES.sub("_", whole)[:_MOST_OF_NAME]
    return name if name == whole else f"{name}-{hashlib.sha256(whole.encode()).hexdigest()[:6]}"


def register(client: MlflowClient, run: Run, name: str, time_ms: int) -> None:
    """Make a run's model a version of a registered model, and the champion unless a later one is; can be repeated.

    Args:
        client: Of the store that holds the run.
        run: The run, whose artifacts are there.
        name: Of the registered model, which is made where it is missing.
        time_ms: When the run was said to be the champion.
    """
    from mlflow.exceptions import MlflowException

    if not client.search_registered_models(f"name = '{name}'", max_results=1):
        try:
            client.create_registered_model(name)
        except MlflowException as error:  # another process made it between the two calls
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    wanted = f"name = '{name}' and run_id = '{run.info.run_id}'"
    versions = client.search_model_versions(wanted, max_results=1)
    if versions:
        version = versions[0].version
    else:
        tags = {tag: run.data.tags[tag] for tag in _TAGS if tag in run.data.tags}
        source = f"{run.info.artifact_uri}/{MODEL}"
        version = client.create_model_version(name, source, run.info.run_id, tags=tags).version
    client.set_model_version_tag(name, version, _REGISTERED_MS, str(time_ms))
    champion = client.get_registered_model(name).aliases.get(CHAMPION)
    if champion is not None and str(champion) != str(version):
        known = client.get_model_version(name, str(champion)).tags.get(_REGISTERED_MS, "0")
        if int(known) > time_ms:
            return
    client.set_registered_model_alias(name, CHAMPION, version)


def _run_id(client: MlflowClient, uri: str) -> str:
    """The run that a URI names, itself or by a registered model's version."""
    scheme, _, rest = uri.partition(":/")
    if scheme == "runs":
        return rest.strip("/").partition("/")[0]
    name, at, alias = rest.strip("/").rpartition("@")
    if at:
        return str(client.get_model_version_by_alias(name, alias).run_id)
    name, _, version = rest.strip("/").rpartition("/")
    return str(client.get_model_version(name, version).run_id)
