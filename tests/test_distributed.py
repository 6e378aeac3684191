"""Several real gloo processes against one process on the whole batch, in float64."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from gloo_workers import run_workers
from torch import Tensor, nn

from refilled import batch_norm, distributed
from refilled.batch_norm import GlobalBatchNorm1d, GlobalBatchNorm2d, convert_batch_norm
from refilled.distributed import (
    gather_rows,
    rank,
    sum_gradients,
    sum_over_workers,
    world_size,
)
from refilled.keyed import keyed_uint64
from refilled.models import Model, build_model

torch.set_num_threads(1)

BATCH = 8
SHARES = {
    2: [(4, 4), (5, 3), (8, 0)],
    3: [(3, 3, 2), (5, 3, 0), (0, 1, 7)],
    4: [(2, 2, 2, 2), (4, 0, 3, 1)],
}
ALL_SHARES = SHARES[2] + SHARES[3] + SHARES[4]


@dataclass
class Step:
    """What one training step computed."""

    loss: float
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


def make_model(dropout: float = 0.3) -> Model:
    model = build_model("wrn-10-1", num_classes=3, in_channels=3, image_size=16, dropout=dropout, seed=4).double()
    model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    return model


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(BATCH, 3, 16, 16, generator=generator, dtype=torch.float64) + 2
    return pixels, torch.arange(BATCH) % 3, keyed_uint64(1, 2, torch.arange(BATCH))


def share_of(shares: tuple[int, ...], worker: int) -> slice:
    return slice(sum(shares[:worker]), sum(shares[: worker + 1]))


def step(model: nn.Module, share: slice, counts: tuple[int, ...] | None = None) -> Step:
    """A step whose loss looks at all pairs of the global batch."""
    pixels, labels, keys = (tensor[share] for tensor in batch())
    output = model(pixels, keys)
    embedding = F.normalize(gather_rows(output.embedding, counts))
    logits, all_labels = gather_rows(output.logits, counts), gather_rows(labels)
    distances = (embedding.unsqueeze(1) - embedding.unsqueeze(0)).square().sum(dim=2).add(1e-6).sqrt()
    same = all_labels.unsqueeze(1) == all_labels
    comparisons = F.softplus(distances[same].unsqueeze(1) - distances[~same])  # every positive pair, every negative
    loss = comparisons.mean() + F.cross_entropy(logits, all_labels)
    loss.backward()
    sum_gradients(model.parameters())
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return Step(loss.item(), gradients, dict(model.named_buffers()))


def largest_difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    assert first.keys() == second.keys()
    assert [value is None for value in first.values()] == [value is None for value in second.values()]
    return max(
        (a - b).abs().max().item() for a, b in zip(first.values(), second.values(), strict=True) if a is not None
    )


# ---- what the workers run -------------------------------------------------------------------------------------------


def check_gather() -> dict[str, Any]:
    """Gathers of several types, where worker r has 2 - r rows; the gradient of a loss of everything."""
    me, own = rank(), max(0, 2 - rank())
    rows = (torch.arange(own * 3, dtype=torch.float64).view(own, 3) + 10 * me).requires_grad_()
    gathered = gather_rows(rows)
    gathered.square().prod(dim=1).sum().backward()
    counts = tuple(max(0, 2 - r) for r in range(world_size()))
    found = {
        "rows": gathered.detach(),
        "gradient": rows.grad,
        "own": rows.detach(),
        "with_counts": gather_rows(rows, counts).detach(),
        "nothing": gather_rows(torch.zeros(0, 4)),
        "sum": sum_over_workers(torch.tensor([1.0, me])),
    }
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.float32):
        found[str(dtype)] = gather_rows(torch.full((own, 2), me, dtype=dtype))
    try:
        gather_rows(rows, (7,) * world_size())
    except ValueError as error:
        found["refusal"] = str(error)
    return found


def check_sum_gradients() -> dict[str, Tensor | None]:
    """Gradients that exist everywhere, on rank 0 only, nowhere, in another dtype, in another memory format."""
    everywhere, on_zero, nowhere = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    low = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    dense = nn.Parameter(torch.zeros(2, 3, 2, 2).to(memory_format=torch.channels_last))
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    everywhere.grad = torch.tensor([1.0, rank()])
    on_zero.grad = torch.ones(2) if rank() == 0 else None
    low.grad = torch.full((2,), 2.0, dtype=torch.bfloat16)
    values = torch.arange(24.0).view(2, 3, 2, 2)
    dense.grad = values.to(memory_format=torch.channels_last) if rank() == 0 else values.clone()
    sum_gradients([everywhere, low, on_zero, nowhere, frozen, dense])
    return {
        "everywhere": everywhere.grad,
        "on_zero": on_zero.grad,
        "nowhere": nowhere.grad,
        "low": low.grad,
        "dense": dense.grad,
        "frozen": frozen.grad,
    }


def offset_images(dtype: torch.dtype) -> Tensor:
    """Images whose mean is 1,000 times their deviation: sums of squares about zero lose all digits in float32."""
    generator = torch.Generator().manual_seed(1)
    return (1000 + torch.randn(BATCH, 4, 6, 6, generator=generator, dtype=torch.float64)).to(dtype)


def norm_layer(kind: type[nn.BatchNorm2d], affine: bool = True, momentum: float | None = 0.1) -> nn.BatchNorm2d:
    layer = kind(4, affine=affine, momentum=momentum)
    if affine:
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([0.5, 1.0, 1.5, -1.0]))
            layer.bias.copy_(torch.tensor([0.0, 0.1, 0.2, 0.3]))
    return layer


def check_norm(shares: tuple[int, ...]) -> dict[str, Any]:
    own = share_of(shares, rank())
    layer = norm_layer(GlobalBatchNorm2d)
    float32 = layer(offset_images(torch.float32)[own])
    low = norm_layer(GlobalBatchNorm2d)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pixels = (offset_images(torch.float64) - 1000).bfloat16()[own].requires_grad_()
        bfloat16 = low(pixels)
        bfloat16.float().pow(3).sum().backward()
    plain = norm_layer(GlobalBatchNorm2d, affine=False, momentum=None).double()
    inputs = offset_images(torch.float64)[own].requires_grad_()
    for _ in range(2):
        plain_output = plain(inputs)
    gather_rows(plain_output).pow(3).sum().backward()
    evaluated = plain.eval()(inputs)
    return {
        "float32": float32.detach(),
        "running_var": layer.running_var,
        "bfloat16": bfloat16.detach(),
        "bfloat16_gradient": pixels.grad,
        "plain": plain_output.detach(),
        "plain_gradient": inputs.grad,
        "plain_buffers": dict(plain.named_buffers()),
        "evaluated": evaluated.detach(),
    }


def step_1d(kind: type[nn.BatchNorm1d], own: slice, *trailing: int, affine: bool = True) -> dict[str, Any]:
    """Two forward passes over own rows [B, 4, ...], a loss of all rows, and a pass in evaluation."""
    layer = kind(4, affine=affine, momentum=0.1 if affine else None).double()
    if affine:
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([0.5, 1.0, 1.5, -1.0]))
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(BATCH, 4, *trailing, generator=generator, dtype=torch.float64)[own] + 2
    inputs.requires_grad_()
    for _ in range(2):
        output = layer(inputs)
    gather_rows(output).pow(3).sum().backward()
    sum_gradients(layer.parameters())
    return {
        "output": gather_rows(output.detach()),
        "gradient": gather_rows(inputs.grad),
        "evaluated": gather_rows(layer.eval()(inputs).detach()),
        **{name: parameter.grad for name, parameter in layer.named_parameters()},
        **dict(layer.named_buffers()),
    }


ARGUMENTS_1D: dict[str, tuple[tuple[int, ...], bool]] = {
    "vectors": ((), True),
    "sequences": ((5,), True),
    "vectors without affine": ((), False),
    "sequences without affine": ((5,), False),
}


def check_norm_1d(kind: type[nn.BatchNorm1d], own: slice) -> dict[str, dict[str, Any]]:
    return {name: step_1d(kind, own, *trailing, affine=a) for name, (trailing, a) in ARGUMENTS_1D.items()}


def smooth_net() -> nn.Module:
    """A small net with batch normalisation of both kinds whose second derivatives are nowhere zero."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.Softplus(),
        nn.Conv2d(4, 5, 3, stride=2, bias=False),
        nn.BatchNorm2d(5, affine=False),
        nn.Softplus(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 6),
        nn.BatchNorm1d(6),
        nn.Tanh(),
        nn.Linear(6, 3),
    ).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2 + 0.1)
    return net


