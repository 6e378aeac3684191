"""The rivals' terms: their losses from rows, what they train, what they keep, and that it survives an interruption."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from outcomes import Interruption, assert_same_outcome, interrupt_at
from term_bench import LABELS, Bench

from refilled.config import RunConfig
from refilled.errors import UserError
from refilled.execution import execute, run_folder
from refilled.losses import (
    asymmetric_matching,
    attention_loss,
    contrastive_nce,
    hint_loss,
    relational_distillation,
    variational_loss,
)
from refilled.presets import smoke
from refilled.shared_caches import epochs_with_teacher, pays
from refilled.storage import Storage
from refilled.storage.tensor_file import load_tensors
from refilled.terms.crd import Crd
from refilled.training.compute import Compute

WITH_STATE = ("aml", "fitnet", "vid", "crd")
ON_MAPS = ("fitnet", "vid", "at")


def test_rkd_weighs_distances_and_angles(bench: Bench) -> None:
    term = bench.term("rkd", "rkd", **{"terms.rkd.weight": 3.0, "terms.rkd.angle_ratio": 0.5})
    expected = relational_distillation(
        bench.local.student.embedding, bench.local.known_teacher.embedding, distance_weight=3.0, angle_weight=1.5
    )
    assert bench.value(term) == pytest.approx(float(expected.detach()), rel=1e-12)


def test_aml_projects_to_the_teachers_width(bench: Bench) -> None:
    term = bench.term("aml", "aml", **{"terms.aml.weight": 2.0, "terms.aml.margin": 1.1, "terms.aml.pairs": "sum"})
    projected = bench.local.student.embedding @ term.projection.weight.T + term.projection.bias
    expected = asymmetric_matching(
        projected,
        bench.local.known_teacher.embedding,
        LABELS,
        margin=1.1,
        variant="contr_plus",
        pairs="sum",
    )
    assert bench.value(term) == pytest.approx(2 * float(expected.detach()), rel=1e-12)


@pytest.mark.parametrize(("number", "relu"), [(1, True), (2, False), (3, True)])
def test_fitnet_regresses_the_named_map(bench: Bench, number: int, relu: bool) -> None:
    term = bench.term("fitnet", "fitnet", **{"terms.fitnet.map": number, "terms.fitnet.relu": relu})
    own, wanted = bench.local.student.features[number - 1], bench.local.known_teacher.features[number - 1]
    own = F.adaptive_avg_pool2d(own, wanted.shape[-1])  # the student's third map is larger than the teacher's
    regressed = F.batch_norm(term.convolution(own), None, None, training=True)
    expected = hint_loss(F.relu(regressed) if relu else regressed, wanted).mean()
    assert bench.value(term) == pytest.approx(100 * float(expected.detach()), rel=1e-9)


def test_fitnets_map_must_exist(bench: Bench) -> None:
    with pytest.raises(UserError, match=r"fitnet\.map must be at most 3 for these networks, got 4"):
        bench.term("fitnet", "fitnet", **{"terms.fitnet.map": 4})


def test_fitnets_regressor_has_the_published_size(bench: Bench) -> None:
    """WRN-16-2 to WRN-40-2, group 2: 64 x 64 weights, 64 biases, 128 of the batch norm."""
    setting = dataclasses.replace(
        bench.setting,
        student=dataclasses.replace(bench.setting.student, feature_channels=(32, 64, 128)),
        teacher=dataclasses.replace(bench.setting.teacher, feature_channels=(32, 64, 128)),
    )
    sizes = [
        sum(each.numel() for each in Bench(setting, bench.local, bench.batch).term(name, name).parameters())
        for name in ("fitnet", "vid")
    ]
    assert sizes == [4288, 64_512 + 224]


def test_at_sums_over_pairs_of_maps(bench: Bench) -> None:
    pairs = zip(bench.local.student.features, bench.local.known_teacher.features, strict=True)
    expected = sum(float(attention_loss(own, wanted).mean()) for own, wanted in pairs)
    assert bench.value(bench.term("at", "at")) == pytest.approx(1000 * expected, rel=1e-12)


def test_maps_that_end_in_a_relu_are_taken_behind_it(bench: Bench) -> None:
    """Of a pre-activation network the maps themselves, of all others what the next group gets."""
    term = bench.term("at", "at")
    plain = bench.value(term)
    term._ends_in_relu = (True, True)
    assert bench.value(term) != plain
    behind = tuple(F.relu(each) for each in bench.local.student.features)
    teacher = bench.local.known_teacher
    local = dataclasses.replace(
        bench.local,
        student=bench.local.student._replace(features=behind),
        teacher=teacher._replace(features=tuple(F.relu(each) for each in teacher.features)),
    )
    with_relu = bench.value(term)
    term._ends_in_relu = (False, False)
    assert bench.value(term, local) == with_relu


def test_vid_is_its_likelihood_and_its_variances_are_really_trained(bench: Bench) -> None:
    term = bench.term("vid", "vid", **{"terms.vid.weight": 2.0, "terms.vid.initial_variance": 3.0})
    pairs = list(zip(bench.local.student.features, bench.local.known_teacher.features, strict=True))
    expected = 0.0
    for (own, wanted), mean in zip(pairs, term.means, strict=True):
        mean_map = mean(F.adaptive_avg_pool2d(own, wanted.shape[-1]))
        variance = torch.full((wanted.shape[1],), 3.0, dtype=torch.float64)
        expected += float(variational_loss(mean_map.detach(), wanted, variance).mean())
    assert bench.value(term) == pytest.approx(2 * expected, rel=1e-6)  # scales are float32 when they are made
    bench.loss(term).backward()
    assert all(float(scale.grad.abs().min()) > 0 for scale in term.scales)
    assert {id(each) for each in term.undecayed()} == {id(each) for each in term.scales}


@pytest.mark.parametrize("variance", [1e-4, 5.0, 1000.0])
def test_vids_variances_begin_where_they_are_told_to(bench: Bench, variance: float) -> None:
    term = bench.term("vid", "vid", **{"terms.vid.initial_variance": variance})
    assert float((F.softplus(term.scales[0]) + 1e-5).detach()[0]) == pytest.approx(variance, rel=1e-3)


class TestCrd:
    """CRD, whose memories are state from step to step."""

    def term(self, bench: Bench, **settings: Any) -> Crd:
        found = bench.term("crd", "crd", **{"terms.crd.dim": 6, "terms.crd.num_negatives": 4} | settings)
        assert isinstance(found, Crd)
        return found

    def test_first_step_is_the_definition(self, bench: Bench) -> None:
        """Scores by plain loops, Z as their mean over all of the batch times N."""
        term = self.term(bench)
        own = F.normalize(term.student_map(bench.local.student.embedding), dim=1)
        wanted = F.normalize(term.teacher_map(bench.local.known_teacher.embedding), dim=1)
        columns = term._columns(bench.local)
        expected = 0.0
        for anchors, memory in ((own, term.teacher_memory), (wanted, term.student_memory)):
            scores = torch.stack(
                [
                    torch.stack([(anchor @ memory[column] / 0.07).exp() for column in row])
                    for anchor, row in zip(anchors.detach(), columns, strict=True)
                ]
            )
            h = scores / (scores.mean() * term.num_images)
            expected += float(contrastive_nce(h.detach().log(), num_images=term.num_images).mean())
        assert bench.value(term) == pytest.approx(0.8 * expected, rel=1e-9)

    def test_negatives_are_of_other_classes_and_the_positive_is_the_image_itself(self, bench: Bench) -> None:
        term = self.term(bench)
        columns = term._columns(bench.local)
        assert torch.equal(columns[:, 0], bench.local.image_ids)
        assert bool((bench.setting.labels[columns[:, 1:]] != LABELS[:, None]).all())
        relaxed = self.term(bench, **{"terms.crd.positive": "relax"})._columns(bench.local)[:, 0]
        assert bool((bench.setting.labels[relaxed] == LABELS).all())

    def test_all_others_are_negatives_where_more_are_asked_for(self, bench: Bench) -> None:
        term = self.term(bench, **{"terms.crd.num_negatives": 16_384})
        assert term.num_negatives == 12 - 3  # the largest class has three of twelve images

    def test_update_moves_the_batchs_rows_alone_and_keeps_them_on_the_sphere(self, bench: Bench) -> None:
        term = self.term(bench)
        before = term.student_memory.clone()
        rows = {name: each.detach() for name, each in term.rows(bench.local).items()}
        term.update(rows, bench.batch)
        assert torch.equal(term.student_memory[8:], before[8:])
        expected = F.normalize(0.5 * before[:8] + 0.5 * rows["crd_student"], dim=1)
        torch.testing.assert_close(term.student_memory[:8], expected)

    def test_normalisers_are_of_the_first_batch(self, bench: Bench) -> None:
        term = self.term(bench)
        bench.loss(term)
        first = term.log_normalisers.clone()
        assert bool(first.isfinite().all())
        with torch.no_grad():
            term.student_map.weight.mul_(3)
        bench.loss(term)
        assert torch.equal(term.log_normalisers, first)

    @pytest.mark.parametrize("temperature", [0.02, 0.5])
    def test_float32_is_enough_over_the_whole_range_of_temperatures(self, bench: Bench, temperature: float) -> None:
        """Scores span more than float32 at the low end; from them and not their logarithms gradients were -inf."""
        first = self.term(bench, **{"terms.crd.temperature": temperature, "terms.crd.dim": 2})
        grads = []
        for term in (first, copy.deepcopy(first).float()):
            dtype = term.student_map.weight.dtype
            student = bench.local.student._replace(embedding=10 * bench.local.student.embedding.to(dtype))
            bench.loss(term, dataclasses.replace(bench.local, student=student)).backward()
            grads.append(term.student_map.weight.grad.double())
        assert bool(grads[1].isfinite().all())
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["rkd", "aml", "fitnet", "vid", "at"])
def test_no_gradient_reaches_the_teacher(bench: Bench, method: str) -> None:
    """Not crd, which trains a map on top of the frozen embedding."""
    teacher = bench.local.known_teacher
    asked = teacher._replace(
        embedding=teacher.embedding.clone().requires_grad_(),
        features=tuple(m.clone().requires_grad_() for m in teacher.features),
    )
    student = bench.local.student._replace(
        embedding=bench.local.student.embedding.clone().requires_grad_(),
        features=tuple(m.clone().requires_grad_() for m in bench.local.student.features),
    )
    bench.loss(bench.term(method, method), dataclasses.replace(bench.local, student=student, teacher=asked)).backward()
    assert all(each.grad is None or float(each.grad.abs().sum()) == 0 for each in (asked.embedding, *asked.features))


def small_run(method: str) -> RunConfig:
    run = dataclasses.replace(
        smoke().run,
        method=method,
        overlap=0.4,
        epochs=(4, 4),
        teacher_epochs=2,
        student="convnet-4",
        teacher="convnet-8",
    )
    return run.with_overrides({"terms.crd.num_negatives": 100} if method == "crd" else {})


@pytest.mark.parametrize("method", WITH_STATE)
def test_interrupted_run_ends_as_if_it_had_not_been(
    method: str, storage: Storage, tmp_path: Path, compute: Compute
) -> None:
    """Parameters and memories of terms, and the optimiser's part of them, come back from the checkpoint."""
    run = small_run(method)
    execute(run, storage, compute)
    interrupted = Storage.open(tmp_path)
    with pytest.raises(Interruption):
        execute(run, interrupted, compute, interrupt_at(2))
    kept = load_tensors(run_folder(run, interrupted).path / "checkpoint.pt")
    assert kept["terms"]
    execute(run, interrupted, compute)
    assert_same_outcome(run_folder(run, interrupted), run_folder(run, storage))


