"""Any network as a `Model`: its embedding is what goes into its last linear layer, which becomes the head.

Nothing is asked of the network but that it takes images [B, c, h, w] and returns class scores [B, C] from a last linear
layer, or an embedding [B, D]. Maps and, where it is named, the embedding are caught where modules return them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from refilled.errors import UserError
from refilled.models.output import Model, Output

_DEPTH = 2  # of the modules among which maps are looked for: blocks of groups lie deeper in the usual libraries
_MOST_MAPS = 4  # the last ones, where a network has more resolutions


class Adapted(Model):
    """A network whose last linear layer was taken out to be the head.

    Attributes:
        network: The rest, which returns the embedding.
        head_name: Where in the network the head was; none where it had none.
        embedding_name: The module whose output is the embedding; none: what the network returns without its head.
        feature_names: The modules whose outputs are the maps. They are as the modules return them, which in most
            libraries is behind an activation.
    """

    borders_end_in_relu = False
    network: nn.Module

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        num_classes: int,
        built_for: int,
        image_shape: tuple[int, int, int],
        embedding: str | None = None,
        features: Sequence[str] | None = None,
        repeats_grey: bool = False,
    ) -> None:
        """Take the head out and look, with two images, at what the rest returns.

        Args:
            network: Takes float images [B, c, h, w].
            name: Its name, for messages.
            num_classes: Outputs of the head, a new one where the network has none or one of another size.
            built_for: Class scores that the network was asked for.
            image_shape: (channels, height, width) of the images.
            embedding: Name of the module whose output is the embedding; none: the last linear layer's input.
            features: Names of the modules whose outputs are the maps; none: the last module at every resolution.
            repeats_grey: The network takes three channels, and images have one.

        Raises:
            UserError: The network does not take such images, returns something else, or has no such module.
        """
        probe = _Probe(network, name, (3 if repeats_grey else image_shape[0], *image_shape[1:]))
        head_name = probe.head_name()
        if head_name is None and embedding is None and probe.output.dim() == 2 and probe.is_scores(built_for):
            raise UserError(
                f"model {name!r} must end in a linear layer, or the module whose output is its embedding must be named."
            )
        for wanted in (*([embedding] if embedding else []), *(features or ())):
            probe.require(wanted)
        feature_names = probe.maps() if features is None else tuple(features)
        maps = {each: probe.outputs[each] for each in feature_names}
        channels = tuple(as_map(each, is_channels_last(each)).shape[1] for each in maps.values())
        head: nn.Linear | None = None
        if head_name is not None:
            found = network.get_submodule(head_name)
            assert isinstance(found, nn.Linear)
            network.set_submodule(head_name, nn.Identity())
            probe.require_same_scores(_plain(found))
            head = _plain(found) if embedding is None else None
        said = probe.outputs[embedding] if embedding else probe.output
        dim = head.in_features if head else as_vectors(said, is_channels_last(said)).shape[1]
        super().__init__(dim, num_classes, channels)
        self.network = network
        self._channels_last = {name for name, each in maps.items() if is_channels_last(each)}
        self._embedding_is_channels_last = is_channels_last(said)
        self.had_head = head is not None
        if head is None or head.out_features != num_classes:
            head = nn.Linear(dim, num_classes)
        self.head = head
        self.head_name, self.embedding_name, self.feature_names = head_name, embedding, feature_names
        self._repeats_grey = repeats_grey

    def forward(self, images: Tensor, dropout_keys: Tensor | None = None) -> Output:
        """See `Model.forward`; where the network drops, it draws from torch's generator."""
        if self._repeats_grey:
            images = images.expand(-1, 3, -1, -1)
        wanted = (*self.feature_names, *([self.embedding_name] if self.embedding_name else []))
        with caught(self.network, wanted) as outputs:
            returned = self.network(images)
        said = outputs[self.embedding_name] if self.embedding_name else returned
        if not isinstance(said, Tensor):  # some return more in training
            raise UserError(
                f"A network must return one tensor in training as in evaluation, got {type(said).__name__}; auxiliary "
                "outputs can be switched off."
            )
        said = as_vectors(said, self._embedding_is_channels_last)
        embedding = said.to(torch.promote_types(said.dtype, torch.float32))
        with torch.autocast(embedding.device.type, enabled=False):
            logits = self.head(embedding.to(self.head.weight.dtype))
        maps = tuple(as_map(outputs[each], each in self._channels_last) for each in self.feature_names)
        return Output(embedding, logits.to(embedding.dtype), maps)


class CannotTakeError(UserError):
    """A network raises an error where it is given images."""


