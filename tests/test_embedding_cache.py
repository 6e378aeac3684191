"""The embedding cache: what it holds, when it is computed, and that it changes no number."""

from __future__ import annotations

import logging
import re
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from gloo_workers import run_workers
from outcomes import assert_same_outcome

from refilled.config import RunConfig
from refilled.data.views import Views
from refilled.embedding_cache import EMBEDDINGS, ROWS, EmbeddingCache, embedding_cache, is_cached
from refilled.errors import UserError
from refilled.execution import embed_once, execute, pretrain_once, run_folder
from refilled.shared_caches import epochs_with_teacher, pays
from refilled.storage import Storage
from refilled.storage.tensor_file import load_tensors, tensor_bytes
from refilled.tasks.classification import Task, load_task
from refilled.teacher import FrozenTeacher, teacher_folder
from refilled.training.compute import Compute

CACHED = {"embedding_cache.mode": "cached", "teacher_epochs": 2, "epochs": (2, 2)}
CPU = torch.device("cpu")


@pytest.fixture
def place(storage: Storage, tmp_path: Path) -> Storage:
    """A storage without embedding caches and runs, which shares teachers and images with all tests."""
    return new_place(storage, tmp_path / "place")


def new_place(storage: Storage, path: Path) -> Storage:
    for name in ("teachers", "cache/images", "cache/prototypes"):
        (storage.root / name).mkdir(parents=True, exist_ok=True)
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).symlink_to(storage.root / name)
    return Storage.open(path)


@dataclass
class Bench:
    """A configuration with its teacher, ready to be given a cache."""

    config: RunConfig
    task: Task
    teacher: FrozenTeacher
    storage: Storage
    compute: Compute

    def cache(self, *, is_wanted: bool | None = None) -> EmbeddingCache | None:
        return embedding_cache(self.config, self.task, self.teacher, self.storage, self.compute, is_wanted=is_wanted)

    @property
    def folder(self) -> Path:
        (folder,) = finished(self.storage)
        return folder


def bench(run: RunConfig, storage: Storage, **overrides: Any) -> Bench:
    run = run.with_overrides(CACHED | {name.replace("__", "."): value for name, value in overrides.items()})
    compute = Compute(CPU, run.precision)
    pretrain_once(run, storage, compute)
    task = load_task(run, storage)
    return Bench(run, task, FrozenTeacher.load(run, task, storage, compute), storage, compute)


def finished(storage: Storage) -> list[Path]:
    return sorted(each.parent for each in (storage.root / "cache" / EMBEDDINGS.name).glob("*/manifest.json"))


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_it_has_of_every_view_what_the_teacher_says(
    dtype: str, precision: str, digits_run: RunConfig, place: Storage
) -> None:
    """Equal to the last bit, though in other batches: on a CPU a forward pass of 2 images or more knows no others."""
    at = bench(digits_run, place, embedding_cache__dtype=dtype, precision=precision)
    views = Views(at.config.views)
    generator = torch.Generator().manual_seed(0)
    image_ids = torch.randint(0, len(at.task.train), (200,), generator=generator)
    view_ids = views.view_ids[torch.randint(0, 9, (200,), generator=generator)]
    rendered = views.render(at.task.train.images[image_ids], view_ids)
    images = at.compute.place_images(rendered, at.task.normalization)
    live = at.teacher.embed(images, image_ids, view_ids)
    at.teacher.cache = at.cache()
    kept = at.teacher.embed(torch.zeros(0), image_ids, view_ids)
    assert at.teacher.cache is not None
    assert kept.dtype == live.dtype == at.compute.dtype
    assert torch.equal(kept, live)
    unrounded = at.teacher.embed_live(images).to(kept.dtype)
    assert float(unrounded.std()) > 0.1
    assert torch.allclose(kept, unrounded, rtol=2**-11 if dtype == "float16" else 2**-24, atol=1e-7)
    assert torch.equal(kept, unrounded) == (dtype == "float32" and precision != "float64")


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("refilled", "float32"), ("refilled", "float16"), ("refilled_emb", "float16"), ("kd", "float16")],
)
def test_runs_with_and_without_it_have_the_same_numbers(
    method: str, dtype: str, digits_run: RunConfig, storage: Storage, tmp_path: Path, compute: Compute
) -> None:
    """Exactly, in every row of both stages and in the student's weights; `kd` asks the teacher's own head besides."""
    changes = {"method": method, "embedding_cache.dtype": dtype, "classifier.instance_weight": "own_head"}
    changes |= {"overlap": 1.0} if method == "kd" else {}
    folders = {}
    for mode in ("cached", "live"):
        run = digits_run.with_overrides(CACHED | changes | {"embedding_cache.mode": mode})
        where = new_place(storage, tmp_path / mode)
        execute(run, where, compute)
        assert len(finished(where)) == (mode == "cached")
        folders[mode] = run_folder(run, where)
    assert_same_outcome(folders["cached"], folders["live"])


