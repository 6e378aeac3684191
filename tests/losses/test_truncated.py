import math
from typing import Any

import pytest
import torch
from loop_reference import truncated_loop
from torch import Tensor

from refilled.losses import NonFiniteEmbeddingError, comparison_matching, truncated, truncated_comparison_matching

MARGINS = [None, 0.05, 0.2, 0.7]


def batch(num_images: int, num_classes: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(num_images, d, generator=generator, dtype=torch.float64) for d in (4, 3))
    return student.requires_grad_(), teacher, torch.randint(0, num_classes, (num_images,), generator=generator)


def on_circle(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack((angles.cos(), angles.sin()), dim=1)


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize(("num_images", "num_classes"), [(6, 2), (12, 3), (17, 6)])
@pytest.mark.parametrize("temperatures", [(0.5, None), (0.05, None), (4.0, 1.0)])
def test_equals_the_loop(
    margin: float | None, num_images: int, num_classes: int, temperatures: tuple[float, float | None]
) -> None:
    for seed in range(3):
        student, teacher, labels = batch(num_images, num_classes, seed)
        copied = torch.arange(num_images).clamp(max=num_images - 3)  # the last three are copies, in any class
        for rows in (student, student.detach()[copied].requires_grad_()):
            rule: dict[str, Any] = {
                "temperature": temperatures[0],
                "student_temperature": temperatures[1],
                "margin": margin,
            }
            actual = truncated_comparison_matching(rows, teacher, labels, **rule)
            expected = truncated_loop(rows, teacher, labels, **rule)
            assert actual.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-300)
            gradient, expected_gradient = (torch.autograd.grad(loss, rows)[0] for loss in (actual, expected))
            assert (gradient - expected_gradient).norm() <= 1e-12 * expected_gradient.norm()


def test_the_first_by_index_are_kept_not_the_nearest() -> None:
    # Anchor 0 (0°, positive 60°, D = 1) has the impostors 180° (D = 2) and 90° (D = √2), in that order in the batch.
    # Anchor 1 (60°) has only 180° (√3): so K = 1, and anchor 0 keeps 180°, though 90° is nearer.
    student, teacher, labels = on_circle(0, 60, 180, 90), on_circle(0, 180, 60, 20), torch.tensor([0, 0, 1, 1])
    # Anchors 2 and 3 (D = √2) have the impostors 0° (2) and none: 90° to 0° is √2, a tie, and 90° to 60° is nearer.
    # Anchor 2, positive 3: D_S = (√2; 2) to image 0, and √3 to image 1: two impostors, of which image 0 is kept.
    # Tuples: (0,1;2): p = σ(1), D_T = (2; 1), q = σ(-1), KL = 0.4621172 and (1,0;2): 0.1231844 as worked out in
    # test_comparison; (2,3;0): p = σ(2 - √2) = 0.6423978, D_T(60°,20°) = 2 sin 20° = 0.6840403, D_T(60°,0°) = 1,
    # q = σ(0.3159597) = 0.5783393, KL = 0.5783393 (-0.1050470) + 0.4216607 (0.1647797) = 0.0087283.
    loss = truncated_comparison_matching(student, teacher, labels, temperature=1.0)
    assert loss.item() == pytest.approx((0.4621172 + 0.1231844 + 0.0087283) / 3, abs=1e-7)


def test_with_one_impostor_everywhere_it_is_comparison_matching() -> None:
    student, teacher, labels = on_circle(0, 60, 180), on_circle(0, 180, 60), torch.tensor([0, 0, 1])
    settings: dict[str, Any] = {"temperature": 0.5, "student_temperature": 0.25}
    truncated_loss = truncated_comparison_matching(student, teacher, labels, **settings)
    torch.testing.assert_close(truncated_loss, comparison_matching(student, teacher, labels, **settings))


@pytest.mark.parametrize("margin", [None, 0.4])
def test_gradcheck(margin: float | None) -> None:
    student, teacher, labels = batch(10, 3, seed=3)
    assert torch.autograd.gradcheck(
        lambda s: truncated_comparison_matching(s, teacher, labels, temperature=0.5, margin=margin), (student,)
    )


@pytest.mark.parametrize(
    ("rows", "classes"),
    [
        (on_circle(0, 50, 100), [0, 1, 2]),
        (on_circle(0, 50, 100), [4, 4, 4]),
        (on_circle(0, 180, 90), [0, 0, 1]),
        (on_circle(30, 30, 30, 30), [0, 0, 1, 1]),
        (torch.zeros(4, 2, dtype=torch.float64), [0, 0, 1, 1]),
        (torch.zeros(0, 2, dtype=torch.float64), []),
    ],
)
def test_without_tuples_loss_and_gradient_are_0(rows: Tensor, classes: list[int]) -> None:
    student = rows.clone().requires_grad_()
    loss = truncated_comparison_matching(
        student, rows, torch.tensor(classes, dtype=torch.int64), temperature=0.5, margin=0.2
    )
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_half_precision_and_identical_positives_are_finite() -> None:
    student = on_circle(0, 0, 90, 120).bfloat16().requires_grad_()
    loss = truncated_comparison_matching(student, on_circle(0, 5, 45, 50), torch.tensor([0, 0, 1, 1]), temperature=0.5)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.dtype == torch.float32
    assert loss.item() > 0
    assert gradient.isfinite().all()


def test_values_that_are_not_finite_name_their_model(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, labels = batch(8, 2, seed=0)
    teacher[2, 0] = math.nan
    with pytest.raises(NonFiniteEmbeddingError, match="of the teacher holds"):
        truncated_comparison_matching(student, teacher, labels, temperature=0.5)
    monkeypatch.setattr(truncated, "check_batch", lambda *_: None)
    assert truncated_comparison_matching(student, teacher, labels, temperature=0.5).isnan()
    assert truncated_comparison_matching(student, teacher, torch.arange(8), temperature=0.5).isnan()  # no tuple
