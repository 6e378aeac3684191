"""Steps of one loss term alone, between two small networks on a few images, on any number of workers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from refilled import batch_norm, distributed
from refilled.config import Precision, RunConfig, TermConfig
from refilled.keyed import keyed_integers, keyed_permutation, keyed_uniform
from refilled.models import Model, Output, build_model
from refilled.stages import term_class
from refilled.terms import GlobalBatch, Local, Setting, TeacherOutput, Term
from refilled.terms.base import wide
from refilled.training.compute import Compute
from refilled.training.learner import new_term

NUM_IMAGES, NUM_CLASSES, SHAPE = 24, 5, (1, 8, 8)
BATCH = 8
SHARES = {
    1: ((8,), (8,), (8,)),
    2: ((4, 4), (5, 3), (8, 0)),
    4: ((2, 2, 2, 2), (4, 0, 3, 1), (0, 0, 8, 0)),
}
"""Images of each worker in each of three steps, by the number of workers."""
EPOCHS = (0, 0, 1)


@dataclass(frozen=True)
class Seen:
    """What one worker saw of one step.

    Attributes:
        loss: Scalar.
        gradients: Gradients of the student's and the term's parameters, summed over workers, where there are any.
        state: Parameters and buffers of the term after the step.
        are_finite: Whether all of the worker's rows are.
    """

    loss: Tensor
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]
    are_finite: bool


class NotAsked:
    """Stands where a term gets nothing, since its `needs` do not ask for it; refuses every use."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __getattr__(self, name: str) -> NoReturn:
        raise AssertionError(f"the term uses {self._what}, which its `needs` do not name")

    def __call__(self, *arguments: object) -> NoReturn:
        """Refuse, as everything else."""
        self.__getattr__("")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        what = next((each._what for each in args if isinstance(each, cls)), "what it does not get")
        raise AssertionError(f"the term uses {what}, which its `needs` do not name")


class BenchTeacher:
    """A frozen network of random weights.

    Attributes:
        embedding_dim: D.
        num_classes: Classes of its head, those of the student.
        feature_channels: Channels of every map.
        borders_end_in_relu: See `Model.borders_end_in_relu`.
        prototypes: [C, D].
    """

    def __init__(self, compute: Compute, images: Tensor, labels: Tensor) -> None:
        network = build_model("convnet-3", num_classes=NUM_CLASSES, in_channels=1, image_size=8, seed=2)
        self._network = compute.place_model(network).requires_grad_(False).eval()
        self.embedding_dim, self.num_classes = network.embedding_dim, network.num_classes
        self.feature_channels = network.feature_channels
        self.borders_end_in_relu = network.borders_end_in_relu
        embedding = compute.forward(self._network, images).embedding
        self.prototypes = torch.stack([embedding[labels == each].mean(dim=0) for each in range(NUM_CLASSES)])
        self._compute = compute

    def logits(self, embedding: Tensor) -> Tensor:
        """Its head's scores."""
        scores: Tensor = self._network.head(embedding)
        return scores

    def output(self, images: Tensor) -> TeacherOutput:
        """What it says of images."""
        output = self._compute.forward(self._network, images)
        return TeacherOutput(output.embedding, tuple(wide(each) for each in output.features))