def test_rounding_to_float16_moves_the_first_losses_by_less_than_a_hundredth(
    digits_run: RunConfig, storage: Storage, tmp_path: Path, compute: Compute
) -> None:
    """Seen: 4e-4 at most in four epochs.

    Training is chaotic, so over 30 epochs two such runs drift apart like any two whose last bits differ: losses by up
    to 1 in 100, accuracies mostly by up to four images of 135. That is why a run without a cache rounds, too.
    """
    rows = {}
    for dtype in ("float16", "float32"):
        run = digits_run.with_overrides(CACHED | {"embedding_cache.dtype": dtype})
        where = new_place(storage, tmp_path / dtype)
        execute(run, where, compute)
        rows[dtype] = run_folder(run, where).rows()
    for half, single in zip(rows["float16"], rows["float32"], strict=True):
        assert half.train_loss != single.train_loss
        assert half.train_loss == pytest.approx(single.train_loss, rel=1e-2)


def test_later_runs_open_it_and_do_not_compute_it(
    digits_run: RunConfig, place: Storage, compute: Compute, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "refilled.embedding_cache")
    at = bench(digits_run, place)
    assert not is_cached(at.config, place)
    embed_once(at.config, place, compute)
    assert is_cached(at.config, place)
    assert re.fullmatch(r"Embedding cache is computed: 4896 rows, 0\.001 GiB in \d+\.\d s\.", caplog.messages[-1])
    caplog.clear()
    computed = (at.folder / ROWS).stat()
    for changes in (
        {"seed": 1},
        {"student": "convnet-16", "method": "refilled_lkd"},
        {"embedding_cache.mode": "auto"},  # for which one of its own would not pay
    ):
        execute(at.config.with_overrides(changes | {"optimizer.momentum": 0.8}), place, compute)
    assert (at.folder / ROWS).stat().st_ino == computed.st_ino
    assert caplog.text == ""


def test_it_is_found_by_teacher_images_views_and_types(digits_run: RunConfig, place: Storage) -> None:
    same = {"seed": 3, "student": "convnet-4", "embedding.temperature": 2.0, "embedding_cache.max_gib": 1.0}
    for changes in ({}, same):
        at = bench(digits_run, place, **changes)
        at.teacher.identity = "one and the same"
        at.cache()
        assert len(finished(place)) == 1
    others: list[dict[str, Any]] = [
        {"split_seed": 1},  # as many images, but others
        {"views.num_views": 4},
        {"views.padding": 2, "views.num_views": 9},
        {"embedding_cache.dtype": "float32"},
        {"precision": "bfloat16"},
    ]
    for number, changes in enumerate(others):
        at = bench(digits_run, place, **changes)
        at.teacher.identity = "one and the same"
        at.cache()
        assert len(finished(place)) == 2 + number
    bench(digits_run, place).cache()
    assert len(finished(place)) == 2 + len(others)


def test_identity_of_a_teacher_is_its_configuration_and_its_weights(
    digits_run: RunConfig, storage: Storage, place: Storage
) -> None:
    at = bench(digits_run, place)
    assert bench(digits_run, place, student="convnet-4").teacher.identity == at.teacher.identity
    (place.root / "teachers").unlink()
    model = teacher_folder(at.config, place).model_path
    model.parent.mkdir(parents=True)
    original = load_tensors(teacher_folder(at.config, storage).model_path)
    original["weights"]["bn3.weight"] *= 1.5  # as if it had been trained again, elsewhere
    model.write_bytes(tensor_bytes(original))
    again = FrozenTeacher.load(at.config, at.task, place, at.compute)
    assert again.identity != at.teacher.identity


