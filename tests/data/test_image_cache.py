"""The cache of decoded images: decoded once, never half-written, never trusted when damaged."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import CLASSES, make_items, write_folder, write_parquet

import refilled
from refilled.data.sources import load_test, load_train
from refilled.errors import UserError
from refilled.storage import Storage

# What a child does: wait for the word, load, and say what it saw. `hold` stops it where a test wants to kill it.
CHILD = """
import logging, sys, time
from pathlib import Path
import refilled.data.sources as sources
from refilled.storage import Storage

logging.basicConfig(level=logging.INFO, stream=sys.stdout)
source, folder, hold = sys.argv[1], Path(sys.argv[2]), sys.argv[3]

def stop(*arguments):
    print("held", flush=True)
    time.sleep(60)

if hold == "decoding":
    import refilled.data.decode
    refilled.data.decode._decode_chunk = stop
if hold == "sealing":
    import refilled.storage.artifacts
    refilled.storage.artifacts.seal = stop
print("ready", flush=True)
while not (folder / "go").exists():
    time.sleep(0.001)
print(sources.load_train(source, storage=Storage.open(folder), image_size=64).digest, flush=True)
"""


def start_child(source: str, folder: Path, hold: str = "nowhere") -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(Path(refilled.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, source, str(folder), hold]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def wait_for(child: subprocess.Popen[str], word: str) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == word:
            return
    raise AssertionError(f"the child ended without saying {word!r}")


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "cache" / "images").iterdir() if path.is_dir())


@pytest.fixture
def source(tmp_path: Path) -> str:
    parts = {"train": make_items("train", per_class=50, size=(80, 70)), "test": make_items("test", size=(80, 70))}
    return f"imagefolder:{write_folder(tmp_path / 'images', parts)}"


def test_the_second_load_reads_what_the_first_wrote(
    source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first, second = (
        load_train(source, storage=Storage.open(tmp_path / "cache")),
        load_train(source, storage=Storage.open(tmp_path / "cache")),
    )
    assert caplog.text.count("Decoded 150 train images") == 1
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)
    assert first.digest == second.digest
    assert first.class_names == second.class_names == CLASSES
    assert len(entries(tmp_path / "cache")) == 1


def test_writing_to_the_images_does_not_write_to_the_cache(source: str, tmp_path: Path) -> None:
    first = load_train(source, storage=Storage.open(tmp_path / "cache"))
    (entry,) = entries(tmp_path / "cache")
    before = (entry / "images.npy").read_bytes()
    first.images.fill_(0)
    assert (entry / "images.npy").read_bytes() == before


def test_every_content_part_and_size_has_its_own_entry(source: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = load_train(source, storage=Storage.open(cache))
    load_test(source, storage=Storage.open(cache))
    load_train(source, storage=Storage.open(cache), image_size=8)
    assert len(entries(cache)) == 3
    one = tmp_path / "images/train/one"
    (one / "0.png").write_bytes((one / "3.png").read_bytes())
    changed = load_train(source, storage=Storage.open(cache))
    assert changed.digest != first.digest
    assert len(entries(cache)) == 4
    (one / "3.png").rename(one / "9.png")  # the order changes, and so does what is at a place
    load_train(source, storage=Storage.open(cache))
    assert len(entries(cache)) == 5
    (one / "9.png").rename(tmp_path / "images/train/two/-first.png")  # the order stays, a label changes
    load_train(source, storage=Storage.open(cache))
    assert len(entries(cache)) == 6


def test_every_content_of_a_shard_has_its_own_entry(tmp_path: Path) -> None:
    items = make_items("train")
    source = f"parquet:{write_parquet(tmp_path / 'train.parquet', items)}"
    first = load_train(source, storage=Storage.open(tmp_path / "cache"))
    write_parquet(tmp_path / "train.parquet", items[::-1])
    assert load_train(source, storage=Storage.open(tmp_path / "cache")).labels.tolist() == first.labels.tolist()[::-1]
    assert len(entries(tmp_path / "cache")) == 2


def cut(name: str) -> Callable[[Path], None]:
    def change(entry: Path) -> None:
        content = (entry / name).read_bytes()
        (entry / name).write_bytes(content[: len(content) // 2])

    return change


def flip_pixel(entry: Path) -> None:
    images = np.load(entry / "images.npy", mmap_mode="r+")
    images[3, 1, 2, 2] ^= 1
    images.flush()


def swap_labels(entry: Path) -> None:
    labels = np.load(entry / "labels.npy")
    np.save(entry / "labels.npy", labels[::-1])


def rename_class(entry: Path) -> None:
    manifest = json.loads((entry / "manifest.json").read_text())
    manifest["about"]["class_names"] = ["x", "y", "z"]
    (entry / "manifest.json").write_text(json.dumps(manifest))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "pixels cut": cut("images.npy"),
    "labels cut": cut("labels.npy"),
    "manifest cut": cut("manifest.json"),
    "header": lambda entry: (entry / "images.npy").write_bytes(b"\x93NUMPY\x01\x00\xff\xffgarbage"),
    "emptied": lambda entry: (entry / "images.npy").write_bytes(b""),
    "missing": lambda entry: (entry / "labels.npy").unlink(),
    "pickled": lambda entry: np.save(entry / "labels.npy", np.array([{}, None]), allow_pickle=True),
    "manifest of another kind": lambda entry: (entry / "manifest.json").write_text("[1]"),
    "pixel": flip_pixel,
    "labels": swap_labels,
    "class name": rename_class,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_dropped_with_a_warning_and_rebuilt(
    source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    cache = tmp_path / "cache"
    digest = load_train(source, storage=Storage.open(cache), image_size=8).digest
    (entry,) = entries(cache)
    damage(entry)
    again = load_train(source, storage=Storage.open(cache), image_size=8)
    assert again.digest == digest
    assert again.class_names == CLASSES
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(entry) in caplog.text
    caplog.clear()
    assert load_train(source, storage=Storage.open(cache), image_size=8).digest == digest
    assert not caplog.records


def test_two_processes_at_once_decode_once(source: str, tmp_path: Path) -> None:
    children = [start_child(source, tmp_path / "cache") for _ in range(2)]
    for child in children:
        wait_for(child, "ready")
    (tmp_path / "cache/go").touch()
    outputs = [child.communicate(timeout=60)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert "".join(outputs).count("Decoded 150 train images") == 1
    assert len({output.split()[-1] for output in outputs}) == 1
    assert len(entries(tmp_path / "cache")) == 1


@pytest.mark.parametrize("hold", ["decoding", "sealing"])
def test_a_killed_process_leaves_nothing_that_is_read(
    source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, hold: str
) -> None:
    cache = tmp_path / "cache"
    child = start_child(source, cache, hold)
    (cache / "go").touch()
    wait_for(child, "held")
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=10)
    (left,) = entries(cache)
    assert left.suffix == ".partial"
    if hold == "sealing":  # killed after writing everything but before the entry has its name
        cut("images.npy")(left)
    started = time.monotonic()
    read = load_train(source, storage=Storage.open(cache), image_size=64)
    assert time.monotonic() - started < 10  # the lock died with its owner
    assert read.digest == load_train(source, storage=Storage.open(tmp_path / "other"), image_size=64).digest
    assert [path.suffix for path in entries(cache)] == [""]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_cache_folder_that_cannot_be_written(source: str, tmp_path: Path) -> None:
    storage = Storage.open(tmp_path / "storage")
    (storage.root / "cache").write_text("not a folder")
    with pytest.raises(UserError, match=r"Cache folder .*storage cannot be written \(") as error:
        load_train(source, storage=storage)
    assert "\n" not in str(error.value)


def test_a_disk_without_room_leaves_nothing_behind(source: str, tmp_path: Path) -> None:
    """A limit on file size fails a write in the middle, as a full disk does."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(
            UserError, match=r"Cache folder .*cache cannot be written \(\d+ requested and \d+ written\)"
        ) as error:
            load_train(source, storage=Storage.open(tmp_path / "cache"), image_size=64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(error.value)
    assert entries(tmp_path / "cache") == []
    assert len(load_train(source, storage=Storage.open(tmp_path / "cache"), image_size=64)) == 150
