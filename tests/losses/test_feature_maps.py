"""Losses on feature maps against the printed check values, plain loops and what they claim not to change with."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from refilled.losses.feature_maps import attention_loss, hint_loss, match_size, pair_maps, variational_loss

Loss = Callable[[Tensor, Tensor], Tensor]

torch.set_num_threads(1)


# ---- the check tensors and their values, made with the published implementations ------------------------------------


def check_maps() -> tuple[Tensor, Tensor, Tensor]:
    """The student's map [2, 2, 2, 2], the teacher's [2, 3, 2, 2] and the student's after a fixed 1 x 1 convolution."""
    b, c, h, w = torch.meshgrid(*(torch.arange(n) for n in (2, 3, 2, 2)), indexing="ij")
    teacher = ((3 * b + 7 * c + 2 * h + 5 * w) % 13).double() / 10 - 0.5
    student = (((7 * b + 5 * c + 3 * h + 2 * w) % 11).double() / 10 - 0.4)[:, :2]
    weight = torch.tensor([[1, 0], [0, 1], [1, -1]], dtype=torch.float64)
    return student, teacher, torch.einsum("oc,bchw->bohw", weight, student)


def check_variational(alpha: float) -> Loss:
    variance = torch.full((3,), math.log1p(math.exp(alpha)) + 1e-5, dtype=torch.float64)
    return lambda mean, teacher: variational_loss(mean, teacher, variance.to(mean.dtype))


INITIAL = math.log(math.expm1(5 - 1e-5))


@pytest.mark.parametrize(
    ("loss", "regresses", "printed"),
    [
        (hint_loss, True, "0.287917"),
        (attention_loss, False, "0.0729522"),
        (check_variational(INITIAL), True, "0.833511"),
        (check_variational(0.0), True, "0.0244357"),
    ],
    ids=["hint", "attention", "variational", "variational with another variance"],
)
def test_check_values(loss: Loss, regresses: bool, printed: str) -> None:
    raw, teacher, regressed = check_maps()
    student = regressed if regresses else raw
    exact = loss(student, teacher)
    assert exact.shape == (2,)
    assert f"{exact.mean().item():.6g}" == printed  # all six digits, as far as the print goes
    narrow = loss(student.float(), teacher.float())
    assert narrow.dtype == torch.float32
    assert narrow.double().mean().item() == pytest.approx(exact.mean().item(), rel=1e-5)


# ---- plain loops ----------------------------------------------------------------------------------------------------


def pool_loop(maps: Tensor, height: int, width: int) -> Tensor:
    """Every output position is the mean of the inputs that it covers, in part or whole."""
    tall, wide = maps.shape[2:]
    rows = []
    for i in range(height):
        top, bottom = i * tall // height, -(-(i + 1) * tall // height)
        row = []
        for j in range(width):
            left, right = j * wide // width, -(-(j + 1) * wide // width)
            inside = [maps[:, :, y, x] for y in range(top, bottom) for x in range(left, right)]
            row.append(sum(inside[1:], inside[0]) / len(inside))
        rows.append(torch.stack(row, 2))
    return torch.stack(rows, 2)


def hint_loop(regressed: Tensor, teacher: Tensor) -> Tensor:
    """[B]."""
    found = []
    for ours, theirs in zip(regressed, teacher.tolist(), strict=True):
        squares = [
            (ours[c, h, w] - theirs[c][h][w]) ** 2
            for c in range(ours.shape[0])
            for h in range(ours.shape[1])
            for w in range(ours.shape[2])
        ]
        found.append(sum(squares[1:], squares[0]) / len(squares))
    return torch.stack(found)


def attention_of_loop(image: Tensor) -> list[Tensor]:
    values = []
    for h in range(image.shape[1]):
        for w in range(image.shape[2]):
            squares = [image[c, h, w] ** 2 for c in range(image.shape[0])]
            values.append(sum(squares[1:], squares[0]) / len(squares))
    norm = sum((v**2 for v in values[1:]), values[0] ** 2).sqrt()
    return [v / norm for v in values]


def attention_loop(student: Tensor, teacher: Tensor) -> Tensor:
    """[B]."""
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    student, teacher = pool_loop(student, *size), pool_loop(teacher.detach(), *size)
    found = []
    for ours, theirs in zip(student, teacher, strict=True):
        pairs = zip(attention_of_loop(ours), attention_of_loop(theirs), strict=True)
        squares = [(q - p) ** 2 for q, p in pairs]
        found.append(sum(squares[1:], squares[0]) / len(squares))
    return torch.stack(found)


