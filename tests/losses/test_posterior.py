import math
from typing import Any

import pytest
import torch
from loop_reference import posterior_loop

from refilled.losses import instance_weights, teacher_posterior

EMBEDDING = torch.tensor([[2.0, 1.0]], dtype=torch.float64)
PROTOTYPES = torch.tensor([[3.0, 0.0], [0.0, 0.5], [3.0, 4.0]], dtype=torch.float64)
CLASSES = torch.tensor([0, 2])


def test_numbers_worked_out_by_hand() -> None:
    # Directions (1, 0), (0, 1), (0.6, 0.8): similarities 2, 1, 1.2 + 0.8 = 2.
    # `prototype` over S = {0, 1} at τ = 2: softmax(1, 0.5) = σ(0.5) = 0.6224593.
    posterior = teacher_posterior(EMBEDDING, PROTOTYPES, torch.tensor([0, 1]), form="prototype", temperature=2.0)
    assert posterior[0].tolist() == pytest.approx([0.6224593, 0.3775407], abs=1e-7)
    # `cosine_share`: shares 0.4, 0.2, 0.4 over all three classes, then softmax(0.8, 0.4) = σ(0.4) = 0.5986877.
    posterior = teacher_posterior(EMBEDDING, PROTOTYPES, torch.tensor([0, 1]), form="cosine_share", temperature=0.5)
    assert posterior[0].tolist() == pytest.approx([0.5986877, 0.4013123], abs=1e-7)


@pytest.mark.parametrize("form", ["prototype", "cosine_share"])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_loop_in_any_order(form: Any, temperature: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    prototypes = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    if seed % 2:
        embedding, prototypes = embedding.relu() + 0.01, prototypes.relu() + 0.01
    classes = torch.tensor([0, 3, 4, 7])
    actual = teacher_posterior(embedding, prototypes, classes, form=form, temperature=temperature)
    expected = torch.tensor(posterior_loop(embedding, prototypes, classes, form, temperature), dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-14)
    order = torch.randperm(9, generator=generator)
    permuted = teacher_posterior(embedding[order], prototypes, classes, form=form, temperature=temperature)
    torch.testing.assert_close(permuted, actual[order], rtol=1e-13, atol=0)
    scaled = teacher_posterior(embedding, 5 * prototypes, classes, form=form, temperature=temperature)
    torch.testing.assert_close(scaled, actual, rtol=1e-11, atol=1e-14)


def test_cosine_share_is_nearly_uniform_and_prototype_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.rand(50, 64, generator=generator)
    embedding = 5 * prototypes + 0.1 * torch.rand(50, 64, generator=generator)
    share, sharp = (
        instance_weights(
            teacher_posterior(embedding, prototypes, torch.arange(50), form=form, temperature=1.0), rule="confidence"
        )
        for form in ("cosine_share", "prototype")
    )
    assert 0.039 < share.min() < share.max() < 0.041  # 2 / 51 = 0.0392
    assert sharp.max() > 0.5


def test_a_denominator_that_cancels_gives_equal_shares() -> None:
    prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    embedding = torch.tensor([[1.0, -1.0], [1.0, -1.0 + 1e-9], [0.0, 0.0]], dtype=torch.float64)
    posterior = teacher_posterior(embedding, prototypes, torch.tensor([0, 1]), form="cosine_share", temperature=1.0)
    assert posterior.tolist() == [[0.5, 0.5]] * 3


def test_a_prototype_of_length_0_has_similarity_0() -> None:
    prototypes = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    embedding = torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    posterior = teacher_posterior(embedding, prototypes, torch.tensor([0, 1]), form="prototype", temperature=1.0)
    assert posterior[0, 0].item() == pytest.approx(1 / (1 + math.exp(-2)), rel=1e-14)


@pytest.mark.parametrize("form", ["prototype", "cosine_share"])
def test_half_precision_autocast_and_detachment(form: Any) -> None:
    half = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    prototypes = torch.rand(4, 8, generator=torch.Generator().manual_seed(1))
    classes = torch.tensor([1, 3])
    plain = teacher_posterior(half, prototypes, classes, form=form, temperature=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        cast = teacher_posterior(half, prototypes, classes, form=form, temperature=0.5)
    assert torch.equal(plain, cast)
    assert plain.dtype == torch.float32
    assert not plain.requires_grad
    exact = teacher_posterior(half.double(), prototypes.double(), classes, form=form, temperature=0.5)
    torch.testing.assert_close(plain.double(), exact, rtol=1e-7, atol=1e-8)


def test_wrong_arguments_are_named() -> None:
    form: Any = "cosine"
    with pytest.raises(ValueError, match="form must be prototype or cosine_share, got 'cosine'"):
        teacher_posterior(EMBEDDING, PROTOTYPES, CLASSES, form=form, temperature=1.0)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        teacher_posterior(EMBEDDING, PROTOTYPES, CLASSES, form="prototype", temperature=0.0)
    with pytest.raises(ValueError, match="must share D"):
        teacher_posterior(EMBEDDING, PROTOTYPES[:, :1], CLASSES, form="prototype", temperature=1.0)