class _Probe:
    """What a network and its modules return for two images, in evaluation."""

    def __init__(self, network: nn.Module, name: str, shape: tuple[int, int, int]) -> None:
        self._network, self._name = network, name
        self.outputs: Mapping[str, Any] = {}
        names = [each for each, _ in network.named_modules() if each]
        self._images = torch.zeros(2, *shape)
        self._images[1] = 1  # two different rows
        try:
            with caught(network, names) as self.outputs, _caught_inputs(network) as self.inputs:
                self.output: Any = self._evaluate()
        except Exception as error:  # whatever a network of somebody else's raises
            size = f"{shape[0]} x {shape[1]} x {shape[2]}"
            said = " ".join(str(error).split())[:300]
            raise CannotTakeError(
                f"model {name!r} must take images of {size}, but raises {type(error).__name__}: {said.rstrip('.')}."
            ) from error
        if not isinstance(self.output, Tensor) or self.output.dim() not in (2, 4) or len(self.output) != 2:
            shown = tuple(self.output.shape) if isinstance(self.output, Tensor) else type(self.output).__name__
            raise UserError(
                f"model {name!r} must return a tensor of class scores [B, C] or embeddings [B, D], got {shown}."
            )

    @torch.no_grad()
    def _evaluate(self) -> Any:
        was_training = self._network.training
        try:
            return self._network.eval()(self._images)
        finally:
            self._network.train(was_training)

    def head_name(self) -> str | None:
        """The linear layer whose output is the network's."""
        for name, output in reversed(list(self.outputs.items())):
            if output is not self.output:
                continue
            module = self._network.get_submodule(name)
            # Libraries have linear layers of their own, of which some normalise.
            if isinstance(module, nn.Linear) and torch.allclose(_plain(module)(self.inputs[name]), output, atol=1e-5):
                return str(name)
        return None

    def require_same_scores(self, head: nn.Linear) -> None:
        """Refuse a network of which, now that its head is taken out, the head does not make the scores it had."""
        try:
            returned = self._evaluate()
            same = torch.allclose(head(returned), self.output, rtol=1e-4, atol=1e-4)
        except Exception:  # whatever it does with a head that is none, such as reading its weights
            same = False
        if not same:
            raise UserError(
                f"model {self._name!r} must use its last linear layer once, at its end, and not its weights elsewhere, "
                "and return the same for the same images in evaluation."
            )

    def is_scores(self, num_classes: int) -> bool:
        """Whether what the network returns is as wide as scores would be."""
        return bool(self.output.shape[1] == num_classes)

    def require(self, wanted: str) -> None:
        """Refuse the name of a module that is not there, or does not return images' vectors or maps."""
        if wanted not in self.outputs:
            near = [each for each in self.outputs if each.count(".") < _DEPTH]
            raise UserError(
                f"model {self._name!r} has no module {wanted!r} that runs; it has {', '.join(near[:12])}, ..."
            )
        output = self.outputs[wanted]
        if not isinstance(output, Tensor) or output.dim() not in (2, 3, 4) or len(output) != 2:
            raise UserError(f"module {wanted!r} of model {self._name!r} must return one tensor with a row an image.")

    def maps(self) -> tuple[str, ...]:
        """The last module at every resolution, or of tokens the last, of those that are not deep inside."""
        last: dict[tuple[int, ...], str] = {}
        tokens = None
        for name, output in self.outputs.items():
            if name.count(".") >= _DEPTH or not isinstance(output, Tensor) or len(output) != 2:
                continue
            if output.dim() == 4:
                size = tuple(as_map(output, is_channels_last(output)).shape[2:])
                if size != (1, 1):
                    last.pop(size, None)  # the order is that of the last ones
                    last[size] = name
            elif output.dim() == 3 and _is_square(output):
                tokens = name
        found = list(last.values())
        if tokens is not None and len(found) <= 1:  # a transformer, whose patches are one convolution
            return (tokens,)
        return tuple(found[-_MOST_MAPS:])


@contextmanager
def caught(network: nn.Module, names: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """The last outputs of modules of a network that runs inside the block, by name, in the order in which they end."""
    outputs: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs.pop(name, None)
            outputs[name] = output

        return hook

    handles = [network.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _caught_inputs(network: nn.Module) -> Iterator[Mapping[str, Tensor]]:
    """What went into the linear layers of a network that runs inside the block, by name."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            inputs[name] = arguments[0]

        return hook

    linear = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear) and name]
    handles = [module.register_forward_pre_hook(keep(name)) for name, module in linear]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def is_channels_last(output: Tensor) -> bool:
    """Whether what a module returns for square images is [B, h, w, c], as some transformers have it."""
    return output.dim() == 4 and output.shape[1] == output.shape[2] != output.shape[3]


def as_vectors(output: Tensor, channels_last: bool) -> Tensor:
    """[B, D] of vectors, of maps [B, D, h, w] by their mean over space, of tokens [B, n, D] by their mean."""
    if output.dim() == 4:
        return as_map(output, channels_last).mean(dim=(2, 3))
    return output.mean(dim=1) if output.dim() == 3 else output


def as_map(output: Tensor, channels_last: bool) -> Tensor:
    """[B, c, h, w] of maps, of tokens [B, n, c] without those before the square grid, and of vectors as one pixel."""
    if output.dim() == 2:
        return output[:, :, None, None]
    if output.dim() == 4:
        return output.movedim(3, 1) if channels_last else output
    side = math.isqrt(output.shape[1])
    square = output[:, output.shape[1] - side * side :].transpose(1, 2)
    return square.reshape(*square.shape[:2], side, side)


def _is_square(tokens: Tensor) -> bool:
    """Whether tokens [B, n, c] are those of a square grid, with at most a few before them."""
    side = math.isqrt(tokens.shape[1])
    return side > 1 and tokens.shape[1] - side * side <= 8


def _plain(layer: nn.Linear) -> nn.Linear:
    """The same weights as torch's own layer, with a bias, of zeros where it has none."""
    made = nn.Linear(layer.in_features, layer.out_features, dtype=layer.weight.dtype)
    with torch.no_grad():
        made.weight.copy_(layer.weight)
        if layer.bias is None:
            made.bias.zero_()
        else:
            made.bias.copy_(layer.bias)
    return made
