import pytest
import torch
from loop_reference import prototypes_loop

from refilled.losses import PrototypeSum, class_prototypes


def test_numbers_worked_out_by_hand() -> None:
    embeddings = torch.tensor([[1.0, 2.0], [5.0, 0.0], [3.0, -4.0], [0.5, 0.5]], dtype=torch.float64)
    # Class 0: ((1 + 3) / 2, (2 - 4) / 2) = (2, -1); class 1: (5, 0); class 2: (0.5, 0.5).
    means = class_prototypes(embeddings, torch.tensor([0, 1, 0, 2]), 3)
    assert means.tolist() == [[2.0, -1.0], [5.0, 0.0], [0.5, 0.5]]


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_loop_whole_and_in_batches_in_any_order(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    labels = torch.arange(60) % 7
    expected = torch.tensor(prototypes_loop(embeddings, labels, 7), dtype=torch.float64)
    order = torch.randperm(60, generator=generator)
    torch.testing.assert_close(class_prototypes(embeddings, labels, 7), expected, rtol=1e-13, atol=1e-15)
    collected = PrototypeSum(7, 5)
    for part in order.split(17):
        collected.add(embeddings[part], labels[part])
    collected.add(embeddings[:0], labels[:0])
    torch.testing.assert_close(collected.means(), expected, rtol=1e-13, atol=1e-15)
    assert collected.counts.tolist() == [9, 9, 9, 9, 8, 8, 8]
    torch.testing.assert_close(collected.sums, expected * collected.counts[:, None], rtol=1e-13, atol=1e-13)


def test_float32_and_half_precision_accumulate_in_float64() -> None:
    # 1e8 + 1 - 1e8 is 0 in float32 and 1 in float64.
    embeddings = torch.tensor([[1e8], [1.0], [-1e8]])
    means = class_prototypes(embeddings, torch.tensor([0, 0, 0]), 1)
    assert means.dtype == torch.float32
    assert means.item() == pytest.approx(1 / 3)
    assert class_prototypes(embeddings.bfloat16(), torch.tensor([0, 0, 0]), 1).dtype == torch.float32


def test_no_gradient_flows_back() -> None:
    embeddings = torch.ones(2, 3, requires_grad=True)
    assert not class_prototypes(embeddings, torch.tensor([0, 1]), 2).requires_grad


def test_an_empty_class_is_named() -> None:
    with pytest.raises(ValueError, match=r"classes \[1, 3\] have none"):
        class_prototypes(torch.ones(2, 3), torch.tensor([0, 2]), 4)


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_out_of_range_is_named_and_nothing_is_added(label: int) -> None:
    collected = PrototypeSum(2, 3)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.1"):
        collected.add(torch.ones(2, 3), torch.tensor([0, label]))
    assert collected.counts.tolist() == [0, 0]
    assert not collected.sums.any()


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"embeddings must be \[B, 4\]"):
        PrototypeSum(2, 4).add(torch.ones(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"embeddings must be \[B, D\]"):
        class_prototypes(torch.ones(2), torch.tensor([0, 1]), 2)
