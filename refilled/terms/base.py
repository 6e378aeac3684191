"""What a loss term is: what it needs, its settings, its own trainable parts, its search space.

The law of `refilled.distributed` is the signature: rows are gathered, every worker computes the same loss of the global
batch from them, and gradients are summed. A parameter used after the gather would be counted once a worker, so a
term's own parameters are used in `rows` alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled.config import RunConfig, Searched, TermConfig
from refilled.losses import pair_maps
from refilled.models import Output

StudentNeed = Literal["logits", "embedding", "features"]
TeacherNeed = Literal["embedding", "scores", "prototypes", "features"]


@dataclass(frozen=True)
class Needs:
    """What a term asks of the networks.

    Attributes:
        student: What it needs of the student's output. A term that needs logits has no place in stage `embedding`,
            which does not train the head.
        teacher: What it needs of the teacher. All but `features` follow from its embedding, which a cache can serve;
            feature maps need the teacher to run in every step.
        same_classes: Whether the teacher's classes must be the student's, in the same order.
    """

    student: frozenset[StudentNeed] = frozenset()
    teacher: frozenset[TeacherNeed] = frozenset()
    same_classes: bool = False


class TeacherOutput(NamedTuple):
    """What the frozen teacher says of one worker's images."""

    embedding: Tensor
    """[b, D], rounded as a cache would hold it."""
    features: tuple[Tensor, ...]
    """Maps as in `Output.features`, float32 at least; empty where no term of the stage needs them."""


class Network(Protocol):
    """What a term may know of a network: its widths. Its parameters are not the term's."""

    @property
    def embedding_dim(self) -> int:
        """Width of the embedding."""

    @property
    def num_classes(self) -> int:
        """Outputs of its head."""

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of every feature map, the first group's first."""

    @property
    def borders_end_in_relu(self) -> bool:
        """As `Model.borders_end_in_relu`."""


class Teacher(Network, Protocol):
    """The frozen network, which can also be asked."""

    @property
    def prototypes(self) -> Tensor:
        """[C, D], class means of the student's classes in the teacher's space (Eq. 6)."""

    def logits(self, embedding: Tensor) -> Tensor:
        """The teacher's own class scores [B, C'] of its embeddings [B, D]."""


@dataclass(frozen=True)
class Setting:
    """What a term can know of its run before the first step.

    Attributes:
        student: Widths of the network that is trained.
        teacher: None in a run that needs none.
        labels: Int64 [N], of the training images, on the CPU.
        num_classes: C, of the student.
        image_shape: (channels, height, width) of the training images.
        seed: The term's own, for whatever it draws.
    """

    student: Network
    teacher: Teacher | None
    labels: Tensor
    num_classes: int
    image_shape: tuple[int, int, int]
    seed: int

    @property
    def known_teacher(self) -> Teacher:
        """The teacher, for terms that need one."""
        assert self.teacher is not None, "a run with this term loads a teacher"
        return self.teacher


@dataclass(frozen=True)
class Local:
    """One worker's share of a step, b images; b may be 0.

    Attributes:
        image_ids: Int64 [b], positions in the training set.
        labels: Int64 [b].
        images: [b, channels, height, width], normalised.
        student: Output of the student; feature maps are float32 at least.
        teacher: None in a stage whose terms need none.
        epoch: 0-based, over all stages.
    """

    image_ids: Tensor
    labels: Tensor
    images: Tensor
    student: Output
    teacher: TeacherOutput | None
    epoch: int

    @property
    def known_teacher(self) -> TeacherOutput:
        """The teacher's output, for terms that need it."""
        assert self.teacher is not None, "a stage with this term asks the teacher"
        return self.teacher