def penalty_step(net: nn.Module, own: slice, *, gathers: bool) -> dict[str, Any]:
    """Gradients of a loss and its penalty, the squared norm of the loss' gradient with respect to the images.

    With `gathers` loss and penalty look at the whole global batch; else each worker has its own part of both.
    """
    pixels, labels, _ = (tensor[own] for tensor in batch())
    pixels.requires_grad_()
    logits = net(pixels)
    if gathers:
        logits, labels = gather_rows(logits), gather_rows(labels)
        loss = F.cross_entropy(logits, labels) + (logits @ logits.T).tanh().mean()
    else:
        loss = F.cross_entropy(logits, labels, reduction="sum") / BATCH
    (gradient,) = torch.autograd.grad(loss, pixels, create_graph=True)
    squares = 100 * gradient.square().flatten(1).sum(1)
    penalty = gather_rows(squares).square().sum().sqrt() if gathers else squares.sum()
    (loss + penalty).backward()
    sum_gradients(net.parameters())
    total = (loss + penalty).detach()
    return {
        "total": total if gathers else sum_over_workers(total),
        "pixels": gather_rows(pixels.grad),
        **{name: parameter.grad for name, parameter in net.named_parameters()},
    }


PENALTIES = {"parts": False, "gathered": True}


def own_rows_of_own_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    """What autograd makes of a slice: it knows nothing of the other workers' rows."""
    start = sum(ctx.counts[: rank()])
    padded = grad.new_zeros(sum(ctx.counts), *grad.shape[1:])
    padded[start : start + len(grad)] = grad
    return padded, None


