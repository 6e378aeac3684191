import math
from typing import Any

import pytest
import torch
from torch import Tensor

from refilled.losses import NonFiniteEmbeddingError, asymmetric
from refilled.losses.asymmetric import asymmetric_matching

STUDENT = torch.tensor([[1, 0, 0], [0, 2, 0], [0, 0, 1], [1, 1, 1]], dtype=torch.float64)
TEACHER = torch.tensor([[1, 0, 1], [0, 1, 0], [2, 2, 1], [-1, 1, 0]], dtype=torch.float64)
LABELS = torch.tensor([0, 0, 1, 1])

VARIANTS = ["contr", "contr_plus", "regression"]
PAIRS = ["sum", "mean", "hardest"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def batch(num_images: int, num_classes: int, seed: int, dim: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(num_images, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(0, num_classes, (num_images,), generator=generator)


def value_and_gradient(student: Tensor, teacher: Tensor, labels: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    loss = asymmetric_matching(student, teacher, labels, **settings)
    (gradient,) = torch.autograd.grad(loss, student)
    return loss, gradient


def tuple_loop(anchor: Tensor, positives: list[Tensor], negatives: list[Tensor], margin: float, pairs: str) -> Tensor:
    """1/2 Σ D² + 1/2 Σ max(0, margin - D)² of one anchor, straight from the equation; rows are normalised here."""

    def distance(other: Tensor) -> Tensor:
        a, b = (row / row.pow(2).sum().sqrt() for row in (anchor, other))
        return 0.0 * a.sum() if torch.equal(a, b) else (a - b).pow(2).sum().sqrt()

    near = [0.5 * distance(p) ** 2 for p in positives]
    far = sorted((distance(n) for n in negatives), key=lambda d: round(d.item(), 11))  # stable: the first in the batch
    if pairs == "hardest":
        far = far[:5]
    beyond = [0.5 * torch.relu(margin - d) ** 2 for d in far]
    zero = 0.0 * anchor.sum()
    positive, negative = sum(near, zero), sum(beyond, zero)
    if pairs != "sum" and near:
        positive = positive / len(near)
    if pairs == "mean" and beyond:
        negative = negative / len(beyond)
    return positive + negative


def loop(student: Tensor, teacher: Tensor, labels: Tensor, *, margin: float, variant: str, pairs: str) -> Tensor:
    y = labels.tolist()
    total = 0.0 * student.sum()
    for i in range(len(y)):
        others = [j for j in range(len(y)) if y[j] == y[i] and j != i]
        chosen = {"contr": others, "contr_plus": [*others, i], "regression": [i]}[variant]
        negatives = [] if variant == "regression" else [teacher[j] for j in range(len(y)) if y[j] != y[i]]
        total = total + tuple_loop(student[i], [teacher[j] for j in chosen], negatives, margin, pairs)
    return total / len(y)


def assert_equals_loop(student: Tensor, teacher: Tensor, labels: Tensor, **settings: Any) -> None:
    loss, gradient = value_and_gradient(student, teacher, labels, **settings)
    expected = loop(student, teacher, labels, **settings)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert (gradient - expected_gradient).norm() <= 1e-12 * expected_gradient.norm() + 1e-15


@pytest.mark.parametrize(
    ("variant", "expected"), [("contr", 0.760546), ("contr_plus", 1.25044), ("regression", 0.489890)]
)
def test_values_of_the_specification(variant: Any, expected: float) -> None:
    loss = asymmetric_matching(STUDENT, TEACHER, LABELS, margin=0.7, variant=variant, pairs="sum")
    half_a_digit = 0.5 * 10.0 ** (math.floor(math.log10(expected)) - 5)  # six digits are given
    assert loss.item() == pytest.approx(expected, abs=1.001 * half_a_digit)


@pytest.mark.parametrize(("positive", "expected"), [(1, 1.0), (0, 0.292893)])
def test_the_loop_gives_the_tuples_of_the_authors_code(positive: int, expected: float) -> None:
    actual = tuple_loop(STUDENT[0], [TEACHER[positive]], [TEACHER[2], TEACHER[3]], 0.7, "sum")
    assert actual.item() == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("num_images", "num_classes"), [(2, 1), (2, 2), (9, 2), (17, 6), (24, 2), (6, 1)])
def test_equals_the_loop_in_value_and_gradient(variant: str, pairs: str, num_images: int, num_classes: int) -> None:
    for seed, margin in enumerate((0.7, 1.4, 2.5)):
        rows = batch(num_images, num_classes, seed)
        assert_equals_loop(*rows, margin=margin, variant=variant, pairs=pairs)


def test_numbers_worked_out_by_hand() -> None:
    # On the unit circle, student and teacher of images 0 and 1 (one class), 2 and 3 (another).
    degrees = torch.tensor([[0.0, 180.0, 180.0, 180.0], [0.0, 60.0, 60.0, 90.0]], dtype=torch.float64)
    student, teacher = (torch.stack((a.cos(), a.sin()), 1) for a in degrees * math.pi / 180)
    labels = torch.tensor([0, 0, 1, 1])
    settings: dict[str, Any] = {"margin": 1.5, "variant": "contr"}
    # Positives: anchor 0 (0°) and 60°: D² = 1; then from 180°, anchor 1 and 0°: 4; anchor 2 and 90°: 2; 3 and 60°: 3.
    positives = (1 + 4 + 2 + 3) / 2
    # Negatives: anchor 0 at D = 1 and √2; anchor 1 at √3, beyond the margin, and √2; anchors 2 and 3 at 2 and √3.
    near, far = 0.5**2 / 2, (1.5 - math.sqrt(2)) ** 2 / 2
    for pairs, negatives in (("sum", near + 2 * far), ("mean", (near + 2 * far) / 2), ("hardest", near + 2 * far)):
        loss = asymmetric_matching(student, teacher, labels, pairs=pairs, **settings)
        assert loss.item() == pytest.approx((positives + negatives) / 4, rel=1e-12)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_copies_have_derivative_0_and_equal_the_loop(variant: str, pairs: str) -> None:
    # Students on their own teacher row, on one of their class and on one of another class.
    _, teacher, labels = batch(14, 3, seed=4)
    student = (2.0 * teacher[[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6]]).requires_grad_()
    assert_equals_loop(student, teacher, labels, margin=0.9, variant=variant, pairs=pairs)


def test_of_negatives_that_tie_the_first_in_the_batch_count() -> None:
    student = torch.tensor([[1.0, 0.1]], dtype=torch.float64).expand(9, 2).clone().requires_grad_()
    teacher = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(9, 2).clone()
    labels = torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 0])
    is_nearest = asymmetric._nearest(torch.zeros(9, 9, dtype=torch.float64) + 0.5, labels[:, None] != labels[None, :])
    assert is_nearest[0].nonzero().flatten().tolist() == [1, 2, 3, 4, 5]
    assert is_nearest[1].nonzero().flatten().tolist() == [0, 8]
    assert_equals_loop(student, teacher, labels, margin=0.9, variant="contr", pairs="hardest")


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant: Any, pairs: Any) -> None:
    student, teacher, labels = batch(10, 3, seed=3)
    assert torch.autograd.gradcheck(
        lambda s: asymmetric_matching(s, teacher, labels, margin=1.2, variant=variant, pairs=pairs), (student,)
    )


