"""Source cifar100 through torchvision's own download, from an archive of the official layout on this machine."""

from __future__ import annotations

import functools
import hashlib
import pickle
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR100

from refilled.data import cifar100
from refilled.data.sources import load_test, load_train
from refilled.errors import UserError
from refilled.storage import Storage
from refilled.testing import SourceContract

NAMES = [f"class {index:02}" for index in range(100)]


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, object]]]:
    """An archive as torchvision expects it, served by HTTP; only address and checksums differ from the official one."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    random = np.random.default_rng(0)
    content: dict[str, dict[str, object]] = {"meta": {"fine_label_names": NAMES}}
    for part, count in (("train", 6), ("test", 4)):
        pixels = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        content[part] = {"data": pixels, "fine_labels": random.integers(0, 100, count).tolist()}
    for name, value in content.items():
        (folder / name).write_bytes(pickle.dumps(value))
    packed = tmp_path / "cifar-100-python.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(folder, "cifar-100-python")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(CIFAR100, "url", f"http://127.0.0.1:{server.server_port}/{packed.name}")
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5(packed))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5(folder / "train")]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5(folder / "test")]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5(folder / "meta")})
    yield content
    server.shutdown()
    thread.join()
    server.server_close()


class TestContract(SourceContract):
    source = "cifar100"

    @pytest.fixture(autouse=True)
    def served(self, archive: dict[str, dict[str, object]]) -> None:
        """The archive can be downloaded."""


def test_both_parts_are_what_the_archive_holds(archive: dict[str, dict[str, object]], tmp_path: Path) -> None:
    for part, load in (("train", load_train), ("test", load_test)):
        read = load("cifar100", storage=Storage.open(tmp_path))
        assert read.class_names == tuple(NAMES)
        assert read.labels.tolist() == archive[part]["fine_labels"]
        assert np.array_equal(read.images.numpy().reshape(len(read), -1), archive[part]["data"])


def test_decoded_images_need_no_download(
    archive: dict[str, dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_train("cifar100", storage=Storage.open(tmp_path))
    (tmp_path / "cache/downloads").rename(tmp_path / "gone")
    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:9/nothing")
    assert torch.equal(first.images, load_train("cifar100", storage=Storage.open(tmp_path)).images)


def test_image_size(archive: dict[str, dict[str, object]], tmp_path: Path) -> None:
    assert load_train("cifar100", storage=Storage.open(tmp_path), image_size=16).images.shape == (6, 3, 16, 16)


@pytest.mark.parametrize("change", ["no server", "wrong checksum"])
def test_a_failed_download_says_what_to_do(
    archive: dict[str, dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    if change == "no server":
        monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:9/nothing")
    else:
        monkeypatch.setattr(CIFAR100, "tgz_md5", "0" * 32)
    with pytest.raises(UserError, match=r"Source cifar100 could not be downloaded .*parquet:PATH") as error:
        load_train("cifar100", storage=Storage.open(tmp_path))
    assert "\n" not in str(error.value)
    assert not [entry for entry in (tmp_path / "cache/images").iterdir() if entry.is_dir()]


def test_the_checksum_is_torchvisions() -> None:
    assert CIFAR100.tgz_md5 == cifar100.ARCHIVE_MD5
