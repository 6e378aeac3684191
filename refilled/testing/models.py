"""What must hold of a network."""

from __future__ import annotations

import io
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from refilled import batch_norm, distributed
from refilled.config import Sources
from refilled.keyed import keyed_uint64
from refilled.models import Model, Output, build_model
from refilled.testing.named import differing, located, sources_of
from refilled.testing.workers import run_on

BATCH = 8
SHARES = {2: ((4, 4), (8, 0)), 4: ((2, 2, 2, 2), (4, 0, 3, 1))}
"""Images of each worker, by the number of workers."""
TOLERANCE = 1e-9  # relative, in float64: sums in another order


class ModelContract:
    """Inherit it, name a network, and pytest runs the checks.

        class TestTiny(ModelContract):
            model = "my_nets.py:Tiny"

    A path is looked up beside the file of the test, then in the current folder.
    """

    model: ClassVar[str]
    """As a run names it."""
    image_sizes: ClassVar[tuple[int, ...]] = (8, 15)
    """Heights and widths of images that it must take; the first is used where one is enough."""
    in_channels: ClassVar[tuple[int, ...]] = (1, 3)
    """Likewise, channels."""
    num_classes: ClassVar[tuple[int, ...]] = (5, 1, 12)
    """Likewise, classes."""

    # ---- shapes

    def test_outputs_have_the_shapes_that_it_says(self) -> None:
        """`embedding_dim`, `num_classes` and `feature_channels` are true, for any classes, channels and sizes."""
        for classes in self.num_classes:
            for channels in self.in_channels:
                for size in self.image_sizes:
                    model = self._build(num_classes=classes, in_channels=channels, image_size=size)
                    output = model.eval()(images(4, channels, size))
                    what = f"for {classes} classes, {channels} channels, {size} pixels"
                    _assert_shapes(model, output, 4, classes, what)

    def test_logits_are_the_head_of_the_embedding(self) -> None:
        """Whatever is said of embeddings holds of what the head sees."""
        model = self._build().eval()
        output = model(self._images())
        assert torch.allclose(model.head(output.embedding), output.logits, atol=1e-5), "logits are not head(embedding)"

    def test_features_are_taken_before_the_last_activation(self) -> None:
        """Maps [B, c, h, w] with negative entries."""
        for training in (True, False):
            output = self._build().train(training)(self._images())
            for number, each in enumerate(output.features):
                share = (each < 0).float().mean().item()
                assert share > 0.01, (
                    f"map {number} has {share:.0%} negative entries: it must come before its activation"
                )

    def test_precision_is_kept(self) -> None:
        """Embedding and logits are float32 under bfloat16 autocast too, and float64 in float64."""
        model = self._build()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(self._images())
        types = (output.embedding.dtype, output.logits.dtype)
        assert types == (torch.float32, torch.float32), f"under autocast embedding and logits are {types}"
        output = model.double()(self._images().double())
        types = (output.embedding.dtype, output.logits.dtype, *(each.dtype for each in output.features))
        assert set(types) == {torch.float64}, f"in float64 the outputs are {types}"

    # ---- weights

    def test_same_seed_same_weights(self) -> None:
        """Whatever the global generator is at."""
        states = []
        for number in range(2):
            torch.manual_seed(number)
            states.append(self._build().state_dict())
        odd = differing(states[1], states[0])
        assert not odd, f"these begin differently with the same seed: {', '.join(odd)}"

    def test_embedding_begins_alike_for_any_number_of_classes(self) -> None:
        """Students of several label spaces are compared from one start."""
        few, many = (self._build(num_classes=number).eval() for number in (2, 9))
        found, expected = (model(self._images()).embedding for model in (few, many))
        assert torch.equal(found, expected), "the initial embedding depends on the number of classes"

    def test_state_survives_save_and_load(self) -> None:
        """A network is its state_dict and its name."""
        trained, loaded = self._build(seed=3), self._build(seed=4).eval()
        trained(self._images())  # batch statistics
        kept = io.BytesIO()
        torch.save(trained.state_dict(), kept)
        kept.seek(0)
        loaded.load_state_dict(torch.load(kept, weights_only=True))
        odd = differing(_numbers(loaded(self._images())), _numbers(trained.eval()(self._images())))
        assert not odd, f"after save and load these differ: {', '.join(odd)}"

    # ---- evaluation

    def test_an_image_does_not_depend_on_the_others_in_evaluation(self) -> None:
        """A test image is judged alone, in whatever batch it comes, however often."""
        model = self._build()
        model(self._images())  # batch statistics other than at the start
        model.double().eval()
        pixels = self._images().double()
        whole = _numbers(model(pixels))
        for start, stop in ((0, 1), (2, 5)):
            part = _numbers(model(pixels[start:stop]))
            expected = {name: each[start:stop] for name, each in whole.items()}
            odd = differing(part, expected, tolerance=TOLERANCE)
            assert not odd, f"in evaluation {', '.join(odd)} of an image depend on the other images"
        odd = differing(_numbers(model(pixels)), whole)
        assert not odd, f"in evaluation {', '.join(odd)} of the same images differ the second time"

    def test_one_image_or_none_can_be_evaluated(self) -> None:
        """Shares of the last batch may be empty."""
        model = self._build().eval()
        for count in (1, 0):
            output = model(images(count, self.in_channels[0], self.image_sizes[0]))
            _assert_shapes(model, output, count, self.num_classes[0], f"for {count} images")
            assert bool(output.logits.isfinite().all()), f"logits of {count} images are not finite"

    # ---- dropout

    def test_dropout_follows_from_the_keys_alone(self) -> None:
        """Masks belong to images: they are equal in any order and on any workers, and no generator is asked."""
        model = self._build(dropout=0.4).double().eval()
        pixels, keys = self._images().double(), keyed_uint64(0, torch.arange(BATCH))
        undropped = _numbers(model(pixels))
        model.train()
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()  # else an image depends on the others
        before = torch.get_rng_state()
        whole = _numbers(model(pixels, keys))
        assert torch.equal(torch.get_rng_state(), before), "dropout draws from the global generator"
        backwards = {name: each.flip(0) for name, each in _numbers(model(pixels.flip(0), keys.flip(0))).items()}
        odd = differing(backwards, whole, tolerance=TOLERANCE)
        assert not odd, f"in training {', '.join(odd)} of an image depend on its place in the batch"
        if differing(whole, undropped, tolerance=TOLERANCE):  # a network need not drop
            others = _numbers(model(pixels, keyed_uint64(1, torch.arange(BATCH))))
            assert differing(others, whole, tolerance=TOLERANCE), "dropout does not depend on the keys"

    # ---- several workers

    def test_training_does_not_depend_on_the_number_of_workers(self) -> None:
        """Outputs, gradients and batch statistics, with the batch normalisation that looks at all workers' images."""
        name, sources = self._named()
        shape = (self.in_channels[0], self.image_sizes[0])
        alone = train(name, sources, shape, (BATCH,))
        for num_workers, shares in SHARES.items():
            for counts in shares:
                for rank, seen in enumerate(run_on(num_workers, train, name, sources, shape, counts)):
                    odd = differing(seen, alone, tolerance=TOLERANCE)
                    assert not odd, (
                        f"on worker {rank} of {num_workers}, shares {counts}, these differ: {', '.join(odd)}"
                    )

    # ----

    def _named(self) -> tuple[str, Sources]:
        name = located(self.model, type(self))
        return name, sources_of(name)

    def _build(self, **changes: Any) -> Model:
        name, sources = self._named()
        first = {"num_classes": self.num_classes[0], "in_channels": self.in_channels[0]}
        return build_model(name, **{"image_size": self.image_sizes[0], "seed": 3, **first, **changes}, sources=sources)

    def _images(self) -> Tensor:
        return images(BATCH, self.in_channels[0], self.image_sizes[0])


