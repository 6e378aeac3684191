"""Where a search keeps its files: whole after a kill, made once, here and in an object store."""

from refilled.storage.artifact_folder import Artifact
from refilled.storage.artifacts import Artifacts, Kind
from refilled.storage.storage import Storage

__all__ = ["Artifact", "Artifacts", "Kind", "Storage"]
