"""Keys of runs: golden ones, what changes them, and that a new setting does not."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from refilled import identity
from refilled.config import RunConfig
from refilled.data.label_space import LabelSpaces
from refilled.execution import execute, run_folder
from refilled.identity import BASE, NOT_BY_ITSELF, determining, run_key
from refilled.methods import METHODS
from refilled.presets import PRESETS, preset
from refilled.storage import Storage
from refilled.terms.rkd import Rkd, RkdConfig
from refilled.training.compute import Compute

SPACES = LabelSpaces(teacher=("a", "b"), student=("b", "c"))
DIGEST = "0123456789abcdef"

# Stored runs are found by these. Where one changes, numbers of that preset or method have changed, and `FORMAT` or the
# term's settings say so; else what was stored is lost.
GOLDEN_PRESETS: Mapping[str, str] = {
    "smoke": "42b2ea4c8da29adf-0",
    "cifar100": "eb47807f1fd9757f-0",
    "paper": "36d81037af7170dc-0",
    "released": "27deb326c961b957-0",
}
GOLDEN_METHODS: Mapping[str, str] = {
    "student": "ec776fba001ef032-0",
    "kd": "936f5990292daf4b-0",
    "refilled_emb": "bdd8b4e5eb949efc-0",
    "refilled_lkd": "cc26df3bd6a3064d-0",
    "refilled_minus": "910652fff531d639-0",
    "refilled": "42b2ea4c8da29adf-0",
    "rkd": "91666947a1cb8afa-0",
    "aml": "124bda81809add21-0",
    "fitnet": "0d2b7aa4060dfc55-0",
    "vid": "bb1e2b0b07eaf07e-0",
    "crd": "d773cb6ca45ae946-0",
    "at": "b57243499eec3a51-0",
}


def key(run: RunConfig) -> str:
    return run_key(run, SPACES, DIGEST)


def smoke_with(method: str) -> RunConfig:
    run = preset("smoke").run
    return dataclasses.replace(run, method=method, overlap=1.0)


def test_golden_keys_of_the_presets() -> None:
    assert {name: key(preset(name).run) for name in PRESETS} == GOLDEN_PRESETS


def test_golden_keys_of_the_methods() -> None:
    assert {method: key(smoke_with(method)) for method in METHODS} == GOLDEN_METHODS


def test_a_setting_that_has_another_name_now_has_the_keys_it_had() -> None:
    assert key(preset("smoke").run.with_overrides({"embedding_cache.dtype": "float32"})) == "024b8f80485cdd25-0"


def test_base_is_what_a_run_is_by_default_and_every_setting_is_classified() -> None:
    own = RunConfig().flat()
    own = {name: value for name, value in own.items() if name not in NOT_BY_ITSELF}
    assert own == dict(BASE)


def test_only_what_differs_from_the_base_is_hashed() -> None:
    run = RunConfig(method="student")
    plain = identity.identity(run, SPACES, DIGEST)
    assert set(plain) == {"format", "data", "student_classes", "stages", "epochs"}
    changed = identity.identity(run.with_overrides({"seed": 3}), SPACES, DIGEST)
    assert changed == plain | {"seed": 3}


@pytest.mark.parametrize("method", METHODS)
def test_a_setting_counts_where_a_term_reads_it_and_nowhere_else(method: str) -> None:
    run = smoke_with(method)
    read = determining(run)
    others = {
        "embedding.temperature": 1.5,
        "embedding.schedule.learning_rate": 0.3,
        "classifier.distill_weight": 4.0,
        "classifier.posterior": "cosine_share",
        "classifier.instance_weight": "gap",
        "ncm_images_per_class": 3,
        "teacher_epochs": 3,
        "pretraining.seed": 3,
        "embedding_cache.dtype": "float32",
        "classifier.weight": 3.0,
        "seed": 4,
    }
    for name, value in others.items():
        assert (key(run.with_overrides({name: value})) != key(run)) is (name in read), name
    elsewhere = {"embedding_cache.mode": "live", "checkpoint_every": 3, "data": "elsewhere"}
    assert key(run.with_overrides(elsewhere)) == key(run)


def test_a_method_is_its_terms_not_its_name() -> None:
    assert key(smoke_with("refilled")) == key(smoke_with("comparison>cross_entropy+weighted_lkd"))
    assert len({key(smoke_with(method)) for method in METHODS}) == len(METHODS)


def test_the_first_of_the_epochs_counts_for_two_stages_only() -> None:
    one, two = smoke_with("kd"), smoke_with("rkd")
    assert key(one.with_overrides({"epochs": (3, 20)})) == key(one)
    assert key(two.with_overrides({"epochs": (3, 20)})) != key(two)


def test_different_losses_never_share_a_run() -> None:
    """The trap of a key that forgot the method: any two embedding losses, alone and together."""
    losses = ["comparison", "rkd", "aml", "comparison+rkd", "rkd+aml", "fitnet", "vid", "crd", "at"]
    keys = [key(smoke_with(f"{loss}>cross_entropy")) for loss in losses]
    for (one, a), (other, b) in itertools.combinations(zip(losses, keys, strict=True), 2):
        assert a != b, (one, other)


@dataclass(frozen=True, kw_only=True)
class LaterRun(RunConfig):
    """A run of a later version, which has one setting more."""

    mixing: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LaterRkdConfig(RkdConfig):
    """Settings of a later version's term, which has one more."""

    added: ClassVar[Mapping[str, object]] = {"exponent": 1.0}
    exponent: float = 1.0


def later(run: RunConfig, **more: Any) -> LaterRun:
    return LaterRun(**{field.name: getattr(run, field.name) for field in dataclasses.fields(run)}, **more)


def test_storage_is_found_after_a_setting_is_added(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compute: Compute
) -> None:
    """Invariant 7, with a real run: nothing is trained again, neither the run nor its teacher."""
    run = dataclasses.replace(preset("smoke").run, method="rkd", overlap=0.4, epochs=(1, 1), teacher_epochs=1)
    storage = Storage.open(tmp_path)
    execute(run, storage, compute)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.pt")}
    assert len(kept) == 2

    monkeypatch.setattr(identity, "BASE", {**BASE, "mixing": 0.0})
    monkeypatch.setattr(Rkd, "Config", LaterRkdConfig)
    new = later(run)
    assert run_folder(new, storage).path == run_folder(run, storage).path
    execute(new, storage, compute)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.pt")} == kept

    assert key(later(run, mixing=0.5)) != key(new)
    assert key(new.with_overrides({"terms.rkd.exponent": 2.0})) != key(new)


def test_a_changed_default_is_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default that is changed without a word must not give stored runs another meaning."""

    @dataclass(frozen=True, kw_only=True)
    class Changed(RkdConfig):
        angle_ratio: float = 3.0

    before = key(smoke_with("rkd"))
    monkeypatch.setattr(Rkd, "Config", Changed)
    assert key(smoke_with("rkd")) != before