def images(count: int, channels: int, size: int) -> Tensor:
    """Random but fixed images, normalised."""
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(count + size))


def train(name: str, sources: Sources, shape: tuple[int, int], counts: tuple[int, ...]) -> dict[str, Tensor]:
    """Two steps of a network on this worker's share of a batch, in float64.

    Args:
        name: The network's name.
        sources: Hold its file, if it is a user's.
        shape: (channels, size) of the images.
        counts: Images of each worker.

    Returns:
        Of the last step: the global batch's outputs, the loss, gradients, and the state after it.
    """
    model = build_model(
        name, num_classes=5, in_channels=shape[0], image_size=shape[1], dropout=0.2, seed=3, sources=sources
    )
    if distributed.world_size() > 1:
        batch_norm.convert_batch_norm(model)
    model.double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    start = sum(counts[: distributed.rank()])
    own = slice(start, start + counts[distributed.rank()])
    pixels, labels = images(BATCH, *shape).double(), torch.arange(BATCH) % 5
    found: dict[str, Tensor] = {}
    for step in range(2):
        keys = keyed_uint64(0, step, torch.arange(BATCH))
        output = model(pixels[own], keys[own])
        rows = {name: distributed.gather_rows(each, counts) for name, each in _numbers(output).items()}
        maps = sum((each.square().mean() for name, each in rows.items() if name != "logits"), torch.zeros(()))
        loss = F.cross_entropy(rows["logits"], labels) + maps
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's, without types
        distributed.sum_gradients(model.parameters())
        gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        found = {name: each.detach() for name, each in rows.items()} | {"loss": loss.detach()}
        found |= {f"gradient of {name}": each.clone() for name, each in gradients.items()}
        optimizer.step()
    return found | {name: each.detach().clone() for name, each in model.state_dict().items()}


def _assert_shapes(model: Model, output: Output, count: int, classes: int, what: str) -> None:
    found = [tuple(output.embedding.shape), tuple(output.logits.shape), *(tuple(f.shape[:2]) for f in output.features)]
    expected = [(count, model.embedding_dim), (count, classes), *((count, each) for each in model.feature_channels)]
    assert found == expected, f"{what} embedding, logits and maps are {found}, not {expected}"
    assert model.num_classes == classes, f"{what} num_classes is {model.num_classes}"
    assert all(each.dim() == 4 for each in output.features), f"{what} maps must be [B, c, h, w]"


def _numbers(output: Output) -> dict[str, Tensor]:
    maps = {f"features[{number}]": each for number, each in enumerate(output.features)}
    return {"embedding": output.embedding, "logits": output.logits} | maps
