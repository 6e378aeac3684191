import math

import pytest
import torch
from torch import Tensor

from refilled.losses import contrastive
from refilled.losses.contrastive import contrastive_logits, contrastive_nce, sample_negatives

LABELS = torch.tensor([2, 0, 1, 1, 0, 2, 2, 0, 1, 3, 0, 2, 2, 1, 0, 3])  # in no order, classes of 5, 4, 5 and 2


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def positive_scores(num_images: int, num_negatives: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(num_images, 1 + num_negatives, generator=generator, dtype=torch.float64)).exp()


def nce_loop(scores: Tensor, num_images: int) -> Tensor:
    noise = (scores.shape[1] - 1) / num_images
    rows = []
    for row in scores:
        value = -(row[0] / (row[0] + noise + 1e-7)).log()
        for h in row[1:]:
            value = value - (noise / (h + noise + 1e-7)).log()
        rows.append(value)
    return torch.stack(rows)


def test_value_of_the_authors_code() -> None:
    scores = torch.tensor([[2, 0.5, 0.1], [1, 0.2, 0.3]], dtype=torch.float64)
    values = contrastive_nce(scores.log(), num_images=10)
    assert values.shape == (2,)
    assert values.sum().item() / 2 == pytest.approx(1.77265, rel=1e-6)


@pytest.mark.parametrize(("num_images", "num_negatives"), [(1, 1), (2, 3), (5, 20)])
def test_nce_equals_the_loop_in_value_and_gradient(num_images: int, num_negatives: int) -> None:
    for seed, num_rows in enumerate((7, 100, 25_000)):
        scores = positive_scores(num_images, num_negatives, seed).requires_grad_()
        values, expected = contrastive_nce(scores.log(), num_images=num_rows), nce_loop(scores, num_rows)
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=0)
        upstream = torch.arange(1.0, 1 + num_images, dtype=torch.float64)
        gradients = [torch.autograd.grad(v, scores, upstream)[0] for v in (values, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-11, atol=0)


def test_nce_of_small_scores_keeps_its_digits_in_float32() -> None:
    # h is 1 / N on average: ln(c / (h + c)) taken as it stands would have three digits left, here all off alike.
    scores = torch.cat((positive_scores(3, 16_384, seed=0), torch.ones(1, 16_385, dtype=torch.float64)))
    scores /= scores.mean(1, keepdim=True) * 25_000
    expected = nce_loop(scores.float().double(), 25_000)
    values = contrastive_nce(scores.float().log(), num_images=25_000)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=0)
    half = contrastive_nce(scores.bfloat16().log(), num_images=25_000)
    assert half.dtype == torch.float32
    torch.testing.assert_close(
        half, contrastive_nce(scores.bfloat16().log().float(), num_images=25_000), rtol=0, atol=0
    )


def test_nce_falls_with_the_positive_and_rises_with_the_negatives() -> None:
    scores = positive_scores(6, 9, seed=1).requires_grad_()
    values = contrastive_nce(scores.log(), num_images=50)
    (gradient,) = torch.autograd.grad(values.sum(), scores)
    assert bool((values > 0).all())
    assert bool((gradient[:, 0] < 0).all())
    assert bool((gradient[:, 1:] > 0).all())


