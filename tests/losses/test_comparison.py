import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_reference import comparison_loop
from torch import Tensor

from refilled.losses import NonFiniteEmbeddingError, check_finite, comparison, comparison_matching

RULES: list[dict[str, Any]] = [
    {},
    {"max_negatives": 1},
    {"max_negatives": 5},
    {"max_negatives": 20},
    {"margin": 0.1},
    {"margin": 0.4},
    {"margin": 0.4, "max_negatives": 2},
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def batch(
    num_images: int, num_classes: int, seed: int, dims: tuple[int, int] = (4, 3)
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(num_images, d, generator=generator, dtype=torch.float64) for d in dims)
    return student.requires_grad_(), teacher, torch.randint(0, num_classes, (num_images,), generator=generator)


def on_circle(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def assert_equals_loop(student: Tensor, teacher: Tensor, labels: Tensor, **settings: Any) -> None:
    actual = comparison_matching(student, teacher, labels, **settings)
    expected = comparison_loop(student, teacher, labels, **settings)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-300)
    (gradient,) = torch.autograd.grad(actual, student)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    assert (gradient - expected_gradient).norm() <= 1e-12 * expected_gradient.norm()


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("num_images", "num_classes"), [(6, 2), (11, 3), (17, 6)])
def test_equals_the_loop_in_value_and_gradient(rule: dict[str, Any], num_images: int, num_classes: int) -> None:
    for seed in range(3):
        student, teacher, labels = batch(num_images, num_classes, seed)
        assert_equals_loop(student, teacher, labels, temperature=0.5, **rule)


@pytest.mark.parametrize("temperature", [0.003, 0.01, 0.05, 4.0])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_extreme_temperatures_equal_the_loop(temperature: float, rule: dict[str, Any]) -> None:
    student, teacher, labels = batch(12, 3, seed=5)
    assert_equals_loop(student, teacher, labels, temperature=temperature, **rule)
    assert_equals_loop(student, teacher, labels, temperature=temperature, student_temperature=1.0, **rule)
    assert_equals_loop(student, teacher, labels, temperature=1.0, student_temperature=temperature, **rule)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_teacher_that_reverses_every_order_keeps_its_digits(rule: dict[str, Any]) -> None:
    # What is far for the student is near for the teacher: the ranges' teacher sums lie beside e^40 times larger terms.
    degrees = [0.0, 10.0, 25.0, 45.0, 70.0, 100.0, 130.0, 165.0, 179.0]
    student = on_circle(*degrees).requires_grad_()
    teacher = on_circle(*reversed(degrees))
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0])
    assert_equals_loop(student, teacher, labels, temperature=0.05, **rule)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_copies_of_images_tie_and_equal_the_loop(rule: dict[str, Any]) -> None:
    student, teacher, labels = batch(14, 3, seed=9)
    copied = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 0, 5])  # same image in its own and in other classes
    rows = student.detach()[copied].requires_grad_()
    assert_equals_loop(rows, teacher[copied], labels, temperature=0.3, **rule)


def test_of_impostors_that_tie_the_first_in_the_batch_is_kept() -> None:
    # Columns 2 and 3 are copies for the student, not for the teacher; which one stays decides the value.
    student, teacher, labels = on_circle(0, 30, 90, 90), on_circle(0, 40, 60, 170), torch.tensor([0, 0, 1, 2])
    kept = comparison_matching(student, teacher, labels, temperature=0.5, max_negatives=1)
    alone = comparison_matching(student[:3], teacher[:3], labels[:3], temperature=0.5)
    assert kept.item() == pytest.approx(alone.item(), rel=1e-12)


