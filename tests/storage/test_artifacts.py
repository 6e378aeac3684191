"""Artifacts: made once, whole or not there, never trusted when damaged, kept within their room."""

from __future__ import annotations

import fcntl
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from damage import damages

from refilled.storage import Artifact, Kind, Storage, artifact_folder
from refilled.storage.artifact_folder import MANIFEST, USED, NoRoomError, locked
from refilled.storage.files import json_bytes

THINGS, OWN = Kind("things"), Kind("own", is_local=True)
ABOUT = {"names": ["a", "b"], "size": 3, "share": 0.1}
NUM_BYTES = 10_000
_processes = multiprocessing.get_context("fork")  # which has torch already


class Maker:
    """Makes two files, and counts how often; `content` is theirs."""

    def __init__(self, content: bytes = b"x" * NUM_BYTES) -> None:
        self.content = content
        self.num_calls = 0

    def __call__(self, folder: Path | None) -> Mapping[str, Any]:
        self.num_calls += 1
        assert folder is not None
        (folder / "a.bin").write_bytes(self.content)
        (folder / "b.bin").write_bytes(self.content[::-1])
        return ABOUT


def folders(storage: Storage, kind: Kind = THINGS) -> list[str]:
    return sorted(path.name for path in (storage.root / "cache" / kind.name).iterdir() if path.is_dir())


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path / "storage")


@pytest.mark.parametrize("kind", [THINGS, OWN])
def test_what_is_there_is_not_made_again(kind: Kind, storage: Storage) -> None:
    assert storage.artifacts.open(kind, "key") is None
    maker = Maker(bytes(range(256)))
    made = [storage.artifacts.make(kind, "key", maker) for _ in range(2)]
    made.append(storage.artifacts.open(kind, "key"))
    assert maker.num_calls == 1
    for artifact in made:
        assert artifact is not None
        assert artifact.about == ABOUT
        assert (artifact.path / "a.bin").read_bytes() == maker.content
    assert storage.artifacts.make(kind, "other", maker) is not None
    assert maker.num_calls == 2
    assert folders(storage, kind) == ["key", "other"]


@pytest.mark.parametrize("kind", [THINGS, OWN])
def test_many_processes_at_once_make_it_once(kind: Kind, storage: Storage, tmp_path: Path) -> None:
    def make(number: int) -> None:
        def build(folder: Path | None) -> Mapping[str, Any]:
            (tmp_path / f"made by {number}").touch()
            time.sleep(0.2)
            return Maker()(folder)

        go.wait()
        artifact = storage.artifacts.make(kind, "key", build)
        assert artifact is not None
        assert (artifact.path / "a.bin").stat().st_size == NUM_BYTES

    go = _processes.Barrier(6)
    makers = [_processes.Process(daemon=True, target=make, args=(number,)) for number in range(6)]
    for each in makers:
        each.start()
    for each in makers:
        each.join(60)
        assert each.exitcode == 0
    assert len(list(tmp_path.glob("made by *"))) == 1


def test_who_does_not_wait_for_others_goes_on_without(storage: Storage) -> None:
    maker = Maker()
    folder = storage.artifacts.folder(THINGS, "key")
    with locked(folder, wait=True):
        assert storage.artifacts.make(THINGS, "key", maker, wait=False) is None
    assert maker.num_calls == 0
    assert storage.artifacts.make(THINGS, "key", maker, wait=False) is not None


def test_a_maker_that_fails_leaves_nothing(storage: Storage) -> None:
    def fail(folder: Path | None) -> Mapping[str, Any]:
        Maker()(folder)
        raise KeyError("a mistake")

    with pytest.raises(KeyError):
        storage.artifacts.make(THINGS, "key", fail)
    assert folders(storage) == []
    assert storage.artifacts.make(THINGS, "key", Maker()) is not None


# ---- kills ----------------------------------------------------------------------------------------------------------


