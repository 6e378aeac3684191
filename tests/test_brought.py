"""Teachers and students that are brought: their weights, their input, what is asked of them, and given label spaces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models as torchvision_models

from refilled.brought import WEIGHTS, brought_teacher, describe_teacher, with_stored_weights
from refilled.config import RunConfig
from refilled.data.label_space import LabelSpaces
from refilled.data.views import Views
from refilled.embedding_cache import embedding_cache
from refilled.errors import UserError
from refilled.execution import execute, pretrain_once, run_folder
from refilled.identity import run_key
from refilled.models.weights import read_weights
from refilled.presets import smoke
from refilled.rehearsal import rehearse
from refilled.stages import complete, with_own_code
from refilled.storage import Storage
from refilled.storage.model_file import load_model
from refilled.tasks.classification import load_task, spaces_of
from refilled.teacher import FrozenTeacher, pretraining_run
from refilled.training.compute import Compute

CPU = Compute(torch.device("cpu"), "float32")
NAMES = [f"class{number}" for number in range(4)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of four classes, 72 x 64 pixels."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 3)):
        for label, name in enumerate(NAMES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 60, (64, 72, 3))
                pixels[8 * label : 8 * label + 20, 10:40, label % 3] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision_models.resnet18(num_classes=6)


def brought(photos: Path, weights: Path | str, **changes: Any) -> RunConfig:
    """A small run whose teacher is a torchvision network of 48 pixels, and whose student sees 32."""
    run = dataclasses.replace(
        smoke().run,
        **{
            "data": f"imagefolder:{photos}",
            "image_size": 32,
            "teacher": "torchvision:resnet18",
            "teacher_weights": str(weights),
            "teacher_image_size": 48,
            "student": "mobilenet-0.25",
            "epochs": (1, 1),
            "global_batch_size": 16,
            **changes,
        },
    )
    return complete(with_own_code(run))


def stored(run: RunConfig, storage: Storage) -> RunConfig:
    return with_stored_weights(run, load_task(run, storage), storage)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in module.state_dict().items()}


def without_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: each for name, each in state.items() if not name.startswith("fc.")}


FORMS: Mapping[str, Callable[[Path, dict[str, Tensor]], None]] = {
    "plain.pt": lambda path, state: torch.save(state, path),
    "checkpoint.pth": lambda path, state: torch.save({"epoch": 3, "state_dict": state, "optimizer": {}}, path),
    "module.pt": lambda path, state: torch.save({f"module.{name}": each for name, each in state.items()}, path),
    "nested.pt": lambda path, state: torch.save(
        {"model": {f"module.backbone.{name}": each for name, each in state.items()}}, path
    ),
    "compiled.pt": lambda path, state: torch.save({f"_orig_mod.{name}": each for name, each in state.items()}, path),
    "lightning.ckpt": lambda path, state: torch.save(
        {"state_dict": {f"model.{name}": each for name, each in state.items()} | {"loss.weight": torch.ones(3)}}, path
    ),
    "plain.safetensors": lambda path, state: save_file(state, path),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_come_in_many_forms_and_are_one_teacher(
    form: str, photos: Path, resnet: nn.Module, storage: Storage, tmp_path: Path
) -> None:
    FORMS[form](tmp_path / form, state_of(resnet))
    run = stored(brought(photos, tmp_path / form), storage)
    assert run.teacher_weights is not None
    torch.save(state_of(resnet), tmp_path / "same.pt")
    same = stored(brought(photos, tmp_path / "same.pt"), storage)
    task = load_task(run, storage)
    assert run_key(run, task.spaces, task.data_digest) == run_key(same, task.spaces, task.data_digest)
    model = brought_teacher(run, task, storage).eval()
    images = torch.randn(2, 3, 48, 48)
    assert torch.allclose(model(images).logits, resnet.eval()(images), atol=1e-5)
    assert model.has_scores


def test_a_student_that_was_trained_here_can_teach(photos: Path, storage: Storage, tmp_path: Path) -> None:
    taught = dataclasses.replace(
        brought(photos, "none"),
        **{"teacher_weights": None, "teacher_image_size": None, "method": "student", "epochs": (0, 1)},
        student="torchvision:resnet18",
    )
    taught = complete(dataclasses.replace(taught, num_teacher_classes=4, num_student_classes=4, overlap=1.0))
    execute(taught, storage, CPU)
    path = run_folder(taught, storage).model_path
    run = stored(brought(photos, path, teacher_image_size=32), storage)
    model, student = brought_teacher(run, load_task(run, storage), storage).eval(), load_model(path).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images).logits, student(images).logits)
    assert model.has_scores


def test_other_weights_are_another_run(photos: Path, resnet: nn.Module, storage: Storage, tmp_path: Path) -> None:
    keys = set()
    for number in range(2):
        state = state_of(resnet)
        state["conv1.weight"][0, 0, 0, 0] += number
        torch.save(state, tmp_path / "teacher.pt")
        run = stored(brought(photos, tmp_path / "teacher.pt"), storage)
        task = load_task(run, storage)
        keys.add(run_key(run, task.spaces, task.data_digest))
        student = dataclasses.replace(run, method="student", epochs=(0, 1))
        keys.add(run_key(student, task.spaces, task.data_digest))  # which has no teacher, and is one
    assert len(keys) == 3


def test_half_precision_is_read_as_what_it_says(
    photos: Path, resnet: nn.Module, storage: Storage, tmp_path: Path
) -> None:
    halves = {name: each.half() if each.is_floating_point() else each for name, each in state_of(resnet).items()}
    save_file(halves, tmp_path / "half.safetensors")
    run = stored(brought(photos, tmp_path / "half.safetensors"), storage)
    model = brought_teacher(run, load_task(run, storage), storage)
    weight = model.state_dict()["network.conv1.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, halves["conv1.weight"].float())


def test_a_worker_elsewhere_needs_no_file(photos: Path, resnet: nn.Module, tmp_path: Path) -> None:
    storage = Storage.open(tmp_path / "storage")
    torch.save(state_of(resnet), tmp_path / "teacher.pt")
    run = stored(brought(photos, tmp_path / "teacher.pt"), storage)
    (tmp_path / "teacher.pt").unlink()
    assert execute(RunConfig.from_dict(run.to_dict()), storage, CPU).finished
    (folder,) = (storage.root / "cache" / WEIGHTS.name).glob("*/manifest.json")
    folder.unlink()
    with pytest.raises(UserError, match=r"teacher_weights 'teacher\.pt' is no longer in .* start the command with the"):
        brought_teacher(run, load_task(run, storage), storage)


def test_the_teacher_sees_its_own_size_and_normalisation(
    photos: Path, resnet: nn.Module, storage: Storage, tmp_path: Path
) -> None:
    torch.save(state_of(resnet), tmp_path / "teacher.pt")
    run = stored(brought(photos, tmp_path / "teacher.pt"), storage)
    task = load_task(run, storage)
    assert task.for_teacher is not None
    assert task.train.images.shape[2:] == (32, 32)
    assert task.for_teacher.train.images.shape[2:] == (48, 48)  # decoded, not enlarged
    assert torch.equal(task.for_teacher.train.labels, task.train.labels)
    assert task.for_teacher.normalization.mean.tolist() == [0.485, 0.456, 0.406]
    said = describe_teacher(run, task)
    assert "teacher.pt sees 3 x 48 x 48, normalised by mean 0.485, 0.456, 0.406 and deviation 0.229" in said
    own = stored(brought(photos, tmp_path / "teacher.pt", teacher_mean=(0.5,) * 3, teacher_std=(0.25,) * 3), storage)
    seen = load_task(own, storage).as_teacher_sees
    assert (seen.normalization.mean.tolist(), seen.normalization.std.tolist()) == ([0.5] * 3, [0.25] * 3)


def test_stored_images_are_enlarged_in_the_step(resnet: nn.Module, storage: Storage, tmp_path: Path) -> None:
    """Grey digits of 8 pixels, of which no more can be decoded, for a teacher of three channels and 40 pixels."""
    torch.save(state_of(resnet), tmp_path / "teacher.pt")
    run = brought(tmp_path, tmp_path / "teacher.pt", data="digits", image_size=None, student="convnet-4")
    run = stored(dataclasses.replace(run, teacher_image_size=40), storage)
    task = load_task(run, storage)
    assert task.for_teacher is not None
    assert task.for_teacher.train.images.shape[2:] == (8, 8)
    assert task.for_teacher.shape == (3, 40, 40)
    teacher = FrozenTeacher.load(run, task, storage, CPU)
    ids = torch.arange(5)
    views = teacher.images(ids, torch.zeros(5, dtype=torch.int64))
    assert views.shape == (5, 3, 40, 40)
    grey = (
        views * torch.tensor([0.229, 0.224, 0.225])[:, None, None] + torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    )
    assert torch.allclose(grey[:, 0], grey[:, 2], atol=1e-5)
    assert execute(run, storage, CPU).finished


@pytest.mark.parametrize("kind", ["shifts", "resized_crops"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_cache_and_live_teacher_say_the_same(
    kind: str, dtype: str, photos: Path, resnet: nn.Module, storage: Storage, tmp_path: Path
) -> None:
    torch.save(state_of(resnet), tmp_path / "teacher.pt")
    run = brought(photos, tmp_path / "teacher.pt").with_overrides(
        {"views.kind": kind, "views.num_views": 3, "embedding_cache.dtype": dtype, "embedding_cache.mode": "cached"}
    )
    run = stored(run, storage)
    task = load_task(run, storage)
    teacher = FrozenTeacher.load(run, task, storage, CPU)
    cache = embedding_cache(run, task, teacher, storage, CPU)
    assert cache is not None
    ids = torch.arange(len(task.train)).repeat_interleave(3)
    view_ids = Views(run.views).view_ids.repeat(len(task.train))
    live = teacher.embed(torch.empty(0), ids[:64], view_ids[:64])
    assert torch.equal(cache.embed(ids[:64], view_ids[:64]), live)
    assert not torch.equal(live[0], live[1])


def test_runs_with_and_without_a_cache_are_equal(
    photos: Path, resnet: nn.Module, storage: Storage, tmp_path: Path
) -> None:
    torch.save(state_of(resnet), tmp_path / "teacher.pt")
    rows = []
    for mode in ("live", "cached"):
        run = brought(photos, tmp_path / "teacher.pt").with_overrides(
            {"views.num_views": 2, "embedding_cache.mode": mode}
        )
        place = Storage.open(tmp_path / mode)
        rows.append(execute(stored(run, place), place, CPU))
    assert rows[0].train_loss == rows[1].train_loss
    assert rows[0].val_accuracy == rows[1].val_accuracy


def test_a_teacher_without_a_head_gives_embeddings_and_refuses_scores(
    photos: Path, resnet: nn.Module, storage: Storage, tmp_path: Path
) -> None:
    torch.save(without_head(state_of(resnet)), tmp_path / "teacher.pt")
    run = stored(brought(photos, tmp_path / "teacher.pt"), storage)
    assert execute(run, storage, CPU).finished
    asks = run.with_overrides({"classifier.instance_weight": "own_head"})
    with pytest.raises(UserError, match="must have a last linear layer for methods that ask the teacher"):
        rehearse(asks, load_task(asks, storage), storage)


def test_scores_come_in_the_order_of_the_students_classes(photos: Path, storage: Storage, tmp_path: Path) -> None:
    network = torchvision_models.resnet18(num_classes=4)
    torch.save(state_of(network), tmp_path / "teacher.pt")
    (tmp_path / "names.txt").write_text("\n".join(reversed(NAMES)))
    run = brought(
        photos, tmp_path / "teacher.pt", teacher_classes=str(tmp_path / "names.txt"), method="kd", overlap=1.0
    )
    run = stored(run, storage)
    task = load_task(run, storage)
    assert task.spaces.overlap == 1
    teacher = FrozenTeacher.load(run, task, storage, CPU)
    embedding = torch.randn(3, 512)
    assert torch.allclose(teacher.logits(embedding), network.fc(embedding).flip(1), atol=1e-5)
    assert execute(run, storage, CPU).finished


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (
            lambda state: {name: each for name, each in state.items() if name != "conv1.weight"},
            "but lacks 'conv1.weight'",
        ),
        (lambda state: state | {"extra.weight": torch.ones(2)}, "alone, but has 'extra.weight' too"),
        (lambda state: state | {"conv1.weight": torch.ones(32, 3, 7, 7)}, r"'conv1.weight' is \[32, 3, 7, 7\], not"),
        (
            lambda state: state | {"bn1.weight": torch.full((64,), torch.nan)},
            "finite numbers, but 'bn1.weight' does not",
        ),
        (lambda state: {"epoch": 3}, "must hold named tensors"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    harm: Callable[[dict[str, Tensor]], Any],
    sentence: str,
    photos: Path,
    resnet: nn.Module,
    tmp_path: Path,
) -> None:
    torch.save(harm(state_of(resnet)), tmp_path / "teacher.pt")
    storage = Storage.open(tmp_path / "storage")
    with pytest.raises(UserError, match=f"teacher_weights: .*{sentence}"):
        stored(brought(photos, tmp_path / "teacher.pt"), storage)
    assert not (storage.root / "cache" / WEIGHTS.name).exists()


def test_what_is_no_weights_file_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    (tmp_path / "text.pt").write_text("weights")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name in ("whole.pt", "text.pt", "empty.safetensors"):
        with pytest.raises(UserError, match="must be a weights file, safetensors or what torch"):
            read_weights(tmp_path / name)
    with pytest.raises(UserError, match="there is no such file"):
        read_weights(tmp_path / "nowhere.pt")


def test_a_student_starts_from_weights_but_for_its_head(
    photos: Path, resnet: nn.Module, storage: Storage, tmp_path: Path
) -> None:
    torch.save(state_of(resnet), tmp_path / "start.pt")
    run = dataclasses.replace(
        brought(photos, tmp_path / "start.pt"),
        **{"teacher_weights": None, "teacher_image_size": None, "method": "student", "epochs": (0, 1)},
        student="torchvision:resnet18",
        student_weights=str(tmp_path / "start.pt"),
        num_student_classes=2,
        num_teacher_classes=2,
    )
    run = stored(complete(run), storage).with_overrides({"classifier.schedule.learning_rate": 1e-12})
    task = load_task(run, storage)
    assert execute(run, storage, CPU).finished
    trained = load_model(run_folder(run, storage).model_path).state_dict()
    assert torch.allclose(trained["network.conv1.weight"], resnet.state_dict()["conv1.weight"], atol=1e-6)
    assert trained["head.weight"].shape == (2, 512)
    anew = dataclasses.replace(run, student_weights=None)
    assert run_key(run, task.spaces, task.data_digest) != run_key(anew, task.spaces, task.data_digest)


def listed(tmp_path: Path, **lists: list[str]) -> dict[str, str]:
    for name, classes in lists.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(classes) + "\n")
    return {name: str(tmp_path / f"{name}.txt") for name in lists}


def given(tmp_path: Path, **lists: list[str]) -> RunConfig:
    run = dataclasses.replace(
        smoke().run, method="refilled", epochs=(1, 1), teacher_epochs=1, **listed(tmp_path, **lists)
    )
    return complete(with_own_code(run))


def test_class_lists_replace_the_windows(storage: Storage, tmp_path: Path) -> None:
    run = given(tmp_path, teacher_classes=["1", "3", "5"], student_classes=["5", "2", "1", "8"])
    spaces = spaces_of(run, storage)
    assert (spaces.teacher, spaces.student, spaces.overlap) == (("1", "3", "5"), ("5", "2", "1", "8"), 0.5)
    own = spaces_of(pretraining_run(run), storage)
    assert (own.teacher, own.student) == (("1", "3", "5"), ("1", "3", "5"))
    only = spaces_of(given(tmp_path, student_classes=["5", "2"]), storage)
    assert (len(only.teacher), only.student) == (10, ("5", "2"))
    (tmp_path / "student_classes.txt").unlink()  # the run carries the text
    (tmp_path / "teacher_classes.txt").unlink()
    assert execute(RunConfig.from_dict(run.to_dict()), storage, CPU).finished


@pytest.mark.parametrize(
    ("classes", "sentence"),
    [
        (["1", "cat", "dog"], "must name classes of the data, which has no 'cat' and 1 more of them; it has 0, 1, 2"),
        (["1", "1"], "must name every class once, but names '1' twice"),
        (["1"], "must name at least 2 classes, one a line, got 1"),
    ],
)
def test_lists_that_name_something_else_are_refused(
    classes: list[str], sentence: str, storage: Storage, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"student_classes .*{sentence}"):
        spaces_of(given(tmp_path, student_classes=classes), storage)


def test_a_teacher_of_other_data_sees_the_students_images_as_its_own(
    photos: Path, storage: Storage, tmp_path: Path
) -> None:
    run = complete(
        dataclasses.replace(
            smoke().run,
            data="digits",
            teacher_data=f"imagefolder:{photos}",
            image_size=16,
            teacher="convnet-8",
            teacher_epochs=1,
            method="refilled",
            epochs=(1, 1),
        )
    )
    task = load_task(run, storage)
    assert (task.spaces.teacher, task.spaces.overlap, len(task.spaces.student)) == (tuple(NAMES), 0, 10)
    pretraining = pretraining_run(run)
    own = load_task(pretraining, storage)
    assert (own.spaces.student, pretraining.data) == (tuple(NAMES), f"imagefolder:{photos}")
    assert torch.allclose(task.as_teacher_sees.normalization.mean, own.normalization.mean)
    assert task.as_teacher_sees.shape == (3, 16, 16)
    pretrain_once(run, storage, CPU)
    assert execute(run, storage, CPU).finished
    other = LabelSpaces(task.spaces.teacher, task.spaces.student, teacher_digest="of other images of these classes")
    assert run_key(run, other, task.data_digest) != run_key(run, task.spaces, task.data_digest)
    same = complete(dataclasses.replace(run, teacher_data=None, num_teacher_classes=None))
    assert run_key(run, task.spaces, task.data_digest) != run_key(
        same, spaces_of(same, storage), load_task(same, storage).data_digest
    )


def test_images_a_class_are_nested_and_their_validation_is_among_them(storage: Storage) -> None:
    def ids(number: int | None, fraction: float = 0.2) -> tuple[set[bytes], set[bytes]]:
        run = dataclasses.replace(smoke().run, images_per_class=number, val_fraction=fraction)
        task = load_task(run, storage)
        held = set() if task.validation is None else {each.numpy().tobytes() for each in task.validation.images}
        return {each.numpy().tobytes() for each in task.train.images}, held

    (few, few_held), (more, more_held), (_, all_held) = ids(5), ids(20), ids(None)
    assert (len(few | few_held), len(few_held)) == (25, 5)
    assert (len(more | more_held), len(more_held)) == (100, 20)
    assert few | few_held <= more | more_held
    assert few_held <= more_held <= all_held  # of what no teacher has seen
    refitted, nothing = ids(20, fraction=0.0)
    assert (refitted, nothing) == (more | more_held, set())
    with pytest.raises(UserError, match=r"images_per_class must be at most 1\d\d, as many as class"):
        ids(500)


def test_the_number_of_images_is_part_of_a_students_run_and_not_of_its_teachers(storage: Storage) -> None:
    runs = [dataclasses.replace(smoke().run, images_per_class=number) for number in (None, 20)]
    spaces = spaces_of(runs[0], storage)
    assert len({run_key(run, spaces, "digest") for run in runs}) == 2
    assert len({pretraining_run(run) for run in runs}) == 1