@pytest.mark.parametrize("rule", [RULES[0], RULES[2], RULES[5]], ids=str)
def test_chunks_of_anchors_add_up(rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, labels = batch(50, 5, seed=2)
    whole = comparison_matching(student, teacher, labels, temperature=0.5, **rule)
    (gradient,) = torch.autograd.grad(whole, student)
    monkeypatch.setattr(comparison, "CPU_CHUNK", 1)  # 16 anchors a chunk, the last one with 2
    chunked = comparison_matching(student, teacher, labels, temperature=0.5, **rule)
    torch.testing.assert_close(chunked, whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.autograd.grad(chunked, student)[0], gradient, rtol=1e-11, atol=1e-15)


def test_numbers_worked_out_by_hand() -> None:
    # Chords of the unit circle: 60° -> 1, 120° -> √3, 180° -> 2. Images 0 and 1 are one class, image 2 another.
    student, teacher = on_circle(0, 60, 180), on_circle(0, 180, 60)
    labels = torch.tensor([0, 0, 1])
    # Anchor 0, positive 1: D_S = (1; 2), D_T = (2; 1). At τ = 1: p = σ(1) = 0.7310586, q = σ(-1) = 0.2689414,
    # log q/p = -1, log (1-q)/(1-p) = 1, KL = -0.2689414 + 0.7310586 = 0.4621172.
    # Anchor 1, positive 0: D_S = (1; √3), D_T = (2; √3), p = σ(√3 - 1) = 0.6752551, q = σ(√3 - 2) = 0.4334106,
    # KL = 0.4334106 (-0.4434050) + 0.5665894 (0.5565950) = -0.1921764 + 0.3153608 = 0.1231844.
    # Anchor 2 has no positive.
    first, second = 0.4621172, 0.1231844
    loss = comparison_matching(student, teacher, labels, temperature=1.0)
    assert loss.item() == pytest.approx((first + second) / 2, abs=1e-7)
    # Gaps are 1 and √3 - 1 = 0.732: a margin of 1 includes its edge, 0.8 keeps the second tuple, 0.5 none.
    for margin, expected in ((1.0, (first + second) / 2), (0.8, second), (0.5, 0.0)):
        loss = comparison_matching(student, teacher, labels, temperature=1.0, margin=margin)
        assert loss.item() == pytest.approx(expected, abs=1e-7)
    # Student at τ_S = 0.5: p = σ(2) = 0.8807971 and σ(2√3 - 2) = 0.8121592, q as above,
    # KL = 0.2689414 (-1.1863337) + 0.7310586 (1.8136663) = 1.0068421 and
    #      0.4334106 (-0.6280108) + 0.5665894 (1.1040400) = 0.3533508. Mean: 0.6800964.
    loss = comparison_matching(student, teacher, labels, temperature=1.0, student_temperature=0.5)
    assert loss.item() == pytest.approx(0.6800964, abs=1e-7)


def test_max_negatives_keeps_the_nearest() -> None:
    # Anchor 0°, positive 60°, impostors at 90° (D = √2) and 180° (D = 2); the anchor 60° has 180° (√3) beyond D = 1.
    student, teacher = on_circle(0, 60, 90, 180), on_circle(0, 20, 40, 90)
    labels = torch.tensor([0, 0, 1, 2])
    nearest = comparison_matching(student, teacher, labels, temperature=1.0, max_negatives=1)

    def chord(degrees: float) -> float:
        return 2 * math.sin(math.radians(degrees) / 2)

    def divergence(d_s: tuple[float, float], d_t: tuple[float, float]) -> float:
        p, q = 1 / (1 + math.exp(d_s[0] - d_s[1])), 1 / (1 + math.exp(d_t[0] - d_t[1]))
        return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))

    anchor_0 = divergence((1.0, math.sqrt(2)), (chord(20), chord(40)))
    anchor_1 = divergence((1.0, math.sqrt(3)), (chord(20), chord(70)))
    assert nearest.item() == pytest.approx((anchor_0 + anchor_1) / 2, rel=1e-12)


def test_an_impostor_at_the_positives_distance_is_none() -> None:
    student, teacher = on_circle(0, 60, -60), on_circle(0, 10, 90)
    labels = torch.tensor([0, 0, 1])
    # Anchor 0: positive and other class both at D = 1, a tie. Anchor 1: positive at 1, other class at √3.
    only_anchor_1 = comparison_matching(student, teacher, labels, temperature=0.7)
    expected = comparison_loop(student, teacher, labels, temperature=0.7)
    assert only_anchor_1.item() == pytest.approx(expected.item(), rel=1e-12)
    assert only_anchor_1.item() > 0
    labels = torch.tensor([0, 0, 1, 0])  # a copy of 60° makes anchors 0 and the copy tie again, not the others
    student, teacher = torch.cat((student, student[1:2])), torch.cat((teacher, teacher[1:2]))
    assert comparison_matching(student, teacher, labels, temperature=0.7).item() == pytest.approx(
        comparison_loop(student, teacher, labels, temperature=0.7).item(), rel=1e-12
    )


@pytest.mark.parametrize("bound", [{"max_negatives": 39}, {"max_negatives": 10**6}, {"margin": 2.0}, {"margin": 9.0}])
def test_bounds_that_bind_nothing_change_nothing(bound: dict[str, Any]) -> None:
    student, teacher, labels = batch(40, 4, seed=1)
    free = comparison_matching(student, teacher, labels, temperature=0.5)
    bounded = comparison_matching(student, teacher, labels, temperature=0.5, **bound)
    torch.testing.assert_close(bounded, free, rtol=1e-13, atol=0)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (bounded, free)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-15)


