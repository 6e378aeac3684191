import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_reference import softmax_loop

from refilled.losses import instance_weights


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def random_rows(seed: int, num_rows: int = 6, num_columns: int = 4) -> torch.Tensor:
    return 2 * torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_confidence_by_hand() -> None:
    # 2σ(log m) = 2m / (1 + m): m = 1 -> 1, m = 0.5 -> 2/3, m = 0.25 -> 0.4.
    posterior = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4], dtype=torch.float64)
    assert instance_weights(posterior, rule="confidence").tolist() == pytest.approx([1.0, 2 / 3, 0.4], rel=1e-15)


def test_gap_by_hand() -> None:
    teacher = torch.tensor([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    student = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    # KL: 0; 0.75 log 1.5 + 0.25 log 0.5 = 0.3040988 - 0.1732868 = 0.1308120; log 2, 2σ(-log 2) = 2/3; infinite -> 0.
    weights = instance_weights(teacher, rule="gap", student_posterior=student).tolist()
    assert weights == pytest.approx([1.0, 2 * sigmoid(-0.1308120), 2 / 3, 0.0], abs=1e-7)


def test_own_head_by_hand() -> None:
    # Logit gaps 0, log 3, 40: cross-entropies log 2, log 4/3, 0; scaled 1, log(4/3) / log 2 = 0.4150375, 0.
    logits = torch.tensor([[1.0, 1.0], [0.0, math.log(3)], [40.0, 0.0]], dtype=torch.float64)
    weights = instance_weights(torch.ones(3, 1, dtype=torch.float64), rule="own_head", teacher_logits=logits).tolist()
    assert weights == pytest.approx([2 * sigmoid(-1), 2 * sigmoid(-0.4150375), 1.0], abs=1e-7)
    assert weights[0] == pytest.approx(0.538, abs=1e-3)


def test_none_is_ones() -> None:
    assert instance_weights(torch.ones(3, 2, dtype=torch.float64), rule="none").tolist() == [1.0, 1.0, 1.0]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), num_rows=st.integers(1, 8), num_columns=st.integers(1, 6))
def test_equals_the_loop_in_any_order(seed: int, num_rows: int, num_columns: int) -> None:
    teacher_scores, student_scores = (random_rows(seed + k, num_rows, num_columns) for k in (0, 1))
    teacher = [softmax_loop(row) for row in teacher_scores.tolist()]
    student = [softmax_loop(row) for row in student_scores.tolist()]
    losses = [-math.log(max(row)) for row in teacher]
    span = max(losses) - min(losses)
    expected = {
        "confidence": [2 * sigmoid(math.log(max(row))) for row in teacher],
        "gap": [
            2 * sigmoid(-sum(q * math.log(q / p) for q, p in zip(*rows, strict=True)))
            for rows in zip(teacher, student, strict=True)
        ],
        "own_head": [2 * sigmoid(-((loss - min(losses)) / span if span > 1e-12 else 0.0)) for loss in losses],
        "none": [1.0] * num_rows,
    }
    arguments: dict[str, Any] = {"student_posterior": student_scores.softmax(1), "teacher_logits": teacher_scores}
    order = torch.randperm(num_rows)
    permuted = {name: rows[order] for name, rows in arguments.items()}
    posterior = teacher_scores.softmax(1)
    for name, values in expected.items():
        rule: Any = name
        weights = instance_weights(posterior, rule=rule, **arguments)
        assert weights.tolist() == pytest.approx(values, rel=1e-9, abs=1e-12)
        shuffled = instance_weights(posterior[order], rule=rule, **permuted)
        torch.testing.assert_close(shuffled, weights[order], rtol=1e-9, atol=1e-12)


def test_own_head_of_equally_confident_images_is_1_not_nan() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.1], [0.1, 3.0, 1.0], [1.0, 0.1, 3.0]])  # equal up to the order of summation
    weights = instance_weights(torch.ones(3, 1), rule="own_head", teacher_logits=logits)
    assert weights.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("rule", ["confidence", "gap", "own_head", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_weights_are_detached_and_at_least_float32(rule: Any, dtype: torch.dtype) -> None:
    scores = random_rows(0).to(dtype).requires_grad_()
    posterior = scores.softmax(1)
    weights = instance_weights(posterior, rule=rule, student_posterior=posterior.roll(1, 1), teacher_logits=scores)
    assert not weights.requires_grad
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert weights.shape == (6,)
    assert ((weights >= 0) & (weights <= 1)).all()
    rows = posterior.double()
    exact = instance_weights(rows, rule=rule, student_posterior=rows.roll(1, 1), teacher_logits=scores.double())
    torch.testing.assert_close(weights.double(), exact, rtol=1e-7, atol=0)
    empty = instance_weights(posterior[:0], rule=rule, student_posterior=posterior[:0], teacher_logits=scores[:0])
    assert empty.shape == (0,)


def test_what_is_missing_or_unknown_is_named() -> None:
    posterior = torch.ones(2, 1)
    with pytest.raises(ValueError, match="gap needs student_posterior"):
        instance_weights(posterior, rule="gap")
    with pytest.raises(ValueError, match="own_head needs teacher_logits"):
        instance_weights(posterior, rule="own_head")
    rule: Any = "pl"
    with pytest.raises(ValueError, match="rule must be confidence, gap, own_head or none, got 'pl'"):
        instance_weights(posterior, rule=rule)
