"""The parts of a run's configuration: schedules, the two stages, optimisers, views."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from refilled.config.base import Config, is_positive, require

MIN_TUPLE_TEMPERATURE = 0.003  # below, exp(2 / temperature), the range of Eq. 4's terms, leaves float64


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Config):
    """Learning rate over one stage; positions are fractions of the stage, so a schedule fits any number of epochs."""

    kind: Literal["step", "cosine", "one_cycle"] = "cosine"
    """Shape of the schedule."""
    learning_rate: float = 0.1
    """Initial learning rate (the peak, for one_cycle)."""
    decay: float = 0.2
    """Factor applied at each milestone (step only)."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Where the rate decays, as fractions of the stage's epochs (step only)."""
    final_fraction: float = 0.01
    """Last learning rate as a fraction of `learning_rate` (cosine and one_cycle)."""
    peak_at: float = 0.3
    """Where the rate peaks, as a fraction of the stage (one_cycle only)."""

    def __post_init__(self) -> None:
        """Check every field."""
        require(self.kind in ("step", "cosine", "one_cycle"), "schedule.kind", "step, cosine or one_cycle", self.kind)
        require(is_positive(self.learning_rate), "schedule.learning_rate", "above 0", self.learning_rate)
        require(0 < self.decay <= 1, "schedule.decay", "in (0, 1]", self.decay)
        inside = all(0 < position < 1 for position in self.milestones)
        rising = list(self.milestones) == sorted(set(self.milestones))
        require(inside and rising, "schedule.milestones", "rising fractions between 0 and 1", self.milestones)
        require(0 <= self.final_fraction <= 1, "schedule.final_fraction", "in [0, 1]", self.final_fraction)
        require(0 < self.peak_at < 1, "schedule.peak_at", "between 0 and 1", self.peak_at)


@dataclass(frozen=True, kw_only=True)
class TermConfig(Config):
    """Settings of one loss term."""

    added: ClassVar[Mapping[str, object]] = {}
    """Settings that came after the term's first runs were stored, with the value that means "as before"."""

    def __post_init__(self) -> None:
        """Check every field; terms with settings extend it."""


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig(TermConfig):
    """Comparison matching, Eq. 3-5: weight x student temperature² x mean KL over tuples."""

    temperature: float = 0.5
    """Temperature tau of the tuple probabilities, Eq. 4."""
    student_temperature: float | None = None
    """Temperature of the student's side of Eq. 4; none: the same as the teacher's. The paper does not smooth it (1)."""
    max_negatives: int | None = None
    """K-hat, the most impostors a tuple may have, the nearest first (Eq. 3, Table 21); none: no limit."""
    margin: float | None = None
    """Only impostors at most this much farther than the positive (released code: 0.2); none: every impostor farther."""
    tuples: Literal["all", "batch_minimum"] = "all"
    """`all`: K varies by tuple (Eq. 3). `batch_minimum`: the released code's, K is the batch's smallest count."""
    weight: float = 10.0
    """Weight of the loss."""

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        least = f"at least {MIN_TUPLE_TEMPERATURE}"
        is_warm = self.temperature >= MIN_TUPLE_TEMPERATURE and is_positive(self.temperature)
        require(is_warm, "embedding.temperature", least, self.temperature)
        student = self.student_temperature
        is_warm = student is None or (student >= MIN_TUPLE_TEMPERATURE and is_positive(student))
        require(is_warm, "embedding.student_temperature", f"{least} or none", student)
        require(
            self.max_negatives is None or self.max_negatives >= 1,
            "embedding.max_negatives",
            "at least 1 or none",
            self.max_negatives,
        )
        require(self.margin is None or is_positive(self.margin), "embedding.margin", "above 0 or none", self.margin)
        require(self.tuples in ("all", "batch_minimum"), "embedding.tuples", "all or batch_minimum", self.tuples)
        require(
            self.tuples == "all" or self.max_negatives is None,
            "embedding.max_negatives",
            "none where embedding.tuples is batch_minimum",
            self.max_negatives,
        )
        require(is_positive(self.weight), "embedding.weight", "above 0", self.weight)


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig(ComparisonConfig):
    """Stage `embedding`: its schedule, and the settings of comparison matching (Eq. 3-5)."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass(frozen=True, kw_only=True)
class KdConfig(TermConfig):
    """Distillation of class scores, Eq. 2: distill_weight x student temperature² x mean KL."""

    distill_weight: float = 1.0
    """Lambda of Eq. 2, 8 and 10: the weight of the distillation term."""
    temperature: float = 1.0
    """Temperature tau of the teacher's posterior, Eq. 2 and 8."""
    student_temperature: float | None = None
    """Temperature of the student's posterior, Eq. 2 and 8; none: the same as the teacher's."""

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        finite = math.isfinite(self.distill_weight) and self.distill_weight >= 0
        require(finite, "classifier.distill_weight", "at least 0", self.distill_weight)
        require(is_positive(self.temperature), "classifier.temperature", "above 0", self.temperature)
        require(
            self.student_temperature is None or is_positive(self.student_temperature),
            "classifier.student_temperature",
            "above 0 or none",
            self.student_temperature,
        )


