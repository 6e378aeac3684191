"""A search whose storage is an object store, on a cluster that is lost and on another one."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import ClusterPlace, Command, LocalPlace
from end_state import differences, end_state
from mlflow_server import Server
from object_store import ObjectStore

from refilled.storage import Storage
from refilled.storage.object_storage import UPLOADED, WORK_FOLDER
from tune import search

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
SEARCH = "tune/search.py --deterministic --trial-batch 2 --seeds 1 --overlaps 1 --teacher-epochs 8 --no-forecast"
SEARCH += " --trials 4 --epochs 6 10 --embedding-cache.mode cached"
TEACHERS_RESULT = r"/teachers/[^/]*/result\.json"


class StoredPlace(ClusterPlace):
    """A cluster of one node beside its head, which share no folder: each has copies of its own."""

    def __init__(self, store: ObjectStore) -> None:
        super().__init__()
        self._store = store

    @property
    def environment(self) -> dict[str, str]:
        """With what reaches the store."""
        return super().environment | self._store.environment | {"REFILLED_WORK_FOLDER": str(self.folder / "driver")}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ObjectStore]:
    store = ObjectStore(tmp_path)
    store.start()
    yield store
    store.stop()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """MLflow, which a search with an object store asks for; its database is where `end_state` looks."""
    (tmp_path / "seen").mkdir()
    server = Server(tmp_path / "seen")
    server.start()
    yield server
    server.kill()


def what_is_stored(store: ObjectStore, url: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Copy to a folder all that the store has."""
    for name, value in store.environment.items():
        patch.setenv(name, value)
    patch.setenv(WORK_FOLDER, str(folder / "copies"))
    storage = Storage.open(url)
    for name in sorted(UPLOADED):
        storage.pull(storage.root / name)
        if (storage.root / name).exists():
            shutil.copytree(storage.root / name, folder / name)


def trained_teachers(requests: list[str]) -> list[str]:
    """Keys of the teachers whose results were written, once for each time."""
    return [line.split("/")[4] for line in requests if line.startswith("PUT") and re.search(TEACHERS_RESULT, line)]


def test_a_search_goes_on_on_another_cluster(
    store: ObjectStore, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "seen"
    with LocalPlace() as place:
        Command(SEARCH, tmp_path / "undisturbed", place).finish()
    url = f"s3://{store.bucket}/searches"
    text = f"{SEARCH} --study-storage sqlite:///{seen}/studies.db --tracking-uri {server.uri}"
    with StoredPlace(store) as place:
        command = Command(text, tmp_path / "first", place, url)
        command.start()
        assert command.wait_until_it_trains()
        server.kill()  # so that only the store has how the first trials end
        while not _num_ended(seen):
            time.sleep(0.1)
        command.end()
        assert not (place.folder / "driver" / "studies.db").exists()
        shutil.rmtree(place.folder / "driver", ignore_errors=True)
    server.start()
    with StoredPlace(store) as place:
        before = store.requests()
        Command(text, tmp_path / "second", place, url).finish()
    written = [line for line in store.requests()[len(before) :] if line.startswith(("PUT", "POST"))]
    trained_before = trained_teachers(before)
    assert trained_before
    assert not [line for line in written if "/teachers/" in line and line.split("/")[4] in trained_before]
    what_is_stored(store, url, seen, monkeypatch)
    assert differences(end_state(tmp_path / "undisturbed"), end_state(seen)) == []
    caches = {
        line.split("/")[5] for line in store.requests() if re.match(r"PUT .*/cache/embeddings/[^/]+/manifest", line)
    }
    assert len(caches) == len(_embedding_caches(tmp_path / "undisturbed"))


def test_two_clusters_without_a_common_folder_make_one_teacher(
    store: ObjectStore, server: Server, tmp_path: Path
) -> None:
    """Two searches at once, on clusters that share nothing but the store, whose teacher and caches are the same."""
    url = f"s3://{store.bucket}/together"
    with contextlib.ExitStack() as places:
        commands = []
        for name in ("one", "other"):
            place = places.enter_context(StoredPlace(store))
            studies = f"--study-storage sqlite:///{tmp_path}/{name}.db --tracking-uri {server.uri}"
            commands.append(Command(f"{SEARCH} --experiment {name} {studies}", tmp_path / name, place, url))
            commands[-1].start()
        for command in commands:
            command.finish()
    teachers = trained_teachers(store.requests())
    assert len(teachers) == 2  # that of the trials and that of the refits
    assert len(set(teachers)) == 2
    manifests = [line for line in store.requests() if re.match(r"PUT .*/cache/embeddings/.*/manifest.json", line)]
    assert len(manifests) == len(set(manifests)) > 0


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        ([], "study_storage must be the URL of a database"),
        (["--study-storage", "sqlite://"], "tracking_uri must be a server"),
        (["--study-storage", "sqlite://", "--tracking-uri", "sqlite:///mlflow.db"], "tracking_uri must be a server"),
    ],
)
def test_an_object_store_asks_for_databases_that_last(
    flags: list[str],
    missing: str,
    store: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in (store.environment | {WORK_FOLDER: str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    assert search.command(["--storage", f"s3://{store.bucket}/a", *flags]) == 2
    error = capsys.readouterr().err
    assert missing in error
    assert error.count("\n") == 1


def _num_ended(folder: Path) -> int:
    import optuna

    url = f"sqlite:///{folder}/studies.db"
    names = optuna.get_all_study_names(url) if (folder / "studies.db").exists() else []
    studies = [optuna.load_study(study_name=name, storage=url) for name in names]
    return sum(trial.state.is_finished() for study in studies for trial in study.trials)


def _embedding_caches(storage: Path) -> list[Path]:
    return [path for path in (storage / "cache" / "embeddings").iterdir() if path.is_dir()]
