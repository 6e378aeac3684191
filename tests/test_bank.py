from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_workers import leave_group

from refilled.config import BankConfig, RunConfig
from refilled.data.views import Views
from refilled.embedding_cache.bank import Bank, bank_for
from refilled.embedding_cache.rows import META, ROWS, USED, partial_of
from refilled.embedding_cache.site import bank_pays, epochs_with_teacher
from refilled.errors import UserError
from refilled.execution import cache_of, execute, pretrain_once, run_folder
from refilled.identity import run_key
from refilled.storage.store import only_here
from refilled.storage.tensor_file import load_tensors, save_tensors
from refilled.tasks.classification import Task, load_task
from refilled.teacher import FrozenTeacher, teacher_folder
from refilled.training.compute import Compute

BANK = {"bank.mode": "bank", "teacher_epochs": 2, "epochs": (2, 2)}
TIMES = ("images_per_second", "epoch_s")


@pytest.fixture
def place(storage: Path, tmp_path: Path) -> Path:
    """A storage folder without banks and runs, which shares teachers and decoded images with all tests."""
    return _new_place(storage, tmp_path / "place")


def _new_place(storage: Path, path: Path) -> Path:
    path.mkdir()
    for name in ("teachers", "cache", "prototypes"):
        (storage / name).mkdir(exist_ok=True)
        (path / name).symlink_to(storage / name)
    return path


@dataclass
class Bench:
    """A configuration with its teacher, ready to be given a bank."""

    config: RunConfig
    task: Task
    teacher: FrozenTeacher
    storage: Path
    compute: Compute

    def bank(self, num_sharing_runs: int = 1) -> Bank | None:
        return bank_for(self.config, self.task, self.teacher, self.storage, self.compute, num_sharing_runs)

    @property
    def folder(self) -> Path:
        (folder,) = finished(self.storage)
        return folder


def bench(run: RunConfig, storage: Path, **overrides: Any) -> Bench:
    dotted = {name.replace("__", "."): value for name, value in overrides.items()}
    run = run.with_overrides(BANK | dotted)
    compute = Compute(torch.device("cpu"), run.precision)
    pretrain_once(run, storage, compute)
    task = load_task(run, cache_of(storage))
    return Bench(run, task, FrozenTeacher.load(run, task, storage, compute), storage, compute)


def finished(storage: Path) -> list[Path]:
    banks = storage / "banks"
    return sorted(each for each in banks.glob("*") if each.is_dir() and each.suffix != ".partial")


def rows_of(run: RunConfig, storage: Path) -> list[dict[str, Any]]:
    rows = run_folder(run, storage).rows()
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_bank_says_of_every_view_what_the_teacher_says(
    dtype: str, precision: str, digits_run: RunConfig, place: Path
) -> None:
    """Equal to the last bit, though in other batches: on a CPU a forward pass of 2 images or more knows no others."""
    at = bench(digits_run, place, bank__dtype=dtype, precision=precision)
    views = Views(at.config.views)
    generator = torch.Generator().manual_seed(0)
    image_ids = torch.randint(0, len(at.task.train), (200,), generator=generator)
    view_ids = views.view_ids[torch.randint(0, 9, (200,), generator=generator)]
    rendered = views.render(at.task.train.images[image_ids], view_ids)
    images = at.compute.place_images(rendered, at.task.normalization)
    live = at.teacher.embed(images, image_ids, view_ids)
    at.teacher.bank = at.bank()
    kept = at.teacher.embed(torch.zeros(0), image_ids, view_ids)
    assert at.teacher.bank is not None
    assert kept.dtype == live.dtype == at.compute.dtype
    assert torch.equal(kept, live)
    unrounded = at.teacher.embed_live(images).to(kept.dtype)
    assert float(unrounded.std()) > 0.1
    assert torch.allclose(kept, unrounded, rtol=2**-11 if dtype == "float16" else 2**-24, atol=1e-7)
    assert torch.equal(kept, unrounded) == (dtype == "float32" and precision != "float64")