def variational_loop(mean: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    """[B]."""
    found = []
    for ours, theirs in zip(mean, teacher.tolist(), strict=True):
        terms = [
            ((theirs[c][h][w] - ours[c, h, w]) ** 2 / variance[c] + variance[c].log()) / 2
            for c in range(ours.shape[0])
            for h in range(ours.shape[1])
            for w in range(ours.shape[2])
        ]
        found.append(sum(terms[1:], terms[0]) / len(terms))
    return torch.stack(found)


def random_maps(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(actual: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    """Values and gradients of differently weighted images."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    weights = torch.arange(1.0, len(actual) + 1, dtype=torch.float64)
    gradients, expected_gradients = (torch.autograd.grad(loss @ weights, inputs) for loss in (actual, expected))
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        assert reference.norm() > 1e-3
        torch.testing.assert_close(gradient, reference, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("seed", range(3))
def test_hint_equals_the_loop(seed: int) -> None:
    ours, theirs = random_maps(seed, 3, 4, 3, 2).requires_grad_(), random_maps(seed + 10, 3, 4, 3, 2)
    assert_same(hint_loss(ours, theirs), hint_loop(ours, theirs), ours)
    assert torch.autograd.gradcheck(lambda s: hint_loss(s, theirs), (ours,))


SIZES = [((3, 2), (3, 2)), ((4, 6), (2, 3)), ((2, 2), (6, 4)), ((5, 7), (3, 4)), ((2, 5), (3, 3))]


@pytest.mark.parametrize(("student_size", "teacher_size"), SIZES, ids=str)
def test_attention_equals_the_loop(student_size: tuple[int, int], teacher_size: tuple[int, int]) -> None:
    ours, theirs = random_maps(0, 3, 2, *student_size).requires_grad_(), random_maps(1, 3, 5, *teacher_size)
    assert_same(attention_loss(ours, theirs), attention_loop(ours, theirs), ours)
    assert torch.autograd.gradcheck(lambda s: attention_loss(s, theirs), (ours,))


@pytest.mark.parametrize("seed", range(3))
def test_variational_equals_the_loop(seed: int) -> None:
    ours, theirs = random_maps(seed, 3, 4, 3, 2).requires_grad_(), random_maps(seed + 10, 3, 4, 3, 2)
    variance = (random_maps(seed, 4).square() + 0.1).requires_grad_()
    assert_same(variational_loss(ours, theirs, variance), variational_loop(ours, theirs, variance), ours, variance)
    assert torch.autograd.gradcheck(lambda s, v: variational_loss(s, theirs, v), (ours, variance))


@pytest.mark.parametrize(("student_size", "teacher_size"), SIZES, ids=str)
def test_sizes_are_matched_by_pooling_the_larger(student_size: tuple[int, int], teacher_size: tuple[int, int]) -> None:
    ours, theirs = random_maps(0, 2, 3, *student_size), random_maps(1, 2, 4, *teacher_size)
    pooled = match_size(ours, theirs)
    size = (min(student_size[0], teacher_size[0]), min(student_size[1], teacher_size[1]))
    for before, after in zip((ours, theirs), pooled, strict=True):
        torch.testing.assert_close(after, pool_loop(before, *size), rtol=1e-13, atol=1e-14)
        if before.shape[2:] == size:
            assert after is before


# ---- what every loss must show --------------------------------------------------------------------------------------

VARIANCE = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
FLOOR = (math.log(0.5) + math.log(4.0)) / 6
LOSSES: dict[str, Loss] = {
    "hint": hint_loss,
    "attention": attention_loss,
    "variational": lambda student, teacher: variational_loss(student, teacher, VARIANCE),
}
each_loss = pytest.mark.parametrize("loss", list(LOSSES.values()), ids=list(LOSSES))


@pytest.mark.parametrize(
    ("loss", "floor"),
    [(LOSSES["hint"], 0.0), (LOSSES["attention"], 0.0), (LOSSES["variational"], FLOOR)],
    ids=list(LOSSES),
)
def test_the_teacher_itself_is_at_the_floor(loss: Loss, floor: float) -> None:
    teacher = random_maps(0, 4, 3, 3, 2)
    student = teacher.clone().requires_grad_()
    values = loss(student, teacher)
    assert values.tolist() == pytest.approx([floor] * 4, abs=1e-15)
    assert torch.autograd.grad(values.sum(), student)[0].abs().max() < 1e-15
    assert (loss(random_maps(1, 4, 3, 3, 2), teacher) > floor + 1e-3).all()


@each_loss
def test_the_teacher_gets_no_gradient(loss: Loss) -> None:
    student, teacher = random_maps(0, 4, 3, 3, 2).requires_grad_(), random_maps(1, 4, 3, 3, 2).requires_grad_()
    loss(student, teacher).sum().backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


@each_loss
@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_images_are_worth_the_same_alone(loss: Loss, num_images: int) -> None:
    student, teacher = random_maps(0, 4, 3, 3, 2).requires_grad_(), random_maps(1, 4, 3, 3, 2)
    values = loss(student[:num_images], teacher[:num_images])
    assert values.shape == (num_images,)
    torch.testing.assert_close(values, loss(student, teacher)[:num_images], rtol=1e-13, atol=0)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert not gradient[num_images:].any()


@each_loss
def test_half_precision_is_widened_also_under_autocast(loss: Loss) -> None:
    student = random_maps(0, 4, 3, 16, 16).bfloat16().requires_grad_()
    teacher = random_maps(1, 4, 3, 16, 16).bfloat16()
    exact = loss(student.double(), teacher.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = loss(student, teacher)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=1e-9)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert gradient.dtype == torch.bfloat16
    assert gradient.isfinite().all()


def test_half_precision_is_widened_before_it_is_pooled() -> None:
    student, teacher = (100 + random_maps(0, 4, 3, 16, 16)).bfloat16(), random_maps(1, 4, 3, 4, 4).bfloat16()
    exact = attention_loss(student.double(), teacher.double())
    torch.testing.assert_close(attention_loss(student, teacher).double(), exact, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-3, -1.0, 50.0])
def test_attention_does_not_see_the_scale_of_an_image(scale: float) -> None:
    student, teacher = random_maps(0, 4, 2, 3, 3), random_maps(1, 4, 5, 3, 3)
    scales = torch.tensor([scale, 1.0, 2 * scale, scale], dtype=torch.float64).view(4, 1, 1, 1)
    expected = attention_loss(student, teacher)
    torch.testing.assert_close(attention_loss(scales * student, teacher), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(attention_loss(student, scales * teacher), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(attention_loss(student.flip(1), teacher.roll(2, 1)), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_map_of_zeros_has_no_attention(dtype: torch.dtype) -> None:
    student = random_maps(0, 3, 2, 3, 3).to(dtype)
    student[1] = 0
    student.requires_grad_()
    teacher = random_maps(1, 3, 4, 3, 3).to(dtype)
    teacher[2] = 0
    values = attention_loss(student, teacher)
    assert values[1:].tolist() == pytest.approx([1 / 9, 1 / 9], rel=1e-6)  # a unit vector of 9 entries against zeros
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert gradient.isfinite().all()
    assert not gradient[1].any()


def test_the_deepest_maps_are_paired_with_the_deepest() -> None:
    three, four = ["s1", "s2", "s3"], ["t1", "t2", "t3", "t4"]
    assert pair_maps(three, four) == [("s1", "t2"), ("s2", "t3"), ("s3", "t4")]
    assert pair_maps(four, three) == [("t2", "s1"), ("t3", "s2"), ("t4", "s3")]
    assert pair_maps(three, three) == [("s1", "s1"), ("s2", "s2"), ("s3", "s3")]
    assert pair_maps((8,), (16, 32)) == [(8, 32)]
    for ours, theirs in (([], four), (three, []), ([], [])):
        with pytest.raises(ValueError, match=f"at least one map, got {len(ours)} and {len(theirs)}"):
            pair_maps(ours, theirs)


def test_wrong_shapes_are_named() -> None:
    maps = torch.ones(2, 3, 4, 4)
    for other in (maps[:1], maps[:, :2], maps[..., :2], maps[0]):
        with pytest.raises(ValueError, match=r"regressed and teacher must be .* of one shape, got \[2, 3, 4, 4\]"):
            hint_loss(maps, other)
        with pytest.raises(ValueError, match=r"mean and teacher must be .* of one shape"):
            variational_loss(maps, other, torch.ones(3))
    for ours, theirs in ((maps, maps[:1]), (maps[:, 0], maps), (maps, maps[:, 0]), (maps[:, 0], maps[:, 0])):
        with pytest.raises(ValueError, match=r"student and teacher must be \[B, channels, height, width\] of the same"):
            match_size(ours, theirs)
        with pytest.raises(ValueError, match=r"student and teacher must be"):
            attention_loss(ours, theirs)
    for variance in (torch.ones(2), torch.ones(1), torch.ones(2, 3)):
        with pytest.raises(ValueError, match=r"variance must be \[3\], one a channel"):
            variational_loss(maps, maps, variance)