BROKEN: dict[str, tuple[Any, str, Any]] = {
    "sums are not summed backward": (distributed._SumOverWorkers, "backward", staticmethod(lambda ctx, grad: grad)),
    "moments are constants": (
        batch_norm,
        "_differentiable_moments",
        lambda inputs, mean, count: (mean, batch_norm._global_moments(inputs.detach())[1]),
    ),
    "rows are cut, not gathered": (distributed._OwnRows, "backward", staticmethod(own_rows_of_own_gradient)),
}


def check_penalties(own: slice) -> dict[str, dict[str, Any]]:
    found = {
        name: penalty_step(convert_batch_norm(smooth_net()), own, gathers=gathers)
        for name, gathers in PENALTIES.items()
    }
    for name, broken in BROKEN.items():
        with mock.patch.object(*broken):
            found[name] = penalty_step(convert_batch_norm(smooth_net()), own, gathers=True)
    return found


def worker(me: int, folder: str) -> None:
    warnings.simplefilter("error")
    num_workers = world_size()
    found: dict[str, Any] = {"rank": rank(), "world_size": world_size()}
    for shares in SHARES[num_workers]:
        own = share_of(shares, me)
        found[f"step {shares}"] = vars(step(convert_batch_norm(make_model()), own))
        found[f"step with counts {shares}"] = vars(step(convert_batch_norm(make_model()), own, shares))
        found[f"norm {shares}"] = check_norm(shares)
        found[f"norm 1d {shares}"] = check_norm_1d(GlobalBatchNorm1d, own)
        found[f"penalties {shares}"] = check_penalties(own)
        if min(shares) > 1:  # broken on purpose; torch's own layer refuses to have no rows
            found[f"local {shares}"] = vars(step(make_model(), own))
            found[f"norm 1d, local {shares}"] = check_norm_1d(nn.BatchNorm1d, own)
            found[f"penalty, local {shares}"] = penalty_step(smooth_net(), own, gathers=True)
    found["gather"] = check_gather()
    found["sum_gradients"] = check_sum_gradients()
    torch.save(found, f"{folder}/found-{me}.pt")


