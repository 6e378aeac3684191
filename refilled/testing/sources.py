"""What must hold of a source of images."""

from __future__ import annotations

import unittest
from pathlib import Path
from typing import ClassVar

import torch

from refilled.data.images import ImageSet, PartName
from refilled.data.sources import load_test, load_train
from refilled.storage import Storage


class SourceContract:
    """Inherit it, name a source, and pytest runs the checks.

        class TestMine(SourceContract):
            source = "mine"

    A source that lies in files is written by `make`; one whose test part is apart from the training part also
    says how to damage it.
    """

    source: ClassVar[str] = ""
    """As `--data` names it."""
    image_size: ClassVar[int] = 10
    """A size to ask for that is not the stored one."""

    def make(self, folder: Path) -> str:
        """The name of the source, its files written into an empty folder first."""
        return self.source

    def damage_test(self, folder: Path) -> bool:
        """Make the test part that `make` wrote unreadable; False where it has no files of its own."""
        return False

    def read(self, source: str, part: PartName, cache: Path, image_size: int | None = None) -> ImageSet:
        """A part of the source, kept in a cache folder."""
        load = load_train if part == "train" else load_test
        return load(source, storage=Storage.open(cache), image_size=image_size)

    # ----

    def test_images_are_bytes_and_labels_are_positions_of_class_names(self, tmp_path: Path) -> None:
        """uint8 [N, C, H, W], int64 [N]; a class may have no image."""
        source = self._made(tmp_path)
        for part in ("train", "test"):
            found = self.read(source, part, tmp_path / "cache")
            images, labels = found.images, found.labels
            assert images.dtype == torch.uint8, f"{part}: images must be uint8, got {images.dtype}"
            assert images.dim() == 4, f"{part}: images must be [N, C, H, W], got {tuple(images.shape)}"
            assert labels.dtype == torch.int64, f"{part}: labels must be int64, got {labels.dtype}"
            assert labels.shape == images.shape[:1], f"{part}: {len(labels)} labels for {len(images)} images"
            outside = [each for each in torch.unique(labels).tolist() if not 0 <= each < len(found.class_names)]
            assert not outside, f"{part}: labels {outside} are not in 0..{len(found.class_names) - 1}"

    def test_class_names_are_unique_and_those_of_both_parts(self, tmp_path: Path) -> None:
        """So a label means the same in both."""
        source = self._made(tmp_path)
        train, test = (self.read(source, part, tmp_path / "cache") for part in ("train", "test"))
        assert len(set(train.class_names)) == len(train.class_names), f"a name stands twice: {train.class_names}"
        assert train.class_names == test.class_names, f"{train.class_names} in train, {test.class_names} in test"
        assert train.images.shape[1] == test.images.shape[1], "train and test have different numbers of channels"

    def test_a_second_read_is_equal(self, tmp_path: Path) -> None:
        """From the cache, and read anew: pixels, labels, their order, and the digest, which is part of every run."""
        source = self._made(tmp_path)
        for part in ("train", "test"):
            first = self.read(source, part, tmp_path / "cache")
            for where in ("cache", "other"):
                again = self.read(source, part, tmp_path / where)
                what = f"{part}: a second read {'from the cache' if where == 'cache' else 'without a cache'}"
                assert torch.equal(again.images[:], first.images[:]), f"{what} has other images"
                assert torch.equal(again.labels, first.labels), f"{what} has other labels"
                assert again.class_names == first.class_names, f"{what} has other class names"
                assert again.digest == first.digest, f"{what} has digest {again.digest}, not {first.digest}"

    def test_digests_tell_contents_apart(self, tmp_path: Path) -> None:
        """Both parts, and two sizes."""
        source = self._made(tmp_path)
        train, test = (self.read(source, part, tmp_path / "cache") for part in ("train", "test"))
        resized = self.read(source, "train", tmp_path / "cache", self.image_size)
        digests = [train.digest, test.digest, resized.digest]
        assert len(set(digests)) == 3, f"train, test and train at {self.image_size} pixels share digests: {digests}"

    def test_image_size_is_honoured(self, tmp_path: Path) -> None:
        """Another size of the same images, in the same order."""
        source = self._made(tmp_path)
        for part in ("train", "test"):
            stored = self.read(source, part, tmp_path / "cache")
            resized = self.read(source, part, tmp_path / "cache", self.image_size)
            shape = tuple(resized.images.shape)
            wanted = (len(stored), stored.images.shape[1], self.image_size, self.image_size)
            assert shape == wanted, f"{part}: images of {self.image_size} pixels have shape {shape}, not {wanted}"
            assert torch.equal(resized.labels, stored.labels), f"{part}: another size has other labels"

    def test_the_test_part_is_not_touched_when_training_images_are_read(self, tmp_path: Path) -> None:
        """It may be damaged, and a search does not see it."""
        source = self._made(tmp_path)
        before = self.read(source, "train", tmp_path / "before")
        if not self.damage_test(tmp_path / "files"):
            raise unittest.SkipTest("the test part of this source has no files of its own")
        try:
            after = self.read(source, "train", tmp_path / "after")
        except Exception as error:  # whatever reading a damaged file raises
            raise AssertionError(f"with a damaged test part the training part cannot be read: {error}") from error
        assert after.digest == before.digest, "the training part changes with the test part"

    def _made(self, folder: Path) -> str:
        (folder / "files").mkdir(exist_ok=True)
        return self.make(folder / "files")
