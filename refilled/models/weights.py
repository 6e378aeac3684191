"""Weights files: read without executing anything, and fitted to a network by the names in them."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refilled.errors import UserError

_WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "model_state",
    "net",
    "network",
    "weights",
    "teacher",
    "student",
)
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "network.", "net.")
_AVERAGES = ("state_dict_ema", "model_ema", "ema")  # what timm saves beside the weights, and prefers
_MOST_CANDIDATES = 32  # of prefixes taken off, one after another
_UNTRAINED = ("num_batches_tracked",)  # counters, which old files lack
_AUXILIARY = ("aux", "AuxLogits.")  # further heads of torchvision's two networks that have some

State = Mapping[str, Tensor]


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU: safetensors, or torch's with nothing executed.

    Raises:
        UserError: The file cannot be read, or holds other things than named tensors.
    """
    if not path.is_file():
        raise UserError(f"{path} must be a weights file, but there is no such file.")
    try:
        content = _read(path)
    except Exception as error:  # either library raises whatever its parser trips over
        raise UserError(
            f"{path} must be a weights file, safetensors or what torch.save(model.state_dict(), path) writes, but "
            f"cannot be read ({_reason(error)})."
        ) from error
    state = _state_of(content)
    if not state:
        raise UserError(f"{path} must hold named tensors, as torch.save(model.state_dict(), path) writes them.")
    return state


def _reason(error: Exception) -> str:
    """What was wrong, in words; torch's own are paragraphs with advice that is none here."""
    if "GLOBAL" in str(error):
        return "it holds other objects than tensors, such as a whole model, which only its own code can load"
    if isinstance(error, (pickle.UnpicklingError, KeyError, EOFError)):
        return "it is damaged, or no such file"
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".") or type(error).__name__


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(16)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _state_of(content: Any) -> dict[str, Tensor]:
    """The named tensors in what a file holds, in the first of the usual wrappers where it is not them itself."""
    if not isinstance(content, Mapping):
        return {}
    for name in (*_AVERAGES, *_WRAPPERS):
        if isinstance(content.get(name), Mapping) and (state := _state_of(content[name])):
            return state
    return {name: each for name, each in content.items() if isinstance(name, str) and isinstance(each, Tensor)}


def without_prefixes(state: State, wanted: State) -> dict[str, Tensor]:
    """The tensors under the names that a network has for them: without the usual prefixes, or with one more.

    Where a prefix is taken off, tensors that do not have it belong to something around the network and are left out.

    Args:
        state: As read.
        wanted: The network's `state_dict`, of which the names count.
    """
    candidates = [dict(state)]
    for candidate in candidates:  # grows: a prefix may stand in front of another
        for prefix in _PREFIXES:
            cut = {name.removeprefix(prefix): each for name, each in candidate.items() if name.startswith(prefix)}
            if cut and len(candidates) < _MOST_CANDIDATES:
                candidates.append(cut)
    longer = [
        {f"{prefix}{name}": each for name, each in state.items()}
        for prefix in _PREFIXES
        if any(name.startswith(prefix) for name in wanted)
    ]
    return max([*candidates, *longer], key=lambda each: len(each.keys() & wanted.keys()))


def fitted_weights(path: Path, state: State, wanted: State, head: str | None) -> dict[str, Tensor]:
    """The weights under the network's names, all of them but for the head's, which may be missing.

    Args:
        path: For the messages.
        state: As read.
        wanted: The network's `state_dict`.
        head: Name of the network's last linear layer; none where it has none.

    Raises:
        UserError: Naming the first tensor that is missing, of another shape, or too many.
    """
    is_students = all(name.startswith(("network.", "head.")) for name in state) and not state.keys() <= wanted.keys()
    if head and is_students:  # of a student of this package
        state = {f"{head}.{name[5:]}" if name.startswith("head.") else name[8:]: each for name, each in state.items()}
    found = without_prefixes(state, wanted)
    of_head = {name for name in wanted if head and name.startswith(f"{head}.")}
    has_head = any(name.startswith(f"{head}.") for name in found)
    needed = {name for name in wanted if not name.endswith(_UNTRAINED)} - (set() if has_head else of_head)
    missing = sorted(needed - found.keys())
    if missing:
        raise UserError(
            f"{path} must hold the weights of this network, but lacks {missing[0]!r} and {len(missing) - 1} more of "
            f"{len(needed)}; it has {', '.join(sorted(state)[:3])}, ..."
        )
    odd = sorted(name for name in found.keys() - wanted.keys() if not name.startswith(_AUXILIARY))
    if odd:
        raise UserError(f"{path} must hold the weights of this network alone, but has {odd[0]!r} too.")
    kept = {name: found[name] for name in sorted(wanted.keys() & found.keys())}
    num_scores = kept[f"{head}.weight"].shape[:1] if has_head else ()  # of any number of classes
    for name, each in kept.items():
        shape = [*num_scores, *wanted[name].shape[1:]] if name in of_head else [*wanted[name].shape]
        _check_tensor(path, name, each, shape, wanted[name].dtype)
    return kept


def _check_tensor(path: Path, name: str, tensor: Tensor, shape: list[int], dtype: torch.dtype) -> None:
    """Refuse what a network's tensor cannot take as it is: another shape or kind of number, or one that is none."""
    if list(tensor.shape) != shape:
        raise UserError(f"{path} must hold weights of this network, but {name!r} is {list(tensor.shape)}, not {shape}.")
    if tensor.is_floating_point() != dtype.is_floating_point or tensor.is_complex() or tensor.dtype == torch.bool:
        raise UserError(f"{path} must hold numbers as the network has them, but {name!r} is of {tensor.dtype}.")
    if dtype.is_floating_point and not tensor.to(dtype).isfinite().all():
        raise UserError(f"{path} must hold finite numbers, but {name!r} does not.")
    if name.endswith("running_var") and (tensor < 0).any():
        raise UserError(f"{path} must hold variances of at least 0, but {name!r} does not.")


def digest_of_weights(state: State) -> str:
    """SHA-256, in hex, over names, types, shapes and values, in whatever kind of file they came."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