@pytest.mark.parametrize("pairs", PAIRS)
def test_a_student_equal_to_its_teacher_keeps_the_teachers_floor(pairs: Any) -> None:
    student, _, labels = batch(12, 3, seed=7)
    loss, gradient = value_and_gradient(student, 5.0 * student, labels, margin=0.7, variant="regression", pairs=pairs)
    assert abs(loss.item()) < 1e-30
    assert gradient.abs().max() < 1e-15
    # With a class's images at one place, and classes beyond the margin, the floor of the others is 0 too.
    rows = torch.eye(3, dtype=torch.float64)[labels].requires_grad_()
    for variant in ("contr", "contr_plus"):
        loss, gradient = value_and_gradient(rows, rows, labels, margin=0.7, variant=variant, pairs=pairs)
        assert loss.item() == 0
        assert not gradient.any()
        assert asymmetric_matching(student, student, labels, margin=0.7, variant=variant, pairs=pairs).item() > 0


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_lengths_a_common_rotation_and_the_order_change_nothing(variant: str, pairs: str) -> None:
    student, teacher, labels = batch(20, 3, seed=5)
    settings: dict[str, Any] = {"margin": 1.0, "variant": variant, "pairs": pairs}
    loss, gradient = value_and_gradient(student, teacher, labels, **settings)
    rotation, _ = torch.linalg.qr(batch(3, 1, seed=6)[0].detach())
    lengths = torch.linspace(0.1, 9.0, 20, dtype=torch.float64)[:, None]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(8))
    moved, moved_gradient = value_and_gradient(
        (lengths * student.detach() @ rotation)[order].requires_grad_(),
        (teacher @ rotation / lengths)[order],
        labels[order] + 7,
        **settings,
    )
    torch.testing.assert_close(moved, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(moved_gradient @ rotation.T * lengths[order], gradient[order], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_gradient_reaches_the_teacher(variant: Any, pairs: Any) -> None:
    student, teacher, labels = batch(8, 2, seed=0)
    teacher.requires_grad_()
    asymmetric_matching(student, teacher, labels, margin=0.7, variant=variant, pairs=pairs).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.norm() > 0


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_images", [0, 1])
def test_the_smallest_batches_are_defined(variant: Any, pairs: Any, num_images: int) -> None:
    student = torch.tensor([[1.0, 0.0]], dtype=torch.float64)[:num_images].requires_grad_()
    teacher = torch.tensor([[0.0, 1.0]], dtype=torch.float64)[:num_images]
    labels = torch.zeros(num_images, dtype=torch.int64)
    loss, gradient = value_and_gradient(student, teacher, labels, margin=0.7, variant=variant, pairs=pairs)
    expected = 0.0 if variant == "contr" or not num_images else 1.0  # D² = 2
    assert loss.item() == pytest.approx(expected, abs=1e-15)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_is_computed_exactly_from_its_values(dtype: torch.dtype, pairs: str) -> None:
    student, teacher, labels = batch(16, 3, seed=0)
    low = student.detach().to(dtype).requires_grad_()
    settings: dict[str, Any] = {"margin": 0.7, "variant": "contr_plus", "pairs": pairs}
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradient = value_and_gradient(low, teacher.to(dtype), labels, **settings)
    exact, exact_gradient = value_and_gradient(
        low.detach().double().requires_grad_(), teacher.to(dtype).double(), labels, **settings
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-7)
    assert gradient.dtype == dtype
    assert (gradient - exact_gradient).norm() < torch.finfo(dtype).eps * exact_gradient.norm()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_values_that_are_not_finite_name_their_model_or_reach_the_loss(
    model: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher, _ = batch(6, 2, seed=0)
    labels = torch.tensor([0, 0, 0, 1, 0, 0])
    rows = {"student": student.detach(), "teacher": teacher}
    rows[model][3, 1] = math.nan
    settings: dict[str, Any] = {"margin": 0.7, "variant": variant, "pairs": "hardest"}
    with pytest.raises(NonFiniteEmbeddingError, match=model):
        asymmetric_matching(rows["student"], rows["teacher"], labels, **settings)
    monkeypatch.setattr(asymmetric, "check_batch", lambda *_: None)  # what a CUDA device does: no check at the step
    for images in (slice(0, 6), slice(3, 4)):  # the second is in no pair for `contr`
        loss = asymmetric_matching(rows["student"][images], rows["teacher"][images], labels[images], **settings)
        assert loss.isnan()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"margin": 0.0}, "margin"),
        ({"margin": math.nan}, "margin"),
        ({"margin": math.inf}, "margin"),
        ({"variant": "contr+"}, "variant"),
        ({"pairs": "all"}, "pairs"),
    ],
)
def test_a_wrong_setting_is_named(setting: dict[str, Any], message: str) -> None:
    settings = {"margin": 0.7, "variant": "contr", "pairs": "mean", **setting}
    with pytest.raises(ValueError, match=f"^{message} must"):
        asymmetric_matching(STUDENT, TEACHER, LABELS, **settings)


def test_wrong_shapes_are_named() -> None:
    settings: dict[str, Any] = {"margin": 0.7, "variant": "contr", "pairs": "mean"}
    with pytest.raises(ValueError, match=r"^student and teacher must be \[B, D\] of one D"):
        asymmetric_matching(STUDENT, TEACHER[:, :2], LABELS, **settings)
    with pytest.raises(ValueError, match=r"^labels must be \[B\]"):
        asymmetric_matching(STUDENT, TEACHER, LABELS[:3], **settings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_cuda_equals_cpu(variant: str, pairs: str) -> None:
    student, teacher, labels = batch(200, 10, seed=0, dim=16)
    settings: dict[str, Any] = {"margin": 1.2, "variant": variant, "pairs": pairs}
    loss, gradient = value_and_gradient(student, teacher, labels, **settings)
    there = student.detach().cuda().requires_grad_()
    loss_there, gradient_there = value_and_gradient(there, teacher.cuda(), labels.cuda(), **settings)
    torch.testing.assert_close(loss_there.cpu(), loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient_there.cpu(), gradient, rtol=1e-9, atol=1e-13)
