"""Images that stay in their file give the numbers of those in memory, and take no more memory than they may."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import make_items, write_folder

from refilled import distributed
from refilled.config import RunConfig
from refilled.data import decode
from refilled.data.images import make_image_set
from refilled.data.pixels import StoredPixels, chosen, chunks, free_bytes
from refilled.data.sources import load_train
from refilled.errors import UserError
from refilled.execution import execute, run_folder
from refilled.identity import run_key
from refilled.presets import smoke
from refilled.storage import Storage
from refilled.storage.tensor_file import load_tensors
from refilled.tasks.classification import load_task
from refilled.testing.workers import run_on
from refilled.training.compute import Compute

TINY = 1e-7  # GiB: less than any set takes
CPU = Compute(torch.device("cpu"), "float32")


@pytest.fixture
def stored(tmp_path: Path) -> tuple[StoredPixels, torch.Tensor]:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 3, 5, 7), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    return StoredPixels(tmp_path / "images.npy"), torch.from_numpy(pixels)


def test_whatever_is_asked_for_is_what_memory_has(stored: tuple[StoredPixels, torch.Tensor]) -> None:
    file, memory = stored
    assert (file.shape, len(file), file.dim()) == (memory.shape, 50, 4)
    for index in (torch.tensor([7, 3, 3, 49, 8]), torch.arange(50), torch.empty(0, dtype=torch.int64), slice(4, 9)):
        assert torch.equal(file[index], memory[index])
    part = torch.tensor([40, 2, 17, 18])
    assert torch.equal(file.select(part)[torch.tensor([2, 0])], memory[torch.tensor([17, 40])])
    assert torch.equal(torch.cat(list(chunks(file))), memory)
    assert make_image_set(file, torch.arange(50) % 2, ["a", "b"]).digest == (
        make_image_set(memory, torch.arange(50) % 2, ["a", "b"]).digest
    )


def test_what_is_expected_is_what_is_given(stored: tuple[StoredPixels, torch.Tensor]) -> None:
    file, memory = stored
    first, second, third = torch.tensor([1, 5]), torch.tensor([9, 2, 9]), torch.tensor([1, 5])
    file.expect(first)
    file.expect(second)
    assert torch.equal(file[first], memory[first])
    file.expect(third)
    assert torch.equal(file[torch.tensor([0])], memory[:1])  # nobody expected it
    assert torch.equal(file[second], memory[second])
    assert torch.equal(file[third], memory[third])


def test_an_error_ahead_reaches_who_asks(stored: tuple[StoredPixels, torch.Tensor], tmp_path: Path) -> None:
    file, _ = stored
    with (tmp_path / "images.npy").open("r+b") as opened:
        opened.truncate(1000)
    last = torch.tensor([49])
    file.expect(last)
    with pytest.raises(OSError, match="is shorter than it was"):
        file[last]


def test_small_parts_of_a_large_file_are_read_into_memory(stored: tuple[StoredPixels, torch.Tensor]) -> None:
    file, memory = stored
    index = torch.tensor([3, 4])
    assert isinstance(chosen(file, index, 2 * 105), torch.Tensor)
    assert isinstance(chosen(file, index, 2 * 105 - 1), StoredPixels)
    assert chosen(memory, index, 0) is not memory


def of(run: RunConfig, gib: float | None) -> RunConfig:
    return dataclasses.replace(run, max_image_gib=gib)


@pytest.mark.parametrize("kind", ["shifts", "resized_crops"])
@pytest.mark.parametrize("mode", ["live", "cached"])
def test_a_run_is_equal_to_the_last_bit(kind: str, mode: str, tmp_path: Path) -> None:
    changes = {"views.kind": kind, "views.num_views": 3, "embedding_cache.mode": mode, "epochs": (1, 2)}
    run = dataclasses.replace(smoke().run, overlap=0.4, teacher_epochs=1).with_overrides(changes)
    states = []
    for name, gib in (("memory", None), ("file", TINY)):
        storage = Storage.open(tmp_path / name)
        task = load_task(of(run, gib), storage)
        assert isinstance(task.train.images, StoredPixels) == (gib is not None)
        execute(of(run, gib), storage, CPU)
        rows = run_folder(of(run, gib), storage).rows()
        weights = load_tensors(run_folder(of(run, gib), storage).model_path)["weights"]
        states.append(([(row.train_loss, row.val_accuracy) for row in rows], weights))
        assert run_key(of(run, gib), task.spaces, task.data_digest) == run_key(run, task.spaces, task.data_digest)
    assert states[0][0] == states[1][0]
    assert all(torch.equal(each, states[1][1][name]) for name, each in states[0][1].items())


def losses_of(storage: str, gib: float | None) -> list[float]:
    run = dataclasses.replace(smoke().run, overlap=0.4, method="student", epochs=(0, 2), max_image_gib=gib)
    place = Storage.open(f"{storage}-{gib}-{distributed.world_size()}")
    execute(run, place, CPU)
    return [row.train_loss for row in run_folder(run, place).rows()]


def test_on_two_workers_too(tmp_path: Path) -> None:
    in_memory, in_file = (run_on(2, losses_of, str(tmp_path / "s"), gib) for gib in (None, TINY))
    assert in_memory == in_file
    assert len(in_memory[0]) == 2


def test_more_than_memory_has_is_decoded_into_the_file(
    tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_folder(tmp_path / "photos", {"train": make_items("train")})
    expected = load_train(f"imagefolder:{path}", storage=storage)
    monkeypatch.setattr(decode, "free_bytes", lambda: 100)
    found = load_train(f"imagefolder:{path}", storage=Storage.open(tmp_path / "other"), max_bytes=100)
    assert isinstance(found.images, StoredPixels)
    assert found.digest == expected.digest
    assert torch.equal(found.images[:], expected.images[:])
    encoded = [(name, content) for _, name, content in make_items("train")]
    mapped = decode.decode_images(encoded, len(encoded), None, tmp_path / "pixels.npy")
    assert isinstance(mapped, np.memmap)  # and nothing as large in memory
    with pytest.raises(UserError, match="for which there is no room; set a smaller image_size"):
        decode.decode_images(encoded, len(encoded), None)


def test_no_process_is_kept_alive_and_free_memory_is_known(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((4, 1, 2, 2), np.uint8))
    program = (
        "import sys, torch; from pathlib import Path; from refilled.data.pixels import StoredPixels; "
        "pixels = StoredPixels(Path(sys.argv[1])); pixels.expect(torch.tensor([1])); print('end')"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "images.npy")], timeout=60, check=True)
    assert done.returncode == 0
    assert 2**20 < free_bytes() < 2**50
