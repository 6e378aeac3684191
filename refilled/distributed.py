"""One step on several workers that computes what one worker would compute on the whole batch.

The contract has three parts. `gather_rows` gives every worker the rows of all, and every worker computes the same loss
of the whole batch from them. The backward pass gives every worker the gradient of that one loss with respect to its
own rows. `sum_gradients` adds the workers' parameter gradients, which is then exactly the gradient of the loss; so a
parameter used after a gather, where every worker holds the same, would be counted once for each worker.
`GlobalBatchNorm2d` and `GlobalBatchNorm1d` keep this true for models that look at the batch. Without a process group
all are the identity.

Workers may hold different numbers of rows, and none at all. A loss may instead be a sum of parts, one of each worker's
own rows without a gather. A loss made of gradients with respect to own rows (`create_graph=True`) obeys the same
contract: what is here can be differentiated twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

_Value = TypeVar("_Value")


def world_size() -> int:
    """Number of workers; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This worker's number, from 0; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_over_workers(tensor: Tensor) -> Tensor:
    """Add the workers' tensors of one shape, in place and without gradient; returns the tensor."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_rows(rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """The rows of all workers, in the order of their ranks.

    Args:
        rows: [B_rank, ...]; the number of rows may differ between workers, the rest of the shape may not.
        counts: B_rank of every worker where they are known; else one more collective asks for them, and on a GPU the
            host waits for the answer.

    Returns:
        [sum of B_rank, ...]. Its gradient on this worker is cut to this worker's rows and not summed over workers:
        each is expected to compute the same loss from it. Tensors of integers are gathered without gradient.

    Raises:
        ValueError: `counts` does not fit the workers or this worker's rows.
    """
    if counts is not None and (len(counts) != world_size() or counts[rank()] != rows.shape[0]):
        raise ValueError(
            f"counts {list(counts)} do not fit {world_size()} workers, the one of rank {rank()} with "
            f"{rows.shape[0]} rows"
        )
    if world_size() == 1:
        return rows
    if counts is None:
        counts = all_gather(torch.tensor([rows.shape[0]], device=rows.device)).flatten().tolist()
    gathered: Tensor = _GatherRows.apply(rows, list(counts))
    return gathered


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every parameter's gradient by its sum over workers; one collective for each dtype and device.

    A gradient that is None on some workers counts as zero there; one that is None on all stays None, so that an
    optimiser skips the parameter as it would on one worker.

    Args:
        parameters: The same parameters in the same order on every worker; those without `requires_grad` are skipped.
    """
    if world_size() == 1:
        return
    groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for group in groups.values():
        _sum_gradients_of_group(group)


def _sum_gradients_of_group(group: list[nn.Parameter]) -> None:
    with torch.no_grad():
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        has_grad = grads[0].new_tensor([float(p.grad is not None) for p in group])
        flat = torch.cat([grad.reshape(-1) for grad in grads] + [has_grad])
        dist.all_reduce(flat)
        *sums, num_with_grad = torch.split(flat, [grad.numel() for grad in grads] + [len(group)])
        missing = [index for index, p in enumerate(group) if p.grad is None]
        # Reading the counts makes the host wait for the device: only where a gradient is missing.
        unused = {i for i, n in zip(missing, num_with_grad[missing].tolist(), strict=True) if n == 0} if missing else ()
        for index, (parameter, grad, total) in enumerate(zip(group, grads, sums, strict=True)):
            if index not in unused:
                parameter.grad = grad.copy_(total.view(grad.shape))


def all_gather(tensor: Tensor) -> Tensor:
    """Tensors of one shape from all workers, stacked: [world size, ...]."""
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        longest = max(counts)
        if rows.shape[0] < longest:  # not every backend gathers different shapes: pad to the longest share
            rows = torch.cat([rows, rows.new_zeros(longest - rows.shape[0], *rows.shape[1:])])
        shares = all_gather(rows)
        return torch.cat([share[:count] for share, count in zip(shares, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own: Tensor = _OwnRows.apply(grad, ctx.counts)
        return own, None


class _OwnRows(torch.autograd.Function):
    """This worker's rows of what every worker holds alike; `_GatherRows` and this are each other's gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        start = sum(counts[: rank()])
        return rows[start : start + counts[rank()]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        gathered: Tensor = _GatherRows.apply(grad, ctx.counts)
        return gathered, None


def sum_with_gradient(own: Tensor) -> Tensor:
    """The sum of the workers' tensors, to be differentiated to any order; each worker goes on from it by itself."""
    total: Tensor = _SumOverWorkers.apply(own)
    return total


class _SumOverWorkers(torch.autograd.Function):
    """The sum of the workers' tensors, from which each goes on by itself: its gradient is a sum over them as well."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        return sum_over_workers(own.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total: Tensor = _SumOverWorkers.apply(grad)
        return total


def agree(flag: bool) -> bool:
    """Rank 0's answer, on all workers, which wait for it."""
    if world_size() == 1:
        return flag
    answer = _on_group_device(flag)
    dist.broadcast(answer, src=0)
    return bool(answer.item())


def everyone(flag: bool) -> bool:
    """Whether it is true on all workers, which wait for each other."""
    if world_size() == 1:
        return flag
    answer = _on_group_device(flag)
    dist.all_reduce(answer, op=dist.ReduceOp.MIN)
    return bool(answer.item())


def barrier() -> None:
    """Wait until all workers are here."""
    everyone(True)


def on_rank_zero(action: Callable[[], _Value]) -> _Value:
    """What an action on rank 0 gives, for all workers.

    Args:
        action: What it gives can be pickled, see `from_rank_zero`.

    Raises:
        OSError: The action's, on all workers: else those that wait for rank 0 would take its next word for the answer.
    """
    outcome: Any = None
    try:
        outcome = action() if rank() == 0 else None
    except OSError as error:
        outcome = error
    outcome = from_rank_zero(outcome)
    if isinstance(outcome, OSError):
        raise outcome
    result: _Value = outcome
    return result


def _on_group_device(flag: bool) -> Tensor:
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    return torch.tensor(int(flag), device=device)


def from_rank_zero(value: _Value) -> _Value:
    """Rank 0's value, for all workers; what the others give is not looked at.

    Args:
        value: Anything that can be pickled; its tensors are on the CPU.
    """
    if world_size() == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0)
    result: _Value = values[0]
    return result