@dataclass(frozen=True)
class GlobalBatch:
    """All workers' images of a step, B of them.

    Attributes:
        image_ids: Int64 [B].
        labels: Int64 [B].
        classes: Int64 [|S|], the classes S present, ascending (Eq. 8).
        largest_class: Images of the batch's largest class.
        epoch: 0-based, over all stages.
    """

    image_ids: Tensor
    labels: Tensor
    classes: Tensor
    largest_class: int
    epoch: int


class Term(nn.Module, ABC):
    """One loss term. Its parameters and buffers are trained, saved, resumed and summed over workers with the student's.

    A term of the package is one file and one line in `refilled.methods.TERMS`; one of a user's is a class in a file of
    theirs. Parameters get initial weights as a model's layers do
    (`refilled.models.initialise`), keyed by the run's seed and their name; what the constructor sets otherwise stays.

    Attributes:
        config: Its settings.
    """

    name: ClassVar[str]
    """In the composition of methods: `rkd`."""
    Config: ClassVar[type[TermConfig]] = TermConfig
    """Frozen and documented."""
    place: ClassVar[str] = ""
    """Where a `RunConfig` keeps its settings; empty: `terms.NAME`."""
    space: ClassVar[tuple[Searched, ...]] = ()
    """What a search varies, by the names of the settings."""
    weight_space: ClassVar[Searched | None] = None
    """Its weight beside a stage's first term; the weight of a whole stage is a learning rate and not searched."""
    needs: ClassVar[Needs] = Needs()

    def __init__(self, config: TermConfig, setting: Setting) -> None:
        super().__init__()
        self.config: Any = config

    @classmethod
    def searched(cls, run: RunConfig) -> tuple[Searched, ...]:
        """`space`, or what of it makes sense beside the run's other settings."""
        return cls.space

    @classmethod
    def check(cls, run: RunConfig) -> None:
        """Refuse a run in which this term cannot work.

        Raises:
            UserError: Naming the field.
        """

    @abstractmethod
    def rows(self, local: Local) -> dict[str, Tensor]:
        """This worker's rows, [b, ...] by name; the only place where own parameters may be used.

        Rows of one name are gathered once, so terms that ask for the same thing of a network name it alike: `logits`,
        `embedding`, `teacher_embedding`. A loss of each image alone is one number a row; maps never travel.
        """

    @abstractmethod
    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        """The term's weighted loss, a scalar, from everybody's rows [B, ...].

        The same on every worker: no parameters, no drawing.
        """

    def update(self, rows: dict[str, Tensor], batch: GlobalBatch) -> None:
        """Change buffers after the step, from everybody's rows, without gradient; the same on every worker."""

    def undecayed(self) -> tuple[nn.Parameter, ...]:
        """Parameters that weight decay must leave alone."""
        return ()


class MapTerm(Term):
    """A term that compares maps as the next group gets them, which is what most losses on maps were published for.

    Label-free; the teacher runs in every step.
    """

    needs: ClassVar[Needs] = Needs(student=frozenset({"features"}), teacher=frozenset({"features"}))

    def __init__(self, config: TermConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self._ends_in_relu = setting.student.borders_end_in_relu, setting.known_teacher.borders_end_in_relu

    def pairs(self, local: Local) -> list[tuple[Tensor, Tensor]]:
        """Maps of student and teacher, [b, c, h, w] each, the deepest with the deepest, as `pair_maps` has them."""
        student, teacher = local.student.features, local.known_teacher.features
        return pair_maps(_raw(student, self._ends_in_relu[0]), _raw(teacher, self._ends_in_relu[1]))


def _raw(features: tuple[Tensor, ...], ends_in_relu: bool) -> tuple[Tensor, ...]:
    return tuple(F.relu(each) for each in features) if ends_in_relu else features


def mean_of_rows(values: Tensor) -> Tensor:
    """Mean over the global batch of one number an image, [B]."""
    return values.sum() / max(len(values), 1)


def wide(values: Tensor) -> Tensor:
    """Float32 at least: bfloat16 maps of an autocast forward pass are not precise enough to take differences of."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
