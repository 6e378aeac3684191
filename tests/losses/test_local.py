import pytest
import torch
import torch.nn.functional as F
from loop_reference import local_loop
from torch import Tensor

from refilled.losses import local_distillation

CLASSES = torch.tensor([0, 2, 3])


def batch(seed: int, num_images: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_images, 5, generator=generator, dtype=torch.float64)
    posterior = (2 * torch.randn(num_images, 3, generator=generator, dtype=torch.float64)).softmax(1)
    weights = torch.rand(num_images, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), posterior, weights


def test_numbers_worked_out_by_hand() -> None:
    # S = {0, 2}, τ = 2: logits (2, 0) / 2 -> p = σ(1) = 0.7310586, log p = (-0.3132617, -1.3132617).
    # The logit 9 is not in S.
    # q = (0.5, 0.5): KL = log 0.5 + 0.5 (0.3132617 + 1.3132617) = -0.6931472 + 0.8132617 = 0.1201145, weight 2.
    # q = (1, 0), logits equal: KL = log 2 = 0.6931472, weight 0.5. Mean: (0.2402290 + 0.3465736) / 2 = 0.2934013.
    logits = torch.tensor([[2.0, 9.0, 0.0], [1.0, 9.0, 1.0]], dtype=torch.float64)
    posterior = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    weights = torch.tensor([2.0, 0.5], dtype=torch.float64)
    loss = local_distillation(logits, posterior, torch.tensor([0, 2]), weights, temperature=2.0)
    assert loss.item() == pytest.approx(0.2934013, abs=1e-7)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_loop_and_torch_in_any_order(temperature: float, seed: int) -> None:
    logits, posterior, weights = batch(seed)
    loss = local_distillation(logits, posterior, CLASSES, weights, temperature=temperature)
    expected = local_loop(logits.detach(), posterior, CLASSES, weights, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    by_torch = F.kl_div((logits[:, CLASSES] / temperature).log_softmax(1), posterior, reduction="none").sum(1)
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected_gradient,) = torch.autograd.grad((by_torch * weights).mean(), logits)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-15)
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    permuted = local_distillation(logits[order], posterior[order], CLASSES, weights[order], temperature=temperature)
    torch.testing.assert_close(permuted, loss, rtol=1e-13, atol=0)


def test_gradcheck_and_no_gradient_outside_the_classes_present() -> None:
    logits, posterior, weights = batch(0)
    posterior.requires_grad_()
    weights.requires_grad_()
    loss = local_distillation(logits, posterior, CLASSES, weights, temperature=2.0)
    loss.backward()
    assert posterior.grad is None
    assert weights.grad is None
    assert logits.grad is not None
    assert not logits.grad[:, [1, 4]].any()
    assert torch.autograd.gradcheck(
        lambda x: local_distillation(x, posterior, CLASSES, weights, temperature=2.0), (logits,)
    )


def test_zero_probabilities_and_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[0.0, -torch.inf], [1e4, -1e4], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    posterior = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    loss = local_distillation(logits, posterior, torch.tensor([0, 1]), torch.ones(3), temperature=1.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(0.6931471805599453 / 3)
    assert gradient.isfinite().all()


def test_equal_posteriors_give_0_and_an_empty_batch_too() -> None:
    logits, _, weights = batch(1)
    same = (logits.detach()[:, CLASSES] / 4).softmax(1)
    assert abs(local_distillation(logits, same, CLASSES, weights, temperature=4.0).item()) < 1e-15
    empty = local_distillation(logits[:0], same[:0], CLASSES, weights[:0], temperature=4.0)
    assert empty.item() == 0
    assert torch.autograd.grad(empty, logits)[0].abs().max() == 0


def test_half_precision_is_computed_in_float32() -> None:
    logits, posterior, weights = batch(2)
    half = logits.detach().bfloat16().requires_grad_()
    loss = local_distillation(half, posterior.float(), CLASSES, weights.float(), temperature=0.5)
    exact = local_distillation(half.double(), posterior, CLASSES, weights, temperature=0.5)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert torch.autograd.grad(loss, half)[0].dtype == torch.bfloat16


def test_wrong_arguments_are_named() -> None:
    logits, posterior, weights = batch(0)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        local_distillation(logits, posterior, CLASSES, weights, temperature=0.0)
    for wrong in ((posterior[:, :2], weights), (posterior, weights[:3])):
        with pytest.raises(ValueError, match=r"posterior must be \[7, 3\] and weights \[7\]"):
            local_distillation(logits, wrong[0], CLASSES, wrong[1], temperature=1.0)