# ---- what is asserted -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """By world size, what each worker found."""
    results = {}
    for num_workers in SHARES:
        folder: Path = tmp_path_factory.mktemp("workers")
        run_workers(worker, folder, num_workers)
        paths = [folder / f"found-{me}.pt" for me in range(num_workers)]
        results[num_workers] = [torch.load(path, weights_only=True) for path in paths]
    return results


@pytest.fixture(scope="module")
def alone() -> Step:
    """The same step of one process with torch's own batch normalisation on the whole batch."""
    return step(make_model(), slice(0, BATCH))


def of_all(found: dict[int, list[dict[str, Any]]], shares: tuple[int, ...], kind: str) -> list[dict[str, Any]]:
    return [results[f"{kind} {shares}"] for results in found[len(shares)]]


def test_without_a_process_group_all_is_the_identity() -> None:
    assert (rank(), world_size()) == (0, 1)
    rows = torch.ones(2, 3)
    assert gather_rows(rows) is rows
    assert gather_rows(rows, [2]) is rows
    assert sum_over_workers(rows) is rows
    with pytest.raises(ValueError, match="do not fit 1 workers"):
        gather_rows(rows, [3])
    parameter = nn.Parameter(rows)
    sum_gradients([parameter])
    assert parameter.grad is None


def test_workers_know_their_place(found: dict[int, list[dict[str, Any]]]) -> None:
    for num_workers, results in found.items():
        assert [r["rank"] for r in results] == list(range(num_workers))
        assert {r["world_size"] for r in results} == {num_workers}


@pytest.mark.parametrize("shares", ALL_SHARES, ids=str)
@pytest.mark.parametrize("kind", ["step", "step with counts"])
def test_step_equals_that_of_one_worker(
    found: dict[int, list[dict[str, Any]]], alone: Step, shares: tuple[int, ...], kind: str
) -> None:
    assert max(g.abs().max().item() for g in alone.gradients.values() if g is not None) > 1e-2
    for result in of_all(found, shares, kind):
        assert abs(result["loss"] - alone.loss) < 1e-10
        assert largest_difference(result["gradients"], alone.gradients) < 1e-10
        assert largest_difference(result["buffers"], alone.buffers) < 1e-10


@pytest.mark.parametrize("shares", [s for s in ALL_SHARES if min(s) > 1], ids=str)
def test_local_batch_norm_would_be_seen(
    found: dict[int, list[dict[str, Any]]], alone: Step, shares: tuple[int, ...]
) -> None:
    for result in of_all(found, shares, "local"):
        assert abs(result["loss"] - alone.loss) > 1e-6
        assert largest_difference(result["gradients"], alone.gradients) > 1e-6
        assert largest_difference(result["buffers"], alone.buffers) > 1e-6


