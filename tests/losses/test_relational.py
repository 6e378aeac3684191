import math

import pytest
import torch
from torch import Tensor

from refilled.losses import NonFiniteEmbeddingError, relational
from refilled.losses.relational import relational_distillation

WEIGHTS = [(1.0, 0.0), (0.0, 1.0), (25.0, 50.0)]

STUDENT = torch.tensor([[1, 0, 0], [0, 2, 0], [0, 0, 1], [1, 1, 1]], dtype=torch.float64)
TEACHER = torch.tensor([[1, 0], [0, 1], [2, 2], [-1, 1]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def batch(num_images: int, seed: int, dims: tuple[int, int] = (4, 3)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(num_images, d, generator=generator, dtype=torch.float64) for d in dims)
    return student.requires_grad_(), teacher


def value_and_gradient(student: Tensor, teacher: Tensor, weights: tuple[float, float]) -> tuple[Tensor, Tensor]:
    loss = relational_distillation(student, teacher, distance_weight=weights[0], angle_weight=weights[1])
    (gradient,) = torch.autograd.grad(loss, student)
    return loss, gradient


def huber(x: Tensor) -> Tensor:
    return x * x / 2 if abs(x.item()) < 1 else x.abs() - 0.5


def distance_loop(student: Tensor, teacher: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.float64)
    relative = []
    for rows in (student, teacher):
        distances = [[zero if torch.equal(a, b) else (a - b).pow(2).sum().sqrt() for b in rows] for a in rows]
        positive = [d for row in distances for d in row if d.item() > 0]
        mean = sum(positive, zero) / len(positive) if positive else zero + 1
        relative.append([[d / mean for d in row] for row in distances])
    terms = [huber(s - t) for ss, ts in zip(*relative, strict=True) for s, t in zip(ss, ts, strict=True)]
    return sum(terms, zero) / len(terms)


def angle_loop(student: Tensor, teacher: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.float64)

    def cosine(rows: Tensor, i: int, j: int, k: int) -> Tensor:
        if torch.equal(rows[i], rows[j]) or torch.equal(rows[i], rows[k]):
            return zero
        to_j, to_k = rows[j] - rows[i], rows[k] - rows[i]
        return (to_j * to_k).sum() / (to_j.pow(2).sum().sqrt() * to_k.pow(2).sum().sqrt())

    images = range(len(student))
    terms = [huber(cosine(student, i, j, k) - cosine(teacher, i, j, k)) for i in images for j in images for k in images]
    return sum(terms, zero) / len(terms)


def assert_equals_loop(student: Tensor, teacher: Tensor, weights: tuple[float, float]) -> None:
    loss, gradient = value_and_gradient(student, teacher, weights)
    expected = weights[0] * distance_loop(student, teacher) + weights[1] * angle_loop(student, teacher)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert (gradient - expected_gradient).norm() <= 1e-11 * expected_gradient.norm()


@pytest.mark.parametrize(
    ("weights", "expected"),
    [((1.0, 0.0), 0.0836557), ((0.0, 1.0), 0.109892), ((25.0, 50.0), 7.58601), ((1.0, 2.0), 0.303441)],
)
def test_values_of_the_authors_code(weights: tuple[float, float], expected: float) -> None:
    loss, _ = value_and_gradient(STUDENT.clone().requires_grad_(), TEACHER, weights)
    half_a_digit = 0.5 * 10.0 ** (math.floor(math.log10(expected)) - 5)  # six digits are given
    assert loss.item() == pytest.approx(expected, abs=1.001 * half_a_digit)


def test_the_gradient_flows_through_the_students_mean_distance() -> None:
    # With the mean held constant row 0 were (0.004848, -0.023904, 0.028417) and the norm 0.133093.
    _, gradient = value_and_gradient(STUDENT.clone().requires_grad_(), TEACHER, (1.0, 0.0))
    assert gradient[0].tolist() == pytest.approx([-0.001551, -0.015026, 0.036256], abs=5.01e-7)
    assert gradient.norm().item() == pytest.approx(0.133837, abs=5.01e-7)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("num_images", [3, 7, 9])
def test_equals_the_loop_in_value_and_gradient(weights: tuple[float, float], num_images: int) -> None:
    for seed in range(3):
        assert_equals_loop(*batch(num_images, seed), weights)


def test_two_images_relate_alike_in_every_model() -> None:
    # One distance, which is its own mean, and from either image the angle 0.
    loss, gradient = value_and_gradient(*batch(2, seed=0), (25.0, 50.0))
    assert loss.item() == pytest.approx(0.0, abs=1e-15)
    assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize("weights", WEIGHTS)
def test_identical_images_are_at_distance_0_and_do_not_count_in_the_mean(weights: tuple[float, float]) -> None:
    student, teacher = batch(8, seed=1)
    student = student.detach()[[0, 1, 2, 3, 0, 1, 0, 4]].requires_grad_()
    assert_equals_loop(student, teacher[[0, 1, 2, 3, 0, 5, 6, 4]], weights)  # some copies for the student only


@pytest.mark.parametrize("weights", WEIGHTS)
def test_far_from_the_origin_the_digits_of_the_gradient_stay(weights: tuple[float, float]) -> None:
    student, teacher = batch(6, seed=4)
    _, gradient = value_and_gradient(student, teacher, weights)
    _, far = value_and_gradient((student.detach() + 1e4).requires_grad_(), teacher - 1e4, weights)
    assert (far - gradient).norm() < 1e-10 * gradient.norm()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_nearly_identical_images_keep_their_angles(weights: tuple[float, float]) -> None:
    student, teacher = batch(6, seed=2)
    rows = student.detach().clone()
    rows[1] = rows[0] + 1e-6 * rows[1]
    loss = relational_distillation(rows, teacher, distance_weight=weights[0], angle_weight=weights[1])
    expected = weights[0] * distance_loop(rows, teacher) + weights[1] * angle_loop(rows, teacher)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradcheck(weights: tuple[float, float]) -> None:
    student, teacher = batch(6, seed=3)
    assert torch.autograd.gradcheck(
        lambda s: relational_distillation(s, teacher, distance_weight=weights[0], angle_weight=weights[1]), (student,)
    )


@pytest.mark.parametrize("entries", [1, 50, 1000, 3000])  # one pair at a time, some rows of an anchor, some anchors
def test_chunks_of_triplets_add_up(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = batch(21, seed=0)
    monkeypatch.setattr(relational, "CPU_CHUNK", 21**3)
    whole, whole_gradient = value_and_gradient(student, teacher, (0.0, 1.0))
    monkeypatch.setattr(relational, "CPU_CHUNK", entries)
    chunked, gradient = value_and_gradient(student, teacher, (0.0, 1.0))
    torch.testing.assert_close(chunked, whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize(("num_images", "entries"), [(256, 2**17), (1024, 2**17), (300, 2**16), (3, 1), (1, 4), (0, 4)])
def test_chunks_are_bounded_and_cover_every_pair_once(num_images: int, entries: int) -> None:
    seen = torch.zeros(num_images, num_images)
    for anchors, rows in relational._chunks(num_images, entries):
        seen[anchors, rows] += 1
        assert seen[anchors, rows].numel() * num_images <= max(entries, num_images)
    assert bool((seen == 1).all())


@pytest.mark.parametrize("weights", WEIGHTS)
def test_rotation_shift_and_scale_of_either_model_change_nothing(weights: tuple[float, float]) -> None:
    student, teacher = batch(12, seed=5, dims=(4, 4))
    loss, gradient = value_and_gradient(student, teacher, weights)
    rotation, _ = torch.linalg.qr(batch(4, seed=6)[0].detach())
    moved, moved_gradient = value_and_gradient(
        (3.0 * student.detach() @ rotation + 2.0).requires_grad_(), 0.1 * teacher @ rotation - 1.0, weights
    )
    torch.testing.assert_close(moved, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(3.0 * moved_gradient @ rotation.T, gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_student_equal_to_its_teacher_has_loss_and_gradient_0(weights: tuple[float, float]) -> None:
    student, _ = batch(12, seed=7)
    loss, gradient = value_and_gradient(student, student, weights)
    assert loss.item() == 0
    assert not gradient.any()


def test_no_gradient_reaches_the_teacher_and_none_is_needed() -> None:
    student, teacher = batch(8, seed=0)
    teacher.requires_grad_()
    loss = relational_distillation(student, teacher, distance_weight=1.0, angle_weight=2.0)
    loss.backward()
    assert teacher.grad is None
    with torch.no_grad():
        same = relational_distillation(student, teacher, distance_weight=1.0, angle_weight=2.0)
    assert not same.requires_grad
    assert torch.equal(same, loss)


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_without_a_positive_distance_loss_and_gradient_are_0(num_images: int) -> None:
    student = torch.ones(num_images, 2, dtype=torch.float64, requires_grad=True)
    loss, gradient = value_and_gradient(student, torch.zeros(num_images, 5, dtype=torch.float64), (25.0, 50.0))
    assert loss.item() == 0
    assert torch.equal(gradient, torch.zeros_like(student))


def test_a_collapsed_student_has_a_loss_but_no_gradient() -> None:
    # Three images at teacher distances 1, 1, 1: D / μ = 1 off the diagonal, h(1) = 1/2 for 6 of 9 pairs. Angles seen
    # from an image: 1 (twice, j = k) and 1/2 (twice), h = 1/2 and 1/8, for 3 anchors, over 27.
    teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]], dtype=torch.float64)
    student = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    for weights, expected in (((1.0, 0.0), 3 / 9), ((0.0, 1.0), 3 * (2 / 2 + 2 / 8) / 27)):
        loss, gradient = value_and_gradient(student, teacher, weights)
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        assert not gradient.any()


def test_a_term_of_weight_0_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = batch(5, seed=0)
    loss, gradient = value_and_gradient(student, teacher, (0.0, 0.0))
    assert loss.item() == 0
    assert not gradient.any()
    monkeypatch.setattr(relational, "_AngleTerm", None)
    value_and_gradient(student, teacher, (1.0, 0.0))
    monkeypatch.undo()
    monkeypatch.setattr(relational, "_distance_term", None)
    value_and_gradient(student, teacher, (0.0, 1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_is_computed_exactly_from_its_values(dtype: torch.dtype) -> None:
    student, teacher = batch(16, seed=0)
    low = student.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradient = value_and_gradient(low, teacher.to(dtype), (1.0, 2.0))
    exact, exact_gradient = value_and_gradient(
        low.detach().double().requires_grad_(), teacher.to(dtype).double(), (1.0, 2.0)
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-7)
    assert gradient.dtype == dtype
    assert (gradient - exact_gradient).norm() < torch.finfo(dtype).eps * exact_gradient.norm()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_values_that_are_not_finite_name_their_model_or_reach_the_loss(
    model: str, weights: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = batch(6, seed=0)
    rows = {"student": student.detach(), "teacher": teacher}
    rows[model][3, 1] = math.nan
    with pytest.raises(NonFiniteEmbeddingError, match=model):
        relational_distillation(**rows, distance_weight=weights[0], angle_weight=weights[1])
    monkeypatch.setattr(relational, "_check", lambda *_: None)  # what a CUDA device does: no check at the step
    loss = relational_distillation(**rows, distance_weight=weights[0], angle_weight=weights[1])
    assert loss.isnan()


def test_wrong_arguments_are_named() -> None:
    student, teacher = batch(4, seed=0)
    for wrong in (teacher[:3], teacher[0]):
        with pytest.raises(ValueError, match=r"^student and teacher must be \[B, D\] of one B"):
            relational_distillation(student, wrong, distance_weight=1.0, angle_weight=1.0)
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"^distance_weight must"):
            relational_distillation(student, teacher, distance_weight=value, angle_weight=1.0)
        with pytest.raises(ValueError, match=r"^angle_weight must"):
            relational_distillation(student, teacher, distance_weight=1.0, angle_weight=value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("weights", WEIGHTS)
def test_cuda_equals_cpu(weights: tuple[float, float]) -> None:
    student, teacher = batch(100, seed=0)
    loss, gradient = value_and_gradient(student, teacher, weights)
    there, gradient_there = value_and_gradient(student.detach().cuda().requires_grad_(), teacher.cuda(), weights)
    torch.testing.assert_close(there.cpu(), loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient_there.cpu(), gradient, rtol=1e-9, atol=1e-13)