def test_a_margin_just_below_the_largest_gap_takes_the_general_path() -> None:
    student, teacher, labels = batch(40, 4, seed=1)
    free = comparison_matching(student, teacher, labels, temperature=0.05)
    bounded = comparison_matching(student, teacher, labels, temperature=0.05, margin=1.9999)
    torch.testing.assert_close(bounded, free, rtol=1e-13, atol=0)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_gradcheck(rule: dict[str, Any]) -> None:
    student, teacher, labels = batch(10, 3, seed=3)
    assert torch.autograd.gradcheck(
        lambda s: comparison_matching(s, teacher, labels, temperature=0.5, student_temperature=0.8, **rule), (student,)
    )


def test_no_gradient_reaches_the_teacher_and_none_is_needed() -> None:
    student, teacher, labels = batch(10, 2, seed=0)
    teacher.requires_grad_()
    comparison_matching(student, teacher, labels, temperature=0.5).backward()
    assert teacher.grad is None
    with torch.no_grad():
        loss = comparison_matching(student, teacher, labels, temperature=0.5)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(comparison_loop(student, teacher, labels, temperature=0.5).item(), rel=1e-12)


DEGENERATE = {
    "no positive pair": (on_circle(0, 50, 100), [0, 1, 2]),
    "one class": (on_circle(0, 50, 100), [4, 4, 4]),
    "no impostor: positives are farthest": (on_circle(0, 180, 90), [0, 0, 1]),
    "all images identical": (on_circle(30, 30, 30, 30), [0, 0, 1, 1]),
    "one image": (on_circle(30), [0]),
    "no image": (torch.zeros(0, 2, dtype=torch.float64), []),
    "zero embeddings": (torch.zeros(4, 2, dtype=torch.float64), [0, 0, 1, 1]),
}


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("case", DEGENERATE)
def test_without_tuples_loss_and_gradient_are_0(case: str, rule: dict[str, Any]) -> None:
    rows, classes = DEGENERATE[case]
    student = rows.clone().requires_grad_()
    loss = comparison_matching(student, rows, torch.tensor(classes, dtype=torch.int64), temperature=0.5, **rule)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_identical_positives_and_dead_embeddings_have_finite_gradients() -> None:
    student = torch.cat((on_circle(0, 0, 90, 120), torch.zeros(2, 2, dtype=torch.float64))).requires_grad_()
    teacher = on_circle(0, 5, 45, 50, 90, 91)
    loss = comparison_matching(student, teacher, torch.tensor([0, 0, 1, 1, 0, 1]), temperature=0.5)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() > 0
    assert gradient.isfinite().all()
    assert gradient[0].norm() > 0
    assert torch.equal(gradient[4:], torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_values_that_are_not_finite_name_their_model(model: str, value: float) -> None:
    student, teacher, labels = batch(8, 2, seed=0)
    rows = {"student": student.detach(), "teacher": teacher}
    rows[model][3, 1] = value
    for check in (check_finite, lambda s, t: comparison_matching(s, t, labels, temperature=0.5)):
        with pytest.raises(NonFiniteEmbeddingError, match=model) as raised:
            check(rows["student"], rows["teacher"])
        assert isinstance(raised.value, ValueError)
        assert ("student" in str(raised.value)) == (model == "student")


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_where_nobody_looks_nan_reaches_the_loss(
    model: str, rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "check_batch", lambda *_: None)  # what a CUDA device does: no check at the step
    student, teacher, labels = batch(8, 2, seed=0)
    rows = {"student": student.detach(), "teacher": teacher}
    rows[model][3, 1] = math.nan
    assert comparison_matching(rows["student"], rows["teacher"], labels, temperature=0.5, **rule).isnan()
    assert comparison_matching(rows["student"], rows["teacher"], torch.arange(8), temperature=0.5).isnan()  # no tuple


def test_float32_loses_only_the_rounding_of_input_and_output() -> None:
    student, teacher, labels = batch(256, 50, seed=0, dims=(64, 64))
    for temperature in (0.05, 0.5, 4.0):
        exact = comparison_matching(student, teacher, labels, temperature=temperature)
        (exact_gradient,) = torch.autograd.grad(exact, student)
        rounded = student.detach().float().requires_grad_()
        loss = comparison_matching(rounded, teacher.float(), labels, temperature=temperature)
        (gradient,) = torch.autograd.grad(loss, rounded)
        assert loss.dtype == gradient.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.item(), rel=2e-7)
        assert (gradient - exact_gradient).norm() < 2e-7 * exact_gradient.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_exactly_from_its_values(dtype: torch.dtype) -> None:
    student, teacher, labels = batch(32, 4, seed=0)
    half = student.detach().to(dtype).requires_grad_()
    loss = comparison_matching(half, teacher.to(dtype), labels, temperature=0.5)
    exact = comparison_matching(half.double(), teacher.to(dtype).double(), labels, temperature=0.5)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-7)
    (gradient,) = torch.autograd.grad(loss, half)
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()
    assert gradient.norm() > 0


