"""The parts of a run's configuration: schedules, the two stages, optimisers, views."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from refilled.config.base import Config
from refilled.config.fields import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Share,
    ShareAboveZero,
    ShareBelowOne,
)

MIN_TUPLE_TEMPERATURE = 0.003
"""Eq. 4 has exp(-2 / temperature): 3e-290 is still a normal float64, with room for the sums over a batch."""
TupleTemperature = Annotated[float, Range(MIN_TUPLE_TEMPERATURE)]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Config):
    """Learning rate over one stage; positions are fractions of the stage, so a schedule fits any number of epochs."""

    _prefix = "schedule."
    kind: Literal["step", "cosine", "one_cycle"] = "cosine"
    """Shape of the schedule."""
    learning_rate: PositiveFloat = 0.1
    """Initial learning rate (the peak, for one_cycle)."""
    decay: ShareAboveZero = 0.2
    """Factor applied at each milestone (step only)."""
    milestones: tuple[Annotated[float, Range(0, 1, "()")], ...] = (0.5, 0.75)
    """Where the rate decays, as fractions of the stage's epochs (step only)."""
    final_fraction: Share = 0.01
    """Last learning rate as a fraction of `learning_rate` (cosine and one_cycle)."""
    peak_at: Annotated[float, Range(0, 1, "()")] = 0.3
    """Where the rate peaks, as a fraction of the stage (one_cycle only)."""

    def __post_init__(self) -> None:
        """Check also the milestones' order."""
        super().__post_init__()
        self.require(list(self.milestones) == sorted(set(self.milestones)), "milestones", "rising fractions")


@dataclass(frozen=True, kw_only=True)
class TermConfig(Config):
    """Settings of one loss term."""

    added: ClassVar[Mapping[str, object]] = {}
    """Settings that came after the term's first runs were stored, with the value that means "as before"."""


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig(TermConfig):
    """Comparison matching, Eq. 3-5: weight x student temperature² x mean KL over tuples."""

    _prefix = "embedding."
    temperature: TupleTemperature = 0.5
    """Temperature tau of the tuple probabilities, Eq. 4."""
    student_temperature: TupleTemperature | None = None
    """Temperature of the student's side of Eq. 4; none: the same as the teacher's. The paper does not smooth it (1)."""
    max_negatives: PositiveInt | None = None
    """K-hat, the most impostors a tuple may have, the nearest first (Eq. 3, Table 21); none: no limit."""
    margin: PositiveFloat | None = None
    """Only impostors at most this much farther than the positive (released code: 0.2); none: every impostor farther."""
    tuples: Literal["all", "batch_minimum"] = "all"
    """`all`: K varies by tuple (Eq. 3). `batch_minimum`: the released code's, K is the batch's smallest count."""
    weight: PositiveFloat = 10.0
    """Weight of the loss."""

    def __post_init__(self) -> None:
        """Check also that one rule alone limits the tuples."""
        super().__post_init__()
        is_free = self.tuples == "all" or self.max_negatives is None
        self.require(is_free, "max_negatives", "none where embedding.tuples is batch_minimum")


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig(ComparisonConfig):
    """Stage `embedding`: its schedule, and the settings of comparison matching (Eq. 3-5)."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass(frozen=True, kw_only=True)
class KdConfig(TermConfig):
    """Distillation of class scores, Eq. 2: distill_weight x student temperature² x mean KL."""

    _prefix = "classifier."
    distill_weight: NonNegativeFloat = 1.0
    """Lambda of Eq. 2, 8 and 10: the weight of the distillation term."""
    temperature: PositiveFloat = 1.0
    """Temperature tau of the teacher's posterior, Eq. 2 and 8."""
    student_temperature: PositiveFloat | None = None
    """Temperature of the student's posterior, Eq. 2 and 8; none: the same as the teacher's."""


@dataclass(frozen=True, kw_only=True)
class LkdConfig(KdConfig):
    """Local distillation, Eq. 8."""

    posterior: Literal["prototype", "cosine_share"] = "prototype"
    """The teacher's posterior: softmax of products with unit prototypes (released) or Eq. 7 to the letter."""


@dataclass(frozen=True, kw_only=True)
class WeightedLkdConfig(LkdConfig):
    """Local distillation with instance weights, Eq. 10."""

    instance_weight: Literal["confidence", "gap", "own_head", "none"] = "confidence"
    """How an image's weight follows from the teacher: Eq. 9, the paper's Gap-Weight, the released rule, or 1."""


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(WeightedLkdConfig):
    """Stage `classifier`: its schedule, its weight, and the settings of its distillation (Eq. 2, 8 and 10)."""

    weight: PositiveFloat = 1.0
    """Weight of the stage's whole loss."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Config):
    """Stochastic gradient descent and what regularises it."""

    _prefix = "optimizer."
    momentum: ShareBelowOne = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """Nesterov's form of the momentum (released code; the paper does not say)."""
    weight_decay: NonNegativeFloat = 5e-4
    """L2 penalty on all parameters (released code: 5e-4; the paper does not say)."""
    dropout: ShareBelowOne = 0.0
    """Dropout inside the residual blocks (released code: 0.3; the paper does not say)."""

    def __post_init__(self) -> None:
        """Check also that Nesterov's form has a momentum."""
        super().__post_init__()
        self.require(not self.nesterov or self.momentum > 0, "momentum", "above 0 with nesterov")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(Config):
    """How the teacher is pre-trained (cross-entropy, Eq. 1); its architecture is the run's `teacher`."""

    _prefix = "pretraining."
    global_batch_size: Annotated[int, Range(2)] = 128
    """Images a step of the pre-training."""
    seed: NonNegativeInt = 0
    """Seed of the teacher's initial weights, order and views."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass(frozen=True, kw_only=True)
class ViewConfig(Config):
    """The finite augmentation."""

    _prefix = "views."
    kind: Literal["shifts", "resized_crops"] = "shifts"
    """shifts: a random crop of the padded image (CIFAR); resized_crops: a random box resized to the whole (CUB)."""
    padding: Annotated[int, Range(0, 64)] = 4
    """Pixels of zero padding on each side before the crop; 4 gives 9 x 9 crops (shifts only)."""
    min_area: ShareAboveZero = 0.25
    """Smallest area of a box, as a share of the image (resized_crops only)."""
    flip: bool = True
    """Also mirror half of the views."""
    num_views: PositiveInt | None = None
    """Use only this many views, the plain image among them, the same for every image; none: every view."""

    def __post_init__(self) -> None:
        """Check also that there are as many views."""
        super().__post_init__()
        is_possible = self.num_views is None or self.num_views <= self.most
        self.require(is_possible, "num_views", f"at most {self.most} or none")

    @property
    def most(self) -> int:
        """Number of different views of one image; boxes are drawn, so there are as many as one likes: 128."""
        if self.kind == "resized_crops":
            return 128
        return (2 * self.padding + 1) ** 2 * (2 if self.flip else 1)