@pytest.mark.parametrize("num_workers", SHARES)
def test_gather_rows(found: dict[int, list[dict[str, Any]]], num_workers: int) -> None:
    results = [r["gather"] for r in found[num_workers]]
    rows = torch.cat([r["own"] for r in results]).requires_grad_()
    assert rows.shape == (3, 3)
    rows.square().prod(dim=1).sum().backward()
    assert rows.grad is not None
    for result in results:
        assert torch.equal(result["rows"], rows.detach())
        assert torch.equal(result["with_counts"], rows.detach())
        assert result["nothing"].shape == (0, 4)
        assert result["sum"].tolist() == [num_workers, sum(range(num_workers))]
        assert "do not fit" in result["refusal"]
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.float32):
            expected = torch.tensor([0, 0, 1]).unsqueeze(1).expand(3, 2).to(dtype)
            assert result[str(dtype)].dtype == dtype
            assert torch.equal(result[str(dtype)], expected)
    assert torch.equal(torch.cat([r["gradient"] for r in results]), rows.grad)


@pytest.mark.parametrize("num_workers", SHARES)
def test_sum_gradients(found: dict[int, list[dict[str, Any]]], num_workers: int) -> None:
    for result in (r["sum_gradients"] for r in found[num_workers]):
        assert result["everywhere"].tolist() == [num_workers, sum(range(num_workers))]
        assert result["on_zero"].tolist() == [1, 1]
        assert result["nowhere"] is None
        assert result["frozen"] is None
        assert result["low"].dtype == torch.bfloat16
        assert result["low"].tolist() == [2 * num_workers] * 2
        assert torch.equal(result["dense"], num_workers * torch.arange(24.0).view(2, 3, 2, 2))


@pytest.mark.parametrize("shares", ALL_SHARES, ids=str)
def test_global_batch_norm_is_as_precise_as_torchs(
    found: dict[int, list[dict[str, Any]]], shares: tuple[int, ...]
) -> None:
    results = of_all(found, shares, "norm")
    exact_layer = norm_layer(nn.BatchNorm2d).double()
    exact = exact_layer(offset_images(torch.float32).double()).detach()
    native = norm_layer(nn.BatchNorm2d)(offset_images(torch.float32)).detach()
    ours = torch.cat([r["float32"] for r in results])
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() < max(2 * (native - exact).abs().max().item(), 1e-3)
    for result in results:
        torch.testing.assert_close(result["running_var"].double(), exact_layer.running_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shares", ALL_SHARES, ids=str)
def test_global_batch_norm_under_autocast(found: dict[int, list[dict[str, Any]]], shares: tuple[int, ...]) -> None:
    results = of_all(found, shares, "norm")
    pixels = (offset_images(torch.float64) - 1000).bfloat16().requires_grad_()
    output = norm_layer(nn.BatchNorm2d)(pixels)
    output.float().pow(3).sum().backward()
    ours = torch.cat([r["bfloat16"] for r in results])
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, output.detach())
    assert pixels.grad is not None
    ours = torch.cat([r["bfloat16_gradient"] for r in results])
    assert ours.dtype == torch.bfloat16
    assert (ours - pixels.grad).norm() < 0.02 * pixels.grad.norm()


@pytest.mark.parametrize("shares", ALL_SHARES, ids=str)
def test_global_batch_norm_without_affine_with_cumulative_average(
    found: dict[int, list[dict[str, Any]]], shares: tuple[int, ...]
) -> None:
    results = of_all(found, shares, "norm")
    layer = norm_layer(nn.BatchNorm2d, affine=False, momentum=None).double()
    inputs = offset_images(torch.float64).requires_grad_()
    for _ in range(2):
        output = layer(inputs)
    output.pow(3).sum().backward()
    assert inputs.grad is not None
    assert (torch.cat([r["plain"] for r in results]) - output.detach()).abs().max() < 1e-10
    assert (torch.cat([r["plain_gradient"] for r in results]) - inputs.grad).abs().max() < 1e-10
    evaluated = layer.eval()(inputs).detach()
    assert (torch.cat([r["evaluated"] for r in results]) - evaluated).abs().max() < 1e-10
    for result in results:
        assert largest_difference(result["plain_buffers"], dict(layer.named_buffers())) < 1e-10


