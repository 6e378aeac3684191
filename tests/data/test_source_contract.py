"""The package's sources keep the contract that is shipped for another; broken ones are seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from contract_failures import checks_of, failures
from image_files import make_items, write_folder, write_shards, write_zip

from refilled.data.images import ImageSet, PartName
from refilled.testing import SourceContract


class TestDigits(SourceContract):
    source = "digits"


class TestFolder(SourceContract):
    def make(self, folder: Path) -> str:
        return f"imagefolder:{write_folder(folder, {part: make_items(part) for part in ('train', 'test')})}"

    def damage_test(self, folder: Path) -> bool:
        write_folder(folder, {"test": [(label, name, b"no image") for label, name, _ in make_items("test")]})
        return True


class TestZip(SourceContract):
    def make(self, folder: Path) -> str:
        parts = {part: make_items(part) for part in ("train", "test")}
        return f"imagefolder:{write_zip(folder / 'images.zip', parts)}"

    def damage_test(self, folder: Path) -> bool:
        broken = [(label, name, b"no image") for label, name, _ in make_items("test")]
        write_zip(folder / "images.zip", {"train": make_items("train"), "test": broken})
        return True


class TestShards(SourceContract):
    def make(self, folder: Path) -> str:
        return f"parquet:{write_shards(folder)}"

    def damage_test(self, folder: Path) -> bool:
        (folder / "test-00000-of-00001.parquet").write_bytes(b"not Parquet")
        return True


class _Broken(TestFolder):
    """Gives its images changed."""

    __test__ = False

    def read(self, source: str, part: PartName, cache: Path, image_size: int | None = None) -> ImageSet:
        return self.changed(super().read(source, part, cache, image_size), part, cache)

    def changed(self, images: ImageSet, part: PartName, cache: Path) -> ImageSet:
        return images


class ShufflesLabels(_Broken):
    """Another order whenever it is decoded."""

    def changed(self, images: ImageSet, part: PartName, cache: Path) -> ImageSet:
        seed = sum(cache.name.encode())
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        return dataclasses.replace(images, labels=images.labels[order])


class OtherDigestFromTheCache(_Broken):
    def changed(self, images: ImageSet, part: PartName, cache: Path) -> ImageSet:
        mark = cache / f"{part} seen"
        digest = f"{images.digest}-again" if mark.exists() else images.digest
        mark.touch()
        return dataclasses.replace(images, digest=digest)


class OneDigest(_Broken):
    def changed(self, images: ImageSet, part: PartName, cache: Path) -> ImageSet:
        return dataclasses.replace(images, digest="0")


class CountsLabelsFromOne(_Broken):
    def changed(self, images: ImageSet, part: PartName, cache: Path) -> ImageSet:
        return dataclasses.replace(images, labels=images.labels + 1)


class GivesFloats(_Broken):
    def changed(self, images: ImageSet, part: PartName, cache: Path) -> ImageSet:
        return dataclasses.replace(images, images=images.images / 255)


class OrdersTestClassesAnew(_Broken):
    def changed(self, images: ImageSet, part: PartName, cache: Path) -> ImageSet:
        names = images.class_names[::-1] if part == "test" else images.class_names
        return dataclasses.replace(images, class_names=names)


class IgnoresImageSize(TestFolder):
    __test__ = False

    def read(self, source: str, part: PartName, cache: Path, image_size: int | None = None) -> ImageSet:
        return super().read(source, part, cache)


class LooksAtTest(TestFolder):
    """Counts the classes of both parts."""

    __test__ = False

    def read(self, source: str, part: PartName, cache: Path, image_size: int | None = None) -> ImageSet:
        super().read(source, "test", cache)
        return super().read(source, part, cache, image_size)


AGAIN, BYTES = "a_second_read_is_equal", "images_are_bytes_and_labels_are_positions_of_class_names"
BROKEN: Mapping[type[SourceContract], set[str]] = {
    ShufflesLabels: {AGAIN},
    OtherDigestFromTheCache: {AGAIN},
    OneDigest: {"digests_tell_contents_apart"},
    CountsLabelsFromOne: {BYTES},
    GivesFloats: {BYTES},
    OrdersTestClassesAnew: {"class_names_are_unique_and_those_of_both_parts"},
    IgnoresImageSize: {"image_size_is_honoured", "digests_tell_contents_apart"},
    LooksAtTest: {"the_test_part_is_not_touched_when_training_images_are_read"},
}


@pytest.mark.parametrize("contract", BROKEN)
def test_what_breaks_it_is_seen(contract: type[SourceContract], tmp_path: Path) -> None:
    assert failures(contract, tmp_path).keys() == BROKEN[contract]


def test_every_check_is_seen_to_fail() -> None:
    assert set().union(*BROKEN.values()) == checks_of(SourceContract)