class TermBench:
    """A term, a student and a teacher, and the steps of the training loop with them.

    Attributes:
        kind: The term's class.
        setting: What the term is given.
        term: The term, on the device.
        student: A small network with batch normalisation over all workers.

    Args:
        kind: The term's class.
        config: Its settings; none: the defaults.
        precision: See `RunConfig`.
        seed: The term's seed.
        asked_only: Give the term only what its `needs` name.
    """

    def __init__(
        self,
        kind: type[Term],
        config: TermConfig | None = None,
        precision: Precision = "float64",
        *,
        seed: int = 7,
        asked_only: bool = False,
    ) -> None:
        compute = Compute(torch.device("cpu"), precision)
        self.kind, self._compute, self._asked_only = kind, compute, asked_only
        ids = torch.arange(NUM_IMAGES)
        self._labels = keyed_integers(NUM_CLASSES, 3, ids)
        self._labels[:NUM_CLASSES] = torch.arange(NUM_CLASSES)  # none is without an image
        pixels = keyed_uniform(4, ids[:, None], torch.arange(SHAPE[1] * SHAPE[2])).view(NUM_IMAGES, *SHAPE)
        self._images = (4 * pixels - 2 + self._labels.view(-1, 1, 1, 1)).to(compute.dtype)
        student = build_model("convnet-2", num_classes=NUM_CLASSES, in_channels=1, image_size=8, seed=1)
        self._teacher = BenchTeacher(compute, self._images, self._labels)
        self.setting = Setting(
            student=student,
            teacher=self._teacher_of_setting(),
            labels=self._labels,
            num_classes=NUM_CLASSES,
            image_shape=SHAPE,
            seed=seed,
        )
        term = new_term(kind, kind.Config() if config is None else config, self.setting)
        if distributed.world_size() > 1:
            batch_norm.convert_batch_norm(student)
            batch_norm.convert_batch_norm(term)
        self.student: Model = compute.place_model(student).train()
        self.term: Term = compute.place_model(term).train()
        parameters = [*self.student.parameters(), *self.term.parameters()]
        self._optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    def local(self, number: int, counts: Sequence[int]) -> Local:
        """This worker's share of a step, with a new forward pass of the student."""
        start = sum(counts[: distributed.rank()])
        share = self._ids(number)[start : start + counts[distributed.rank()]]
        images = self._images[share]
        output = self._compute.forward(self.student, images)
        output = output._replace(features=tuple(wide(each) for each in output.features))
        local = Local(share, self._labels[share], images, output, self._teacher.output(images), EPOCHS[number])
        return self._asked(local) if self._asked_only else local

    def batch(self, number: int) -> GlobalBatch:
        """Everybody's images of a step."""
        ids = self._ids(number)
        labels = self._labels[ids]
        classes, counts = torch.unique(labels, return_counts=True)
        return GlobalBatch(ids, labels, classes, int(counts.max()), EPOCHS[number])

    def step(self, number: int, counts: Sequence[int] = (BATCH,)) -> Seen:
        """One update, as the training loop makes it.

        Args:
            number: The step's number, from 0.
            counts: Images of each worker.
        """
        own = self.term.rows(self.local(number, counts))
        assert isinstance(own, dict), f"rows() must return tensors by name, got {type(own).__name__}"
        num_own = counts[distributed.rank()]
        for name, each in own.items():
            assert each.shape[:1] == (num_own,), f"rows {name!r} of {num_own} images have shape {tuple(each.shape)}"
        rows = {name: distributed.gather_rows(each, counts) for name, each in own.items()}
        loss = self.term.loss(rows, self.batch(number))
        assert isinstance(loss, Tensor), f"loss() must return a tensor, got {type(loss).__name__}"
        assert loss.shape == (), f"loss must be a scalar, its shape is {tuple(loss.shape)}"
        assert bool(loss.isfinite()), f"loss is {float(loss.detach())}"
        assert loss.requires_grad, "loss must depend on what is trained"
        parameters = {f"student.{name}": each for name, each in self.student.named_parameters()}
        parameters |= {f"term.{name}": each for name, each in self.term.named_parameters()}
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's, without types
        distributed.sum_gradients(parameters.values())
        gradients = {name: each.grad.clone() for name, each in parameters.items() if each.grad is not None}
        self._optimizer.step()
        with torch.no_grad():
            self.term.update({name: each.detach() for name, each in rows.items()}, self.batch(number))
        return Seen(
            loss=loss.detach(),
            gradients=gradients,
            state=state_of(self.term),
            are_finite=all(bool(each.isfinite().all()) for each in own.values()),
        )

    def saved(self) -> bytes:
        """What a checkpoint holds."""
        buffer = io.BytesIO()
        state = {"student": self.student.state_dict(), "term": self.term.state_dict()}
        torch.save(state | {"optimizer": self._optimizer.state_dict()}, buffer)
        return buffer.getvalue()

    def load(self, saved: bytes) -> None:
        """Go on from what `saved` gave."""
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.student.load_state_dict(state["student"])
        self.term.load_state_dict(state["term"])
        self._optimizer.load_state_dict(state["optimizer"])

    def _ids(self, number: int) -> Tensor:
        return keyed_permutation(NUM_IMAGES, 5, number)[:BATCH]

    def _teacher_of_setting(self) -> Any:
        needs = self.kind.needs.teacher
        if not self._asked_only:
            return self._teacher
        if not needs:
            return None
        teacher = BenchTeacher(self._compute, self._images, self._labels)
        if "prototypes" not in needs:
            vars(teacher)["prototypes"] = NotAsked("the teacher's prototypes")
        if "scores" not in needs:
            vars(teacher)["logits"] = NotAsked("the teacher's scores")
        return teacher

    def _asked(self, local: Local) -> Local:
        """Without what the term's `needs` do not name."""
        output, needs = local.student, self.kind.needs
        assert local.teacher is not None
        absent: dict[str, Any] = {
            name: NotAsked(f"the student's {name}") for name in Output._fields if name not in needs.student
        }
        teacher: TeacherOutput | None = None
        if needs.teacher:
            embedding: Any = local.teacher.embedding
            if needs.teacher == {"features"}:
                embedding = NotAsked("the teacher's embedding")
            teacher = TeacherOutput(
                embedding,
                local.teacher.features if "features" in needs.teacher else (),
            )
        return Local(local.image_ids, local.labels, local.images, output._replace(**absent), teacher, local.epoch)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that are not saved too."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: each.detach().clone() for name, each in named}


def trace(term: str | type[Term], settings: Mapping[str, Any], run: RunConfig) -> list[Seen]:
    """Three steps of a term on this worker's shares.

    Args:
        term: The term's name in a method, or its class.
        settings: Those that are not the defaults.
        run: Holds the text of the file that the name names, if it is a user's.
    """
    kind = term if isinstance(term, type) else term_class(term, run)
    bench = TermBench(kind, kind.Config(**settings))
    return [bench.step(number, counts) for number, counts in enumerate(SHARES[distributed.world_size()])]