@pytest.mark.parametrize(
    ("method", "dtype"), [("refilled", "float32"), ("refilled", "float16"), ("refilled_emb", "float16")]
)
def test_runs_with_and_without_a_bank_have_the_same_numbers(
    method: Any, dtype: str, digits_run: RunConfig, storage: Path, tmp_path: Path, compute: Compute
) -> None:
    """Exactly, in every row of both stages and in the student's weights, for both types of the bank."""
    changes = BANK | {"method": method, "bank.dtype": dtype, "classifier.instance_weight": "own_head"}
    weights = []
    runs = {mode: digits_run.with_overrides(changes | {"bank.mode": mode}) for mode in ("bank", "live")}
    for mode, run in runs.items():
        where = _new_place(storage, tmp_path / mode)
        execute(run, where, compute)
        assert len(finished(where)) == (mode == "bank")
        weights.append(torch.load(run_folder(run, where).path / "model.pt")["weights"])
    assert rows_of(runs["bank"], tmp_path / "bank") == rows_of(runs["live"], tmp_path / "live")
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_rounding_to_float16_moves_the_first_losses_by_less_than_a_hundredth(
    digits_run: RunConfig, storage: Path, tmp_path: Path, compute: Compute
) -> None:
    """Seen: 4e-4 at most in four epochs.

    Training is chaotic, so over 30 epochs two such runs drift apart like any two whose last bits differ: losses by up
    to 1 in 100, accuracies mostly by up to four images of 135. That is why a run without a bank rounds, too.
    """
    rows = {}
    for dtype in ("float16", "float32"):
        run = digits_run.with_overrides(BANK | {"bank.dtype": dtype})
        execute(run, _new_place(storage, tmp_path / dtype), compute)
        rows[dtype] = rows_of(run, tmp_path / dtype)
    for half, single in zip(rows["float16"], rows["float32"], strict=True):
        assert half["train_loss"] != single["train_loss"]
        assert half["train_loss"] == pytest.approx(single["train_loss"], rel=1e-2)


def test_distillation_from_the_teachers_own_head_takes_embeddings_from_the_bank(
    digits_run: RunConfig, storage: Path, tmp_path: Path, compute: Compute
) -> None:
    rows = []
    for mode in ("bank", "live"):
        run = digits_run.with_overrides(BANK | {"bank.mode": mode, "method": "kd", "overlap": 1.0})
        execute(run, _new_place(storage, tmp_path / mode), compute)
        rows.append(rows_of(run, tmp_path / mode))
    assert rows[0] == rows[1]


def test_later_runs_open_the_bank_and_do_not_build_it(
    digits_run: RunConfig, place: Path, compute: Compute, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "refilled.embedding_cache.site")
    at = bench(digits_run, place)
    execute(at.config, place, compute)
    assert re.findall(r"Bank \w{16} is built: 0\.\d+ GiB in \d", caplog.text)
    caplog.clear()
    built = (at.folder / ROWS).stat()
    os.utime(at.folder / USED, (1, 1))
    for changes in ({"seed": 1}, {"student": "convnet-16", "method": "refilled_lkd"}, {"bank.mode": "auto"}):
        execute(at.config.with_overrides(changes | {"optimizer.momentum": 0.8}), place, compute)
    assert (at.folder / ROWS).stat().st_mtime_ns == built.st_mtime_ns
    assert (at.folder / ROWS).stat().st_ino == built.st_ino
    assert (at.folder / USED).stat().st_mtime > 1
    assert caplog.text == ""


def test_bank_is_found_by_teacher_images_views_and_types(digits_run: RunConfig, place: Path) -> None:
    for changes in ({}, {"seed": 3, "student": "convnet-4", "embedding.temperature": 2.0, "bank.max_gib": 1.0}):
        at = bench(digits_run, place, **changes)
        at.teacher.identity = "one and the same"
        at.bank()
        assert len(finished(place)) == 1
    others: list[dict[str, Any]] = [
        {"split_seed": 1},  # as many images, but others
        {"views.num_views": 4},
        {"views.padding": 2, "views.num_views": 9},
        {"bank.dtype": "float32"},
        {"precision": "bfloat16"},
    ]
    for number, changes in enumerate(others):
        at = bench(digits_run, place, **changes)
        at.teacher.identity = "one and the same"
        at.bank()
        assert len(finished(place)) == 2 + number
    bench(digits_run, place).bank()
    assert len(finished(place)) == 2 + len(others)


def test_identity_of_a_teacher_is_its_configuration_and_its_weights(
    digits_run: RunConfig, storage: Path, place: Path
) -> None:
    at = bench(digits_run, place)
    assert bench(digits_run, place, student="convnet-4").teacher.identity == at.teacher.identity
    (place / "teachers").unlink()
    model = teacher_folder(at.config, place).path / "model.pt"
    model.parent.mkdir(parents=True)
    original = load_tensors(teacher_folder(at.config, storage).path / "model.pt")
    original["weights"]["bn3.weight"] *= 1.5  # as if it had been trained again, elsewhere
    save_tensors(model, original)
    again = FrozenTeacher.load(at.config, at.task, place, at.compute)
    assert again.identity != at.teacher.identity


