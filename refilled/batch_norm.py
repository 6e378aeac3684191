"""Batch normalisation over the rows of all workers, for models and terms that look at the batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from refilled.distributed import all_gather, sum_with_gradient, world_size


class _GlobalBatchNorm(_BatchNorm):
    """What the classes for one and two dimensions share; torch's own class comes after it in theirs."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise [B_rank, C, ...] over all but C; B_rank may be 0 where another worker has rows."""
        uses_batch = self.training or self.running_mean is None
        if world_size() == 1 or not uses_batch:
            return super().forward(inputs)
        self._check_input_dim(inputs)  # type: ignore[no-untyped-call]  # torch's, without types
        mean, variance, count = _global_moments(inputs.detach())
        if self.training and self.track_running_stats:
            self._update_running_statistics(mean, variance * (count / (count - 1).clamp(min=1)))
        normalised: Tensor = _Normalise.apply(inputs, self.weight, self.bias, mean, variance, count, self.eps)
        return normalised

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        step: float | Tensor = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), step)
        self.running_var.lerp_(unbiased_variance.to(self.running_var.dtype), step)


class GlobalBatchNorm2d(_GlobalBatchNorm, nn.BatchNorm2d):
    """Batch normalisation over the rows of all workers in training; at world size 1 exactly `nn.BatchNorm2d`.

    One collective in the forward pass and one in the backward pass. The gradients of weight and bias are this
    worker's part, to be added by `sum_gradients`. Unlike `nn.SyncBatchNorm` it works on a CPU and with workers that
    have no rows; unlike `nn.BatchNorm2d` it does not refuse a batch of a single value for a channel.

    It can be differentiated twice, as torch's own can. With `create_graph=True` the backward pass takes one collective
    more and keeps a few tensors of the inputs' size.
    """


class GlobalBatchNorm1d(_GlobalBatchNorm, nn.BatchNorm1d):
    """`GlobalBatchNorm2d` for [B_rank, C] and [B_rank, C, L]."""


_GLOBAL_KINDS: dict[type[nn.Module], type[_GlobalBatchNorm]] = {
    nn.BatchNorm1d: GlobalBatchNorm1d,
    nn.BatchNorm2d: GlobalBatchNorm2d,
}


def convert_batch_norm(model: nn.Module) -> nn.Module:
    """Replace every `nn.BatchNorm1d` and `nn.BatchNorm2d` by a global one that shares its parameters and buffers.

    Args:
        model: Changed in place; names, state-dict keys and the parameters an optimiser holds stay the same.

    Returns:
        `model`, or its replacement where it is itself one of the two.
    """
    if (kind := _GLOBAL_KINDS.get(type(model))) is not None:
        assert isinstance(model, _BatchNorm)
        converted = kind(model.num_features, model.eps, model.momentum, model.affine, model.track_running_stats)
        converted.weight, converted.bias = model.weight, model.bias
        converted.running_mean, converted.running_var = model.running_mean, model.running_var
        converted.num_batches_tracked = model.num_batches_tracked
        return converted.train(model.training)
    for name, child in model.named_children():
        setattr(model, name, convert_batch_norm(child))
    return model


def _global_moments(inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] and number of values of a channel [1] over all workers, float32 at least.

    Each worker takes its own two-pass moments, and they are combined by the rule of Chan, Golub and LeVeque (1979):
    sums of squares are only ever taken about a mean, so a mean far from zero costs no digits.
    """
    wide = torch.promote_types(inputs.dtype, torch.float32)
    num_channels = inputs.shape[1]
    num_values = inputs.numel() // num_channels
    own = torch.zeros(2 * num_channels + 1, dtype=wide, device=inputs.device)
    if num_values > 0:
        dims = _all_but_channels(inputs)
        own_mean = inputs.mean(dim=dims, dtype=wide)
        own[:num_channels] = own_mean
        own[num_channels:-1] = (inputs - _per_channel(own_mean, inputs)).square_().sum(dim=dims)
    own[-1] = num_values
    means, squares, counts = torch.split(all_gather(own), [num_channels, num_channels, 1], dim=1)
    count = counts.sum(dim=0)
    total = count.clamp(min=1)
    mean = (means * counts).sum(dim=0) / total
    variance = (squares + counts * (means - mean).square()).sum(dim=0) / total
    return mean, variance, count


def _differentiable_moments(inputs: Tensor, mean: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of all workers' inputs as functions of them, to all orders; `mean` is a number.

    Sums are taken about `mean`, so they are precise, and the shift from it is zero but for rounding.
    """
    distances = inputs - _per_channel(mean, inputs)
    dims = _all_but_channels(inputs)
    own = torch.stack([distances.sum(dims), distances.square().sum(dims)])
    shift, squares = sum_with_gradient(own) / count.clamp(min=1)
    return mean + shift, squares - shift.square()


def _all_but_channels(inputs: Tensor) -> tuple[int, ...]:
    return (0, *range(2, inputs.dim()))


def _per_channel(values: Tensor, inputs: Tensor) -> Tensor:
    """[C] as it meets `inputs` [B, C, ...]."""
    return values.view(1, -1, *(1 for _ in inputs.shape[2:]))


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, where mean and variance are those of all workers' x.

    With xhat the normalised input, g = weight * dL/dy and bars for means over all workers' values, the gradient is
    dL/dx = (g - gbar - xhat * bar(g * xhat)) / sqrt(variance + eps).
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight, mean, (variance + eps).rsqrt(), count)
        ctx.eps = eps
        # Normalisation with given moments is what torch's evaluation kernel does, in one pass.
        return F.batch_norm(inputs, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, inverse_std, count = ctx.saved_tensors
        differentiable = torch.is_grad_enabled()  # with create_graph=True only
        if differentiable and ctx.needs_input_grad[0]:
            mean, variance = _differentiable_moments(inputs, mean, count)
            inverse_std = (variance + ctx.eps).rsqrt()
        dims = _all_but_channels(inputs)
        centred = inputs - _per_channel(mean, inputs)
        own_sums = torch.stack([grad.sum(dim=dims, dtype=mean.dtype), (grad * centred).sum(dim=dims) * inverse_std])
        grad_bias, grad_weight = own_sums if weight is not None else (None, None)
        grad_inputs = None
        if ctx.needs_input_grad[0]:
            grad_mean, grad_product_mean = sum_with_gradient(own_sums) / count.clamp(min=1)
            scale = _per_channel(inverse_std if weight is None else inverse_std * weight, inputs)
            along = _per_channel(inverse_std * grad_product_mean, inputs)
            flat = grad - _per_channel(grad_mean, inputs)
            if differentiable:
                grad_inputs = flat.addcmul(centred, along, value=-1) * scale
            else:
                grad_inputs = flat.addcmul_(centred, along, value=-1).mul_(scale)
            grad_inputs = grad_inputs.to(inputs.dtype)
        return grad_inputs, grad_weight, grad_bias, None, None, None, None