def held(moment: str, storage: Storage, reached: Any) -> None:
    """Make an artifact up to a moment, and stay there."""

    def stay(*_: object, **__: object) -> None:
        reached.set()
        signal.pause()

    def build(folder: Path | None) -> Mapping[str, Any]:
        assert folder is not None
        if moment == "nothing written":
            stay()
        (folder / "a.bin").write_bytes(b"half")
        if moment == "half written":
            stay()
        return Maker(b"other")(folder)

    if moment == "all written":
        artifact_folder._checksum = stay
    if moment == "manifest written":
        rename = os.rename
        os.rename = lambda path, other: stay() if path.suffix == ".partial" else rename(path, other)
    if moment == "damaged one half deleted":

        def half(folder: Path) -> None:
            (folder / "a.bin").unlink()
            stay()

        shutil.rmtree = half  # type: ignore[assignment]
    storage.artifacts.make(THINGS, "key", build, reserve={"a.bin": 100})


@pytest.mark.parametrize(
    "moment",
    ["nothing written", "half written", "all written", "manifest written", "damaged one half deleted"],
)
def test_a_kill_leaves_nothing_half_made(moment: str, storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    if moment.startswith("damaged"):
        made = storage.artifacts.make(THINGS, "key", Maker())
        assert made is not None
        (made.path / "b.bin").unlink()
    reached = _processes.Event()
    maker = _processes.Process(daemon=True, target=held, args=(moment, storage, reached))
    maker.start()
    assert reached.wait(60)
    maker.kill()
    maker.join()
    assert [each for each in folders(storage) if not each.endswith(".partial")] == []
    assert len(folders(storage)) == 1
    assert storage.artifacts.open(THINGS, "key") is None
    started_s = time.monotonic()
    artifact = storage.artifacts.make(THINGS, "key", Maker(), max_bytes=2**30)  # the lock died with its owner
    assert time.monotonic() - started_s < 10
    assert artifact is not None
    assert (artifact.path / "a.bin").read_bytes() == Maker().content
    assert folders(storage) == ["key"]
    assert caplog.text == ""


def test_kills_at_any_moment_leave_whole_artifacts_or_none(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    """One after another as fast as it goes, with room for three, so that deleting is disturbed as well."""

    def make_many() -> None:
        for number in range(10**6):
            content = number.to_bytes(4) * 5000
            storage.artifacts.make(THINGS, f"{number % 7}", Maker(content), max_bytes=150_000)

    draws = random.Random(0)
    for _ in range(20):
        maker = _processes.Process(daemon=True, target=make_many)
        maker.start()
        time.sleep(draws.uniform(0.02, 0.1))
        maker.kill()
        maker.join()
        for name in folders(storage):
            if not name.endswith(".partial"):
                assert storage.artifacts.open(THINGS, name) is not None
    assert caplog.text == ""
    assert storage.artifacts.make(THINGS, "last", Maker(), max_bytes=150_000) is not None
    assert not [each for each in folders(storage) if each.endswith(".partial")]


# ---- damage ---------------------------------------------------------------------------------------------------------

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (
        lambda path: (path / "b.bin").write_bytes(b"y" + b"x" * (NUM_BYTES - 1)),
        "b.bin does not have the checks",
    ),
    "cut": (lambda path: os.truncate(path / "a.bin", 50), f"a.bin has 50 bytes instead of {NUM_BYTES}"),
    "emptied": (lambda path: os.truncate(path / "a.bin", 0), "a.bin has 0 bytes"),
    "missing": (lambda path: (path / "b.bin").unlink(), "b.bin is missing"),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), "manifest.json is missing"),
    "no JSON": (lambda path: (path / MANIFEST).write_text("{"), "manifest.json must be a whole JSON file"),
    "no object": (lambda path: (path / MANIFEST).write_text("[1]"), "manifest.json does not say what there is"),
    "deep": (lambda path: (path / MANIFEST).write_text("[" * 100_000), "manifest.json must be a whole JSON file"),
    "other about": (lambda path: change(path, about=ABOUT | {"size": 4}), "manifest.json does not say what there is"),
    "other files": (lambda path: change(path, files={}), "manifest.json does not say what there is"),
}