def test_a_view_that_is_not_in_use_has_no_row(digits_run: RunConfig, place: Storage) -> None:
    at = bench(digits_run, place, views__num_views=4)
    cache = at.cache()
    assert cache is not None
    missing = sorted(set(range(9)) - set(Views(at.config.views).view_ids.tolist()))
    for view in (*missing, 9):
        with pytest.raises(IndexError):
            cache.embed(torch.tensor([len(at.task.train) - 1]), torch.tensor([view]))
    with pytest.raises(IndexError):
        cache.embed(torch.tensor([len(at.task.train)]), Views(at.config.views).view_ids[:1])


def test_a_damaged_one_is_computed_again(
    digits_run: RunConfig, place: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    at = bench(digits_run, place)
    assert at.cache() is not None
    rows = at.folder / ROWS
    whole = rows.read_bytes()
    rows.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert at.cache() is not None
    assert rows.read_bytes() == whole
    assert [each.levelname for each in caplog.records].count("WARNING") == 1


@pytest.mark.parametrize(
    ("num_views", "epochs", "expected"), [(9, 8, False), (9, 9, False), (9, 10, True), (1, 2, True)]
)
def test_it_pays_where_it_takes_fewer_passes_than_the_runs_without(
    num_views: int, epochs: int, expected: bool, digits_run: RunConfig
) -> None:
    run = digits_run.with_overrides({"views.num_views": num_views})
    assert pays(run, epochs) is expected
    assert pays(run.with_overrides({"embedding_cache.mode": "cached"}), epochs)
    assert not pays(run.with_overrides({"embedding_cache.mode": "live"}), epochs)


def test_epochs_that_ask_the_teacher(digits_run: RunConfig) -> None:
    expected = {"refilled": 7, "refilled_minus": 7, "refilled_emb": 3, "refilled_lkd": 4, "student": 0, "fitnet": 0}
    for method, epochs in expected.items():
        assert epochs_with_teacher(digits_run.with_overrides({"method": method, "epochs": (3, 4)})) == epochs


def test_auto_computes_what_pays_for_the_run_alone_or_is_wanted_and_uses_what_is_there(
    digits_run: RunConfig, place: Storage
) -> None:
    at = bench(digits_run, place, embedding_cache__mode="auto")  # 4 epochs, 9 views
    assert at.cache() is None
    assert finished(place) == []
    assert at.cache(is_wanted=True) is not None
    assert at.cache() is not None
    assert bench(digits_run, place, embedding_cache__mode="live").cache(is_wanted=True) is None
    longer = bench(digits_run, place, embedding_cache__mode="auto", epochs=(5, 5), embedding_cache__dtype="float32")
    assert longer.cache() is not None


def test_auto_goes_on_without_one_that_others_are_computing(
    digits_run: RunConfig, place: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "refilled.embedding_cache")
    at = bench(digits_run, place, embedding_cache__mode="auto", epochs=(5, 5))
    assert at.cache() is not None
    path = at.folder
    path.rename(path.with_name("elsewhere"))
    with place.exclusive(path):
        started_s = time.monotonic()
        assert at.cache() is None
        assert time.monotonic() - started_s < 5  # it does not wait
    assert "is being computed elsewhere" in caplog.messages[-1]
    assert at.cache() is not None


def test_one_larger_than_all_may_be(digits_run: RunConfig, place: Storage, caplog: pytest.LogCaptureFixture) -> None:
    """The size that the sentence asks for is enough."""
    caplog.set_level(logging.INFO, "refilled.embedding_cache")
    sentence = r"embedding_cache.max_gib must be at least 0.002 for 544 images x 9 views x 128"
    with pytest.raises(UserError, match=sentence) as error:
        bench(digits_run, place, embedding_cache__max_gib=1e-4).cache()
    at = bench(digits_run, place, embedding_cache__max_gib=1e-4, embedding_cache__mode="auto")
    assert at.cache(is_wanted=True) is None
    assert f"{str(error.value)[:-1]}: the teacher runs in every step." in caplog.text
    assert bench(digits_run, place, embedding_cache__max_gib=0.002).cache() is not None


def test_where_others_take_the_room_the_run_goes_on_without(
    digits_run: RunConfig, place: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    room = {"embedding_cache__max_gib": 1.5 * 544 * 9 * 128 * 2 / 2**30}  # one of 1.2 MiB, with its manifest
    first, second = (bench(digits_run, place, split_seed=seed, **room) for seed in range(2))
    used = first.cache()
    assert used is not None
    assert second.cache() is None
    assert "cannot be kept (embeddings that are in use take 0.00 GiB): the teacher runs in every step." in caplog.text
    kept = first.folder
    del used
    assert second.cache() is not None
    assert second.folder != kept


def _execute_with_small_files(config: dict[str, Any], location: str) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    run = RunConfig.from_dict(config)
    execute(run, Storage.open(location), Compute(CPU, run.precision))


def test_a_full_disk_costs_the_cache_and_not_the_run(
    digits_run: RunConfig, storage: Storage, place: Storage, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    at = bench(digits_run, place)
    process = mp.get_context("spawn").Process(
        target=_execute_with_small_files, args=(at.config.to_dict(), place.location)
    )
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0
    sentence = r"Embedding cache \w{16} cannot be kept \(File too large\): the teacher runs in every step\."
    assert re.search(sentence, capfd.readouterr().err)
    assert finished(place) == list((place.root / "cache").glob("*/*.partial")) == []
    where = new_place(storage, tmp_path / "roomy")
    execute(at.config, where, at.compute)
    assert len(finished(where)) == 1
    assert_same_outcome(run_folder(at.config, place), run_folder(at.config, where))


def _execute_in_group(rank: int, folder: str, config: dict[str, Any], location: str) -> None:
    execute(RunConfig.from_dict(config), Storage.open(location), Compute(CPU, "float32"))


@pytest.mark.parametrize("num_workers", [2, 3])
def test_a_group_computes_the_bytes_of_one_worker(
    num_workers: int, digits_run: RunConfig, storage: Storage, place: Storage, tmp_path: Path
) -> None:
    at = bench(digits_run, place, views__padding=2)  # 25 views: 27 batches
    assert at.cache() is not None
    where = new_place(storage, tmp_path / "group")
    run_workers(_execute_in_group, tmp_path, num_workers, at.config.to_dict(), where.location)
    (other,) = finished(where)
    assert other.name == at.folder.name
    assert (other / ROWS).read_bytes() == (at.folder / ROWS).read_bytes()


def test_a_teacher_beyond_the_range_of_float16_is_one_sentence(digits_run: RunConfig, place: Storage) -> None:
    at = bench(digits_run, place)
    at.teacher._model.bn3.weight.mul_(1e6)  # type: ignore[union-attr, operator]
    with pytest.raises(UserError, match=r"embedding_cache\.dtype must be float32, because float16 cannot hold"):
        at.cache()
    assert not any((place.root / "cache" / EMBEDDINGS.name).glob("*.partial"))
    wide = bench(digits_run, place, embedding_cache__dtype="float32")
    wide.teacher._model.bn3.weight.mul_(1e6)  # type: ignore[union-attr, operator]
    assert wide.cache() is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fits", [True, False])
def test_on_a_gpu(fits: bool, digits_run: RunConfig, place: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    at = bench(digits_run, place)
    on_cpu = at.cache()
    if not fits:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    at.compute = Compute(torch.device("cuda"), "float32")
    on_gpu = at.cache()
    assert on_cpu is not None
    assert on_gpu is not None
    assert (on_gpu._device_rows is not None) is fits
    image_ids = torch.arange(len(at.task.train))
    for epoch in range(3):
        view_ids = Views(at.config.views).draw(image_ids, seed=0, epoch=epoch)
        found = on_gpu.embed(image_ids.cuda(), view_ids.cuda())
        assert torch.equal(found.cpu(), on_cpu.embed(image_ids, view_ids))