@pytest.mark.parametrize("shares", ALL_SHARES, ids=str)
def test_global_batch_norm_of_one_dimension(found: dict[int, list[dict[str, Any]]], shares: tuple[int, ...]) -> None:
    expected = check_norm_1d(nn.BatchNorm1d, slice(0, BATCH))
    for result in of_all(found, shares, "norm 1d"):
        for name, values in expected.items():
            assert values["gradient"].abs().max() > 1
            assert largest_difference(result[name], values) < 1e-9
    if min(shares) > 1:
        for result in of_all(found, shares, "norm 1d, local"):
            for name, values in expected.items():
                for part in ("output", "gradient", "running_mean", "running_var"):
                    assert largest_difference({part: result[name][part]}, {part: values[part]}) > 1e-3


@pytest.fixture(scope="module")
def penalties_alone() -> dict[str, dict[str, Any]]:
    """Of one process with torch's own layers."""
    return {name: penalty_step(smooth_net(), slice(0, BATCH), gathers=gathers) for name, gathers in PENALTIES.items()}


@pytest.mark.parametrize("shares", ALL_SHARES, ids=str)
@pytest.mark.parametrize("kind", PENALTIES)
def test_a_penalty_of_gradients_equals_that_of_one_worker(
    found: dict[int, list[dict[str, Any]]],
    penalties_alone: dict[str, dict[str, Any]],
    shares: tuple[int, ...],
    kind: str,
) -> None:
    expected = penalties_alone[kind]
    assert all(value.abs().max() > 0.1 for name, value in expected.items() if name != "8.bias")  # which BN takes away
    for results in of_all(found, shares, "penalties"):
        assert largest_difference(results[kind], expected) < 1e-9


@pytest.mark.parametrize("shares", ALL_SHARES, ids=str)
def test_a_broken_second_derivative_would_be_seen(
    found: dict[int, list[dict[str, Any]]], penalties_alone: dict[str, dict[str, Any]], shares: tuple[int, ...]
) -> None:
    expected = penalties_alone["gathered"]
    for results in of_all(found, shares, "penalties"):
        for name in BROKEN:
            assert abs(results[name]["total"] - expected["total"]) < 1e-9  # only what is derived from it is wrong
            alone_has_all = max(shares) == BATCH and name != "moments are constants"
            assert alone_has_all or largest_difference(results[name], expected) > 1e-6
    if min(shares) > 1:
        for result in of_all(found, shares, "penalty, local"):
            assert largest_difference(result, expected) > 1e-6


def test_conversion_keeps_parameters_keys_and_numbers() -> None:
    model = make_model()
    model.groups[1].eval()
    reference = copy.deepcopy(model)
    parameters = list(model.parameters())
    assert convert_batch_norm(model) is model
    kinds = [type(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert kinds == [GlobalBatchNorm2d] * 7
    assert [m.training for m in model.modules()] == [m.training for m in reference.modules()]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(reference.state_dict())
    ours, theirs = step(model, slice(0, BATCH)), step(reference, slice(0, BATCH))
    assert ours.loss == theirs.loss
    assert largest_difference(ours.gradients, theirs.gradients) == 0
    assert largest_difference(ours.buffers, theirs.buffers) == 0
    assert type(convert_batch_norm(nn.BatchNorm2d(2))) is GlobalBatchNorm2d
    assert type(convert_batch_norm(nn.BatchNorm1d(2))) is GlobalBatchNorm1d


@pytest.mark.parametrize("kind", PENALTIES)
def test_conversion_changes_no_number_of_one_worker(kind: str, penalties_alone: dict[str, dict[str, Any]]) -> None:
    net = convert_batch_norm(smooth_net())
    kinds = [type(m) for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert kinds == [GlobalBatchNorm2d, GlobalBatchNorm2d, GlobalBatchNorm1d]
    ours = penalty_step(net, slice(0, BATCH), gathers=PENALTIES[kind])
    assert largest_difference(ours, penalties_alone[kind]) == 0