def embeddings(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embedding [3, 4], memory [9, 4], rows [3, 6]."""
    generator = torch.Generator().manual_seed(seed)
    embedding, memory = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (3, 9))
    return embedding.requires_grad_(), memory, torch.randint(0, 9, (3, 6), generator=generator)


def logits_loop(embedding: Tensor, memory: Tensor, rows: Tensor, temperature: float) -> Tensor:
    return torch.stack(
        [
            torch.stack([(u * memory[j]).sum() / temperature for j in chosen])
            for u, chosen in zip(embedding, rows.tolist(), strict=True)
        ]
    )


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_logits_equal_the_loop(temperature: float) -> None:
    embedding, memory, rows = embeddings(seed=0)
    memory.requires_grad_()
    expected = logits_loop(embedding, memory.detach(), rows, temperature)
    upstream = torch.rand(expected.shape, dtype=torch.float64)
    (expected_gradient,) = torch.autograd.grad(expected, embedding, upstream)
    logits = contrastive_logits(embedding, memory, rows, temperature=temperature)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-14)
    (logits * upstream).sum().backward()
    assert memory.grad is None
    assert embedding.grad is not None
    torch.testing.assert_close(embedding.grad, expected_gradient, rtol=1e-11, atol=1e-14)


def test_logits_do_not_change_under_a_common_rotation() -> None:
    embedding, memory, rows = embeddings(seed=1)
    rotation, _ = torch.linalg.qr(embeddings(seed=2)[1][:4])
    logits = contrastive_logits(embedding, memory, rows, temperature=0.5)
    rotated = contrastive_logits(embedding @ rotation, memory @ rotation, rows, temperature=0.5)
    torch.testing.assert_close(rotated, logits, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_are_float32_at_least_under_autocast_too(dtype: torch.dtype) -> None:
    embedding, memory, rows = embeddings(seed=0)
    low, low_memory = embedding.detach().to(dtype), memory.to(dtype)
    expected = logits_loop(low.double(), low_memory.double(), rows, 0.5).float()
    with torch.autocast("cpu", torch.bfloat16):
        logits = contrastive_logits(low, low_memory, rows, temperature=0.5)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_gradient_stays_finite_where_scores_leave_float32() -> None:
    """At temperature 0.02 scores span exp(100); a factor 1 / h² in the gradient left float32 at h below 1e-19."""
    gradients = []
    for dtype in (torch.float64, torch.float32):
        cosines = torch.tensor([[-0.9, 0.1, 0.9], [0.9, -0.9, 0.0]], dtype=dtype, requires_grad=True)
        contrastive_nce(cosines / 0.02 - 45.0, num_images=500).sum().backward()
        assert cosines.grad is not None
        gradients.append(cosines.grad.double())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_negatives", [1, 4, 11])
def test_negatives_are_of_other_classes_and_distinct(num_negatives: int) -> None:
    ids = torch.arange(len(LABELS))
    rows = sample_negatives(LABELS, ids, num_negatives=num_negatives, seed=3, step_key=5)
    assert rows.shape == (len(LABELS), num_negatives)
    assert rows.dtype == torch.int64
    assert bool((LABELS[rows] != LABELS[:, None]).all())
    assert bool((rows.diff(dim=1) > 0).all())  # ascending, so distinct


def test_all_negatives_are_taken_where_there_are_just_enough_and_repeat_where_there_are_too_few() -> None:
    ids = torch.tensor([0, 2, 9])  # classes 2, 1 and 3 with 11, 12 and 14 other images
    rows = sample_negatives(LABELS, ids, num_negatives=12, seed=3, step_key=5)
    assert rows[1].tolist() == (LABELS != 1).nonzero().flatten().tolist()
    assert len(rows[2].unique()) == 12
    assert len(rows[0].unique()) < 12
    many = sample_negatives(LABELS, ids, num_negatives=4000, seed=3, step_key=5)
    for image, drawn in zip(ids.tolist(), many, strict=True):
        others = LABELS.ne(LABELS[image]).nonzero().flatten()
        counts = torch.bincount(drawn, minlength=len(LABELS))
        assert counts.nonzero().flatten().tolist() == others.tolist()
        mean = 4000 / len(others)
        assert (counts[others] - mean).abs().max() < 5 * math.sqrt(mean)


@pytest.mark.parametrize("num_negatives", [7, 12, 40])  # all distinct, some repeated, all repeated
def test_negatives_depend_on_seed_step_and_image_alone(num_negatives: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(ids: Tensor, seed: int = 3, step_key: int = 5) -> Tensor:
        return sample_negatives(LABELS, ids, num_negatives=num_negatives, seed=seed, step_key=step_key)

    ids = torch.arange(len(LABELS))
    whole = draw(ids)
    shuffled = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(shuffled), whole[shuffled])
    assert torch.equal(draw(shuffled[:3]), whole[shuffled[:3]])
    assert torch.equal(draw(torch.tensor([4, 4], dtype=torch.int32)), whole[[4, 4]])
    monkeypatch.setattr(contrastive, "CPU_CHUNK", 1)  # one image a chunk
    assert torch.equal(draw(ids), whole)
    for other in (draw(ids, seed=4), draw(ids, step_key=6)):
        assert int((other != whole).any(1).sum()) > len(LABELS) // 2
    same_class = (LABELS == 0).nonzero().flatten()
    assert len(draw(same_class).unique(dim=0)) == len(same_class)


def test_distinct_negatives_are_uniform_and_images_independent() -> None:
    labels = torch.tensor([0] * 10 + [1] * 20 + [2] * 10)
    ids, num_steps, num_negatives = torch.tensor([0, 1]), 600, 15
    drawn = torch.zeros(num_steps, 2, len(labels))
    for step in range(num_steps):
        rows = sample_negatives(labels, ids, num_negatives=num_negatives, seed=1, step_key=step)
        drawn[step].scatter_(1, rows, 1.0)
    share = num_negatives / 30  # 1/2, standard deviation of a mean 1/2 / √600
    assert not drawn[:, :, :10].any()
    assert (drawn[:, :, 10:].mean(0) - share).abs().max() < 4.5 * 0.5 / math.sqrt(num_steps)
    together = (drawn[:, 0, 10:] * drawn[:, 1, 10:]).mean(0)
    assert (together - share**2).abs().max() < 4.5 * math.sqrt(3 / 16 / num_steps)
    centred = drawn[:, 0, 10:] - share
    by_pair = centred.T @ centred / num_steps  # without replacement: covariance -1/4 / 29 off the diagonal
    off_diagonal = by_pair[~torch.eye(30, dtype=torch.bool)]
    assert (off_diagonal + 0.25 / 29).abs().max() < 5 * 0.25 / math.sqrt(num_steps)


def test_no_image_has_no_negatives() -> None:
    ids = torch.zeros(0, dtype=torch.int64)
    assert sample_negatives(LABELS, ids, num_negatives=3, seed=1, step_key=0).shape == (0, 3)


def test_wrong_arguments_are_named() -> None:
    ids, scores = torch.tensor([0, 1]), torch.ones(2, 3)
    embedding, memory, rows = embeddings(seed=0)
    for wrong in (scores[:, :1], scores[0]):
        with pytest.raises(ValueError, match=r"^log_scores must be \[b, 1 \+ K\]"):
            contrastive_nce(wrong, num_images=10)
    with pytest.raises(ValueError, match=r"^num_images must"):
        contrastive_nce(scores, num_images=0)
    for wrong_memory, wrong_rows in ((memory[:, :3], rows), (memory, rows[:2]), (memory, rows[0])):
        with pytest.raises(ValueError, match=r"^embedding must be \[b, d\], memory"):
            contrastive_logits(embedding, wrong_memory, wrong_rows, temperature=1.0)
    for temperature in (0.0, math.nan):
        with pytest.raises(ValueError, match=r"^temperature must be above 0"):
            contrastive_logits(embedding, memory, rows, temperature=temperature)
    with pytest.raises(ValueError, match=r"^labels must be \[N\]"):
        sample_negatives(LABELS[None], ids, num_negatives=1, seed=0, step_key=0)
    with pytest.raises(ValueError, match=r"^num_negatives must"):
        sample_negatives(LABELS, ids, num_negatives=0, seed=0, step_key=0)
    for outside in (-1, 16):
        with pytest.raises(ValueError, match=r"^image_ids must lie in 0..15"):
            sample_negatives(LABELS, torch.tensor([0, outside]), num_negatives=1, seed=0, step_key=0)
    with pytest.raises(ValueError, match=r"^An image needs images of another class"):
        sample_negatives(torch.zeros_like(LABELS), ids, num_negatives=1, seed=0, step_key=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("num_negatives", [7, 12, 40])
def test_cuda_draws_the_same_negatives(num_negatives: int) -> None:
    ids = torch.arange(len(LABELS))
    here = sample_negatives(LABELS, ids, num_negatives=num_negatives, seed=1, step_key=2)
    there = sample_negatives(LABELS.cuda(), ids.cuda(), num_negatives=num_negatives, seed=1, step_key=2)
    assert torch.equal(there.cpu(), here)