def test_view_that_is_not_in_use_has_no_row(digits_run: RunConfig, place: Path) -> None:
    at = bench(digits_run, place, views__num_views=4)
    bank = at.bank()
    assert bank is not None
    missing = sorted(set(range(9)) - set(Views(at.config.views).view_ids.tolist()))
    for view in (*missing, 9):
        with pytest.raises(IndexError):
            bank.embed(torch.tensor([len(at.task.train) - 1]), torch.tensor([view]))
    with pytest.raises(IndexError):
        bank.embed(torch.tensor([len(at.task.train)]), Views(at.config.views).view_ids[:1])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("flipped byte", "embeddings.bin does not have the checksum that meta.json says"),
        ("truncated", "embeddings.bin has 1253374 bytes instead of 1253376"),
        ("no meta", "meta.json is missing"),
        ("no rows", "embeddings.bin is missing"),
        ("meta not JSON", "meta.json is not JSON"),
        ("other shape", "meta.json does not describe [544, 9, 128] numbers of float16"),
    ],
)
def test_damaged_bank_is_built_again(
    damage: str, reason: str, digits_run: RunConfig, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    at = bench(digits_run, place)
    assert at.bank() is not None
    rows, meta = at.folder / ROWS, at.folder / META
    whole = rows.read_bytes()
    if damage == "flipped byte":
        rows.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "truncated":
        rows.write_bytes(whole[:-2])
    elif damage in ("no meta", "no rows"):
        (meta if damage == "no meta" else rows).unlink()
    elif damage == "meta not JSON":
        meta.write_text("{")
    else:
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"shape": [1, 2, 3]}))
    assert at.bank() is not None
    assert rows.read_bytes() == whole
    assert [each.levelname for each in caplog.records].count("WARNING") == 1
    assert f"is damaged and is not used: {reason}." in caplog.text
    caplog.clear()
    assert at.bank() is not None
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("num_views", "epochs", "num_runs", "pays"),
    [(162, 80, 1, False), (162, 80, 2, False), (162, 80, 3, True), (162, 162, 1, False), (9, 12, 1, True)],
)
def test_bank_pays_when_it_takes_fewer_passes_than_its_runs_without(
    num_views: int, epochs: int, num_runs: int, pays: bool, digits_run: RunConfig
) -> None:
    run = digits_run.with_overrides({"epochs": (epochs // 4, epochs - epochs // 4)})
    assert bank_pays(run, num_views, num_runs) is pays


def test_epochs_that_ask_the_teacher(digits_run: RunConfig) -> None:
    expected = {"refilled": 7, "refilled_minus": 7, "refilled_emb": 3, "refilled_lkd": 4, "student": 0}
    for method, epochs in expected.items():
        assert epochs_with_teacher(digits_run.with_overrides({"method": method, "epochs": (3, 4)})) == epochs


def test_auto_builds_what_pays_uses_what_is_there_and_says_why(
    digits_run: RunConfig, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "refilled.embedding_cache.site")
    at = bench(digits_run, place, bank__mode="auto", epochs=(2, 2))
    assert at.bank(num_sharing_runs=2) is None
    assert finished(place) == []
    (record,) = caplog.records
    assert re.fullmatch(
        r"Bank \w{16} takes 9 passes of the teacher over the data to build, 2 runs of 4 epochs without it take 8: "
        r"the teacher runs in every step\.",
        record.getMessage(),
    )
    caplog.clear()
    assert at.bank(num_sharing_runs=3) is not None
    assert caplog.messages[0].endswith("3 runs of 4 epochs without it take 12: it is built.")
    assert at.bank(num_sharing_runs=1) is not None  # it costs nothing now
    assert bench(digits_run, place, bank__mode="live").bank() is None


def test_auto_goes_on_without_a_bank_that_others_are_building(
    digits_run: RunConfig, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "refilled.embedding_cache.site")
    at = bench(digits_run, place, bank__mode="auto")
    assert at.bank(9) is not None
    path = at.folder
    os.rename(path, path.with_name("elsewhere"))
    with only_here(path):
        started_s = time.monotonic()
        assert at.bank(9) is None
        assert time.monotonic() - started_s < 5  # it does not wait
    assert "is being built elsewhere" in caplog.messages[-1]
    assert at.bank(9) is not None


def test_bank_larger_than_all_may_be(digits_run: RunConfig, place: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The size that the sentence asks for is enough."""
    caplog.set_level(logging.INFO, "refilled.embedding_cache.site")
    with pytest.raises(UserError, match=r"bank.max_gib must be at least 0.002 for 544 images x 9 views x 128") as error:
        bench(digits_run, place, bank__max_gib=1e-4).bank()
    at = bench(digits_run, place, bank__max_gib=1e-4, bank__mode="auto")
    assert at.bank(100) is None
    assert f"{str(error.value)[:-1]}: the teacher runs in every step." in caplog.text
    assert bench(digits_run, place, bank__max_gib=0.002).bank() is not None


def test_least_recently_used_banks_make_room_unless_they_are_open(
    digits_run: RunConfig, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    room = {"bank__max_gib": 2.5 * 544 * 9 * 128 * 2 / 2**30}  # two banks of 1.2 MiB, with their meta
    benches = [bench(digits_run, place, split_seed=seed, **room) for seed in range(4)]
    paths = []
    for at in benches[:2]:
        before = set(finished(place))
        assert at.bank() is not None
        paths += set(finished(place)) - before
    time.sleep(0.05)  # files' times come in ticks of the kernel's clock
    assert benches[0].bank() is not None  # used after the second was built
    used = benches[2].bank()
    assert used is not None
    assert set(finished(place)) > {paths[0]}
    assert paths[1] not in finished(place)
    assert len(finished(place)) == 2
    also_used = benches[0].bank()
    before = set(finished(place))
    assert benches[3].bank() is None  # both that are there are open
    assert set(finished(place)) == before
    assert "cannot be kept" in caplog.text
    assert "banks that are in use take 0.00 GiB" in caplog.text
    assert also_used is not None
    del also_used
    assert benches[3].bank() is not None
    assert paths[0] not in finished(place)
    assert used.embed(torch.tensor([0]), torch.tensor([4])).shape == (1, 128)


def test_next_builder_clears_what_a_killed_one_left_but_not_what_is_being_built(
    digits_run: RunConfig, place: Path
) -> None:
    left, building = place / "banks" / "0123.partial", place / "banks" / "4567.partial"
    for folder in (left, building):
        folder.mkdir(parents=True)
        (folder / ROWS).write_bytes(b"half")
    with _child({"lock": str(building.with_suffix(""))}, place) as holder:
        _wait_for(holder, lambda: (place / "locked").exists())
        assert bench(digits_run, place).bank() is not None
        assert not left.exists()
        assert building.exists()
        holder.kill()


def test_killed_builder_leaves_nothing_that_the_next_one_trips_over(
    digits_run: RunConfig, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    at = bench(digits_run, place, views__padding=4)
    with _child({"config": at.config.to_dict()}, place) as builder:
        _wait_for(builder, lambda: any((place / "banks").glob("*.partial/" + ROWS)))
        builder.kill()
    (left,) = (place / "banks").glob("*.partial")
    assert finished(place) == []
    assert at.bank() is not None
    assert not left.exists()
    assert partial_of(at.folder) == left
    assert caplog.text == ""


def test_two_processes_that_need_a_bank_at_once_build_it_once(digits_run: RunConfig, place: Path) -> None:
    """And a group of two builds the same bytes as one process: the batches are the same, whoever computes them."""
    at = bench(digits_run, place, views__padding=2)
    alone = [{"config": at.config.with_overrides({"seed": seed}).to_dict(), "wait": True} for seed in (0, 1)]
    first, second = (_child(job, place) for job in alone)
    _wait_for(first, lambda: len(list(place.glob("ready-*"))) == 2)
    (place / "go").touch()
    logs = [_output(each) for each in (first, second)]
    assert sum(log.count("is built") for log in logs) == 1
    assert "WARNING" not in "".join(logs)
    assert all(len(rows_of(at.config.with_overrides({"seed": seed}), place)) == 4 for seed in (0, 1))
    by_one = (at.folder / ROWS).read_bytes()

    (at.folder / META).unlink()
    group = [{"config": at.config.with_overrides({"seed": 2}).to_dict(), "rank": rank} for rank in (0, 1)]
    logs = [_output(each) for each in [_child(job, place) for job in group]]
    assert sum(log.count("is built") for log in logs) == 1
    assert (at.folder / ROWS).read_bytes() == by_one


def test_full_disk_is_one_sentence_and_the_run_goes_on(
    digits_run: RunConfig, storage: Path, place: Path, tmp_path: Path
) -> None:
    at = bench(digits_run, place)
    limited = {"config": at.config.to_dict(), "largest_file": 1_000_000}
    log = _output(_child(limited, place))
    (sentence,) = (line for line in log.splitlines() if "Bank" in line)
    assert re.fullmatch(
        r"WARNING Bank \w{16} cannot be kept in \S+banks \(File too large\): the teacher runs in every step\.", sentence
    )
    assert finished(place) == list((place / "banks").glob("*.partial")) == []
    where = _new_place(storage, tmp_path / "roomy")
    execute(at.config, where, at.compute)
    assert len(finished(where)) == 1
    assert rows_of(at.config, place) == rows_of(at.config, where)


def test_teacher_beyond_the_range_of_float16_is_one_sentence(digits_run: RunConfig, place: Path) -> None:
    at = bench(digits_run, place)
    at.teacher._model.bn3.weight.mul_(1e6)  # type: ignore[union-attr, operator]
    with pytest.raises(UserError, match=r"bank\.dtype must be float32, because float16 cannot hold"):
        at.bank()
    assert not any((place / "banks").glob("*.partial"))
    wide = bench(digits_run, place, bank__dtype="float32")
    wide.teacher._model.bn3.weight.mul_(1e6)  # type: ignore[union-attr, operator]
    assert wide.bank() is not None


def test_run_key_counts_the_banks_type_where_there_is_a_teacher_and_nothing_else(
    digits_run: RunConfig, storage: Path
) -> None:
    task = load_task(digits_run, cache_of(storage))

    def key(**changes: Any) -> str:
        run = digits_run.with_overrides({name.replace("__", "."): value for name, value in changes.items()})
        return run_key(run, task.spaces, task.data_digest)

    assert key() == key(bank__mode="live") == key(bank__mode="bank", bank__max_gib=1.0)
    assert key() != key(bank__dtype="float32")
    assert key(method="student") == key(method="student", bank__dtype="float32")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mode": "always"}, "bank.mode must be auto, bank or live, got 'always'"),
        ({"dtype": "int8"}, "bank.dtype must be float16 or float32, got 'int8'"),
        ({"max_gib": 0.0}, "bank.max_gib must be above 0, got 0.0"),
        ({"max_gib": float("nan")}, "bank.max_gib must be above 0, got nan"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        BankConfig(**changes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fits", [True, False])
def test_bank_on_a_gpu(fits: bool, digits_run: RunConfig, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = bench(digits_run, place)
    on_cpu = at.bank()
    if not fits:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    at.compute = Compute(torch.device("cuda"), "float32")
    on_gpu = at.bank()
    assert on_cpu is not None
    assert on_gpu is not None
    assert (on_gpu._device_rows is not None) is fits
    image_ids = torch.arange(len(at.task.train))
    for epoch in range(3):
        view_ids = Views(at.config.views).draw(image_ids, seed=0, epoch=epoch)
        found = on_gpu.embed(image_ids.cuda(), view_ids.cuda())
        assert torch.equal(found.cpu(), on_cpu.embed(image_ids, view_ids))


def _child(job: dict[str, Any], storage: Path) -> subprocess.Popen[str]:
    """This file as a program, which does one job and logs to its output."""
    command = [sys.executable, __file__, json.dumps(job), str(storage)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def _output(child: subprocess.Popen[str]) -> str:
    output, _ = child.communicate(timeout=120)
    assert child.returncode == 0, output
    return output


def _wait_for(child: subprocess.Popen[str], happens: Any) -> None:
    deadline_s = time.monotonic() + 60
    while not happens():
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


def _work(job: dict[str, Any], storage: Path) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    torch.set_num_threads(1)
    if "lock" in job:
        with only_here(Path(job["lock"])):
            (storage / "locked").touch()
            signal.pause()
    if "largest_file" in job:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"], job["largest_file"]))
    if "rank" in job:
        rendezvous = f"file://{storage}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=job["rank"], world_size=2)
    config = RunConfig.from_dict(job["config"])
    if "wait" in job:
        (storage / f"ready-{config.seed}").touch()
        while not (storage / "go").exists():
            time.sleep(0.001)
    execute(config, storage, Compute(torch.device("cpu"), config.precision))
    if "rank" in job:
        leave_group()


if __name__ == "__main__":
    _work(json.loads(sys.argv[1]), Path(sys.argv[2]))