def test_autocast_changes_nothing() -> None:
    student, teacher, labels = batch(32, 4, seed=0)
    rounded = student.detach().float().requires_grad_()
    plain = comparison_matching(rounded, teacher.float(), labels, temperature=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        cast = comparison_matching(rounded, teacher.float(), labels, temperature=0.5)
    assert torch.equal(plain, cast)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    num_images=st.integers(2, 30),
    num_classes=st.integers(1, 6),
    max_negatives=st.none() | st.integers(1, 8),
    margin=st.none() | st.floats(0.01, 1.0),
    temperature=st.floats(0.02, 5.0),
)
def test_order_and_scale_do_not_matter_and_the_loss_is_a_divergence(
    seed: int,
    num_images: int,
    num_classes: int,
    max_negatives: int | None,
    margin: float | None,
    temperature: float,
) -> None:
    student, teacher, labels = batch(num_images, num_classes, seed)
    rule: dict[str, Any] = {"max_negatives": max_negatives, "margin": margin, "temperature": temperature}
    loss = comparison_matching(student, teacher, labels, **rule)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() >= -1e-15
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))
    permuted = comparison_matching(student[order], teacher[order], labels[order], **rule)
    torch.testing.assert_close(permuted, loss, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(permuted, student)[0], gradient, rtol=1e-9, atol=1e-12)
    scaled = comparison_matching(3.0 * student, 0.25 * teacher, labels + 7, **rule)
    torch.testing.assert_close(scaled, loss, rtol=1e-11, atol=1e-14)
    alike = comparison_matching(student, student.detach(), labels, **rule)
    assert abs(alike.item()) < 1e-12
    assert torch.autograd.grad(alike, student)[0].abs().max() < 1e-12


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": 0.002}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": 1.0, "student_temperature": -1.0}, "student_temperature"),
        ({"temperature": 1.0, "max_negatives": 0}, "max_negatives"),
        ({"temperature": 1.0, "margin": 0.0}, "margin"),
    ],
)
def test_a_wrong_setting_is_named(setting: dict[str, Any], message: str) -> None:
    student, teacher, labels = batch(4, 2, seed=0)
    with pytest.raises(ValueError, match=f"^{message} must"):
        comparison_matching(student, teacher, labels, **setting)


def test_wrong_shapes_are_named() -> None:
    student, teacher, labels = batch(4, 2, seed=0)
    with pytest.raises(ValueError, match=r"^labels must be \[B\]"):
        comparison_matching(student, teacher[:3], labels, temperature=1.0)
    with pytest.raises(ValueError, match=r"^student and teacher must be \[B, D\]"):
        comparison_matching(student[0], teacher, labels, temperature=1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_cuda_equals_cpu(rule: dict[str, Any]) -> None:
    student, teacher, labels = batch(200, 10, seed=0)
    loss = comparison_matching(student, teacher, labels, temperature=0.1, **rule)
    (gradient,) = torch.autograd.grad(loss, student)
    there = student.detach().cuda().requires_grad_()
    loss_there = comparison_matching(there, teacher.cuda(), labels.cuda(), temperature=0.1, **rule)
    torch.testing.assert_close(loss_there.cpu(), loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss_there, there)[0].cpu(), gradient, rtol=1e-9, atol=1e-13)
    there = there.detach().index_fill(0, torch.tensor([3], device="cuda"), math.nan)
    assert comparison_matching(there, teacher.cuda(), labels.cuda(), temperature=0.1, **rule).isnan()


@pytest.mark.parametrize("extra", [0, 1, 5])
def test_known_size_of_the_largest_class_changes_nothing(extra: int) -> None:
    generator = torch.Generator().manual_seed(4)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 3, 3])
    teacher = torch.randn(10, 5, dtype=torch.float64, generator=generator)
    results = []
    for largest in (None, 4 + extra):
        student = torch.randn(10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        student.requires_grad_()
        loss = comparison_matching(student, teacher, labels, temperature=0.5, largest_class=largest)
        loss.backward()
        results.append((loss.item(), student.grad))
    # the size itself changes no bit; a larger one pads sums with zeros, which may move the last
    tolerance = 0.0 if extra == 0 else 1e-15
    assert results[1][0] == pytest.approx(results[0][0], abs=tolerance)
    assert results[0][0] > 0
    assert torch.allclose(results[0][1], results[1][1], rtol=0, atol=tolerance)
