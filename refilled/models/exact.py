"""What keeps a network's training from being the same on any number of workers, looked for by trying."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from refilled.errors import UserError
from refilled.models.output import Model

_GLOBAL = (nn.BatchNorm1d, nn.BatchNorm2d)  # `refilled.batch_norm` makes these look at all workers' images
_TRIES = 3  # a branch that is dropped with a small probability is not dropped every time


def why_not_exact(model: Model, image_shape: tuple[int, int, int]) -> str | None:
    """What in a network depends on how a batch is divided among workers; none where nothing was seen to.

    The network is run in training mode on four small batches. It is refused where it draws from torch's global
    generator, which workers would draw from independently, or where an image's output depends on the others beyond the
    batch normalisations that are computed over all workers.

    Args:
        model: As `build_model` returns it; it stays as it is.
        image_shape: (channels, height, width) of the images.
    """
    tried = copy.deepcopy(model).float().train()
    for module in tried.modules():
        if type(module) in _GLOBAL:
            module.eval()
    images = torch.randn(3, *image_shape, generator=torch.Generator().manual_seed(0))
    others = torch.cat([images[:2], -2 * images[2:]])
    keys = torch.arange(3)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for seed in range(_TRIES):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            first = _numbers(tried, images, keys)
            if not torch.equal(torch.get_rng_state(), before):
                return f"draws at random{_by(tried)}, which no key of an image decides"
            second = _numbers(tried, others, keys)
            if any(not torch.allclose(first[name][:2], second[name][:2], rtol=1e-4, atol=1e-5) for name in first):
                return "makes an image's output depend on the others in a way other than nn.BatchNorm1d and 2d"
    return None


def require_exact(model: Model, name: str, image_shape: tuple[int, int, int], num_workers: int) -> None:
    """Refuse a network whose training would depend on the number of workers.

    The package's families are proven not to, by their contract, and are not tried again in every run.

    Raises:
        UserError: Naming what in it does.
    """
    why = why_not_exact(model, image_shape) if ":" in name else None
    if why is not None:
        raise UserError(
            f"model {name!r} must be trained on one worker, got {num_workers}: it {why}, so its numbers would depend "
            "on the workers."
        )


def _numbers(model: Model, images: Tensor, keys: Tensor) -> Mapping[str, Tensor]:
    output = model(images, keys)
    return {"embedding": output.embedding, "logits": output.logits}


def _by(model: nn.Module) -> str:
    """The kind of module that probably does it, for the message."""
    for module in model.modules():
        name = type(module).__name__
        if "drop" in name.lower() or "stochastic" in name.lower():
            rates = [getattr(module, rate, None) for rate in ("p", "drop_prob", "rate")]
            if any(isinstance(rate, float) and rate > 0 for rate in rates):
                return f" ({name})"
    return ""
