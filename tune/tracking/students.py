"""From a URI of MLflow to the files of a student."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from refilled.errors import UserError
from tune.tracking.store import open_store, shown_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

_FILES = ("config.json", "model.pt")
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