def change(path: Path, **values: object) -> None:
    (path / MANIFEST).write_bytes(json_bytes(json.loads((path / MANIFEST).read_bytes()) | values))


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_warned_of_once_and_made_again(
    damage: Callable[[Path], object], reason: str, storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    maker = Maker()
    made = storage.artifacts.make(THINGS, "key", maker)
    assert made is not None
    damage(made.path)
    again = storage.artifacts.make(THINGS, "key", maker)
    assert again is not None
    assert again.about == ABOUT
    assert (again.path / "b.bin").read_bytes() == maker.content[::-1]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{made.path} is damaged and is not used" in record.getMessage()
    assert reason in record.getMessage()
    assert storage.artifacts.open(THINGS, "key") is not None
    assert maker.num_calls == 2
    assert len(caplog.records) == 1


def test_no_damaged_manifest_is_believed(storage: Storage) -> None:
    made = storage.artifacts.make(THINGS, "key", Maker())
    assert made is not None
    whole = (made.path / MANIFEST).read_bytes()
    num_refused = 0
    for name, content in damages(whole, random.Random(0), 180):
        (made.path / MANIFEST).write_bytes(content)
        found = storage.artifacts.open(THINGS, "key")
        num_refused += found is None
        assert found is None or found.about == ABOUT, name
    assert num_refused > 120


def test_checksums_are_compared_once_in_a_process_unless_the_file_changes(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = storage.artifacts.make(THINGS, "key", Maker())
    assert made is not None
    read: list[str] = []
    compare = artifact_folder._checksum
    monkeypatch.setattr(artifact_folder, "_checksum", lambda path: read.append(path.name) or compare(path))
    for _ in range(3):
        assert storage.artifacts.open(THINGS, "key") is not None
    assert read == []  # it was checked when it was made
    monkeypatch.setattr(artifact_folder, "_verified", set())  # as in another process
    for _ in range(3):
        assert storage.artifacts.open(THINGS, "key") is not None
    assert sorted(read) == ["a.bin", "b.bin"]
    os.utime(made.path / "a.bin", (1, 1))
    assert storage.artifacts.open(THINGS, "key") is not None
    assert sorted(read) == ["a.bin", "a.bin", "b.bin"]


def test_one_that_is_deleted_while_it_is_opened_is_not_there(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the lock on it was had, and whether or not another was made in its place."""
    lock = fcntl.flock

    def delete(and_make: bool) -> Callable[..., None]:
        def flock(file: Any, mode: int) -> None:
            monkeypatch.setattr(fcntl, "flock", lock)
            artifact_folder.discard(storage.artifacts.folder(THINGS, "key"))
            if and_make:
                del made[:]
                made.append(storage.artifacts.make(THINGS, "key", Maker()))
            lock(file, mode)

        return flock

    made = [storage.artifacts.make(THINGS, "key", Maker())]
    for and_make in (True, False):
        monkeypatch.setattr(fcntl, "flock", delete(and_make))
        assert storage.artifacts.open(THINGS, "key") is None
    assert caplog.text == ""


# ---- room -----------------------------------------------------------------------------------------------------------


def make(storage: Storage, key: str, room: float) -> Artifact | None:
    """Where so many artifacts have room, with their manifests."""
    reserve = {"a.bin": NUM_BYTES, "b.bin": NUM_BYTES}
    max_bytes = int((room + 0.5) * 2 * NUM_BYTES)
    return storage.artifacts.make(THINGS, key, Maker(), reserve=reserve, max_bytes=max_bytes)


def test_the_least_recently_used_make_room_unless_they_are_open(storage: Storage) -> None:
    artifacts = storage.artifacts
    for key in ("first", "second"):
        make(storage, key, 2)
        time.sleep(0.02)  # files' times come in ticks of the kernel's clock
    assert artifacts.open(THINGS, "first") is not None  # used after the second was made
    third = make(storage, "third", 2)
    assert folders(storage) == ["first", "third"]
    first = artifacts.open(THINGS, "first")
    with pytest.raises(NoRoomError, match=r"things that are in use take 0\.00 GiB"):
        make(storage, "fourth", 2)
    assert folders(storage) == ["first", "third"]
    assert first is not None
    del first
    assert make(storage, "fourth", 2) is not None
    assert folders(storage) == ["fourth", "third"]
    assert third is not None
    assert (third.path / "a.bin").read_bytes() == Maker().content
    assert artifacts.make(OWN, "fourth", Maker(), max_bytes=3 * NUM_BYTES) is not None  # each kind has its own room


def test_one_that_another_process_has_open_or_is_making_stays(storage: Storage, tmp_path: Path) -> None:
    def work() -> None:
        opened = storage.artifacts.make(THINGS, "open", Maker())

        def build(folder: Path | None) -> Mapping[str, Any]:
            assert folder is not None
            assert opened is not None
            ready.set()
            done.wait()
            return Maker()(folder)

        assert storage.artifacts.make(THINGS, "being made", build, reserve={"a.bin": NUM_BYTES}) is not None

    ready, done = _processes.Event(), _processes.Event()
    left = storage.root / "cache" / "things" / "left.partial"
    left.mkdir(parents=True)
    (left / "a.bin").write_bytes(b"half")
    other = _processes.Process(daemon=True, target=work)
    other.start()
    assert ready.wait(60)
    for key in ("first", "second"):
        assert make(storage, key, 2.5) is not None
    assert folders(storage) == ["being made.partial", "open", "second"]
    done.set()
    other.join(60)
    assert other.exitcode == 0
    assert folders(storage) == ["being made", "open", "second"]


def limited(storage: Storage, reserve: Mapping[str, int], num_bytes: int) -> None:
    """Where the kernel writes at most some bytes to a file, as a full disk does; ends with the number of builds."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    maker = Maker(bytes(num_bytes))
    try:
        storage.artifacts.make(THINGS, "key", maker, reserve=reserve)
    except OSError as error:
        os._exit(10 + maker.num_calls if error.strerror == "File too large" else 99)
    os._exit(maker.num_calls)


@pytest.mark.parametrize(
    ("reserve", "num_bytes", "expected"),
    [({"a.bin": 60_000}, 60_000, 10), ({}, 60_000, 11), ({"a.bin": 40_000}, 40_000, 1)],
    ids=["reserved", "while it is made", "enough"],
)
def test_a_full_disk_is_found_before_the_work_is_done_and_leaves_nothing(
    reserve: dict[str, int], num_bytes: int, expected: int, storage: Storage
) -> None:
    maker = _processes.Process(daemon=True, target=limited, args=(storage, reserve, num_bytes))
    maker.start()
    maker.join(60)
    assert maker.exitcode == expected
    assert folders(storage) == ([] if expected >= 10 else ["key"])
    assert storage.artifacts.make(THINGS, "key", Maker(), reserve=reserve) is not None


def test_reserved_files_are_as_large_before_the_work_begins(storage: Storage) -> None:
    seen: dict[str, int] = {}

    def build(folder: Path | None) -> Mapping[str, Any]:
        assert folder is not None
        seen.update({path.name: path.stat().st_blocks * 512 for path in folder.iterdir()})
        return Maker()(folder)

    assert storage.artifacts.make(THINGS, "key", build, reserve={"a.bin": 100_000, "b.bin": 0}) is not None
    assert seen["a.bin"] >= 100_000
    assert seen["b.bin"] == 0


def test_what_can_only_be_read_can_be_used(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    made = storage.artifacts.make(THINGS, "key", Maker())
    assert made is not None
    (made.path / USED).unlink()
    (made.path / USED).symlink_to(made.path / "nowhere" / USED)  # root may write to what it likes
    assert storage.artifacts.open(THINGS, "key") is not None
    assert caplog.text == ""


def test_a_place_that_takes_no_folders_is_an_error(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    (storage.root / "cache").mkdir()
    (storage.root / "cache" / "things").touch()
    with pytest.raises(OSError, match="exists"):
        storage.artifacts.make(THINGS, "key", Maker())
    assert caplog.text == ""