@dataclass(frozen=True, kw_only=True)
class LkdConfig(KdConfig):
    """Local distillation, Eq. 8."""

    posterior: Literal["prototype", "cosine_share"] = "prototype"
    """The teacher's posterior: softmax of products with unit prototypes (released) or Eq. 7 to the letter."""

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        posteriors = ("prototype", "cosine_share")
        require(self.posterior in posteriors, "classifier.posterior", "prototype or cosine_share", self.posterior)


@dataclass(frozen=True, kw_only=True)
class WeightedLkdConfig(LkdConfig):
    """Local distillation with instance weights, Eq. 10."""

    instance_weight: Literal["confidence", "gap", "own_head", "none"] = "confidence"
    """How an image's weight follows from the teacher: Eq. 9, the paper's Gap-Weight, the released rule, or 1."""

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        rules = ("confidence", "gap", "own_head", "none")
        require(
            self.instance_weight in rules,
            "classifier.instance_weight",
            f"one of {', '.join(rules)}",
            self.instance_weight,
        )


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(WeightedLkdConfig):
    """Stage `classifier`: its schedule, its weight, and the settings of its distillation (Eq. 2, 8 and 10)."""

    weight: float = 1.0
    """Weight of the stage's whole loss."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        require(is_positive(self.weight), "classifier.weight", "above 0", self.weight)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Config):
    """Stochastic gradient descent and what regularises it."""

    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """Nesterov's form of the momentum (released code; the paper does not say)."""
    weight_decay: float = 5e-4
    """L2 penalty on all parameters (released code: 5e-4; the paper does not say)."""
    dropout: float = 0.0
    """Dropout inside the residual blocks (released code: 0.3; the paper does not say)."""

    def __post_init__(self) -> None:
        """Check every field."""
        require(0 <= self.momentum < 1, "optimizer.momentum", "in [0, 1)", self.momentum)
        require(not self.nesterov or self.momentum > 0, "optimizer.momentum", "above 0 with nesterov", self.momentum)
        finite = math.isfinite(self.weight_decay) and self.weight_decay >= 0
        require(finite, "optimizer.weight_decay", "at least 0", self.weight_decay)
        require(0 <= self.dropout < 1, "optimizer.dropout", "in [0, 1)", self.dropout)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(Config):
    """How the teacher is pre-trained (cross-entropy, Eq. 1); its architecture is the run's `teacher`."""

    global_batch_size: int = 128
    """Images a step of the pre-training."""
    seed: int = 0
    """Seed of the teacher's initial weights, order and views."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        """Check every field."""
        require(self.global_batch_size >= 2, "pretraining.global_batch_size", "at least 2", self.global_batch_size)
        require(self.seed >= 0, "pretraining.seed", "at least 0", self.seed)


@dataclass(frozen=True, kw_only=True)
class ViewConfig(Config):
    """The finite augmentation."""

    kind: Literal["shifts", "resized_crops"] = "shifts"
    """shifts: a random crop of the padded image (CIFAR); resized_crops: a random box resized to the whole (CUB)."""
    padding: int = 4
    """Pixels of zero padding on each side before the crop; 4 gives 9 x 9 crops (shifts only)."""
    min_area: float = 0.25
    """Smallest area of a box, as a share of the image (resized_crops only)."""
    flip: bool = True
    """Also mirror half of the views."""
    num_views: int | None = None
    """Use only this many views, the plain image among them, the same for every image; none: every view."""

    def __post_init__(self) -> None:
        """Check every field."""
        require(self.kind in ("shifts", "resized_crops"), "views.kind", "shifts or resized_crops", self.kind)
        require(0 <= self.padding <= 64, "views.padding", "in 0..64", self.padding)
        require(0 < self.min_area <= 1, "views.min_area", "in (0, 1]", self.min_area)
        require(
            self.num_views is None or 1 <= self.num_views <= self.most,
            "views.num_views",
            f"in 1..{self.most} or none",
            self.num_views,
        )

    @property
    def most(self) -> int:
        """Number of different views of one image; boxes are drawn, so there are as many as one likes: 128."""
        if self.kind == "resized_crops":
            return 128
        return (2 * self.padding + 1) ** 2 * (2 if self.flip else 1)