def losses_by_mode(run: RunConfig, folder: Path, compute: Compute, modes: tuple[str, str]) -> list[float]:
    """The last epoch's, each in a storage of its own."""
    storages = {mode: Storage.open(folder / mode) for mode in modes}
    runs = {mode: run.with_overrides({"embedding_cache.mode": mode}) for mode in modes}
    return [execute(runs[mode], storages[mode], compute).train_loss for mode in modes]


@pytest.mark.parametrize("method", ON_MAPS)
def test_maps_come_from_the_live_teacher_where_a_cache_would_pay(method: str, tmp_path: Path, compute: Compute) -> None:
    run = dataclasses.replace(small_run(method), epochs=(1, 2)).with_overrides({"views.num_views": 1})
    assert pays(run, epochs=2)  # were it of use
    assert epochs_with_teacher(run) == 0
    live, auto = losses_by_mode(run, tmp_path, compute, ("live", "auto"))
    assert live == auto
    assert not list(tmp_path.glob("*/cache/embeddings/*"))


@pytest.mark.parametrize("method", ["rkd", "aml", "crd"])
def test_embeddings_from_the_cache_give_the_same_run(method: str, tmp_path: Path, compute: Compute) -> None:
    run = dataclasses.replace(small_run(method), epochs=(1, 1))
    live, cached = losses_by_mode(run, tmp_path, compute, ("live", "cached"))
    assert live == cached
    assert not list(tmp_path.glob("live/cache/embeddings/*"))
    assert list(tmp_path.glob("cached/cache/embeddings/*/manifest.json"))
