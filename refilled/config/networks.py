"""Networks that are brought, and label spaces that are given: what a run is told beyond the names of its networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from refilled.config.base import Config
from refilled.config.fields import Range

ImageSize = Annotated[int, Range(4)]


@dataclass(frozen=True, kw_only=True)
class NetworksConfig(Config):
    """What a run is told of its teacher and student beside their architectures."""

    teacher_weights: str | None = None
    """Weights of a teacher of your own: a safetensors file, or what torch.save(model.state_dict(), FILE) wrote. It is
    not pre-trained, and the overlap is what its class names say; none: it is pre-trained on its part of the data."""
    teacher_image_size: ImageSize | None = None
    """Pixels a side of the images that a teacher of your own sees; none: what torchvision or timm say of the
    architecture, else the student's."""
    teacher_mean: tuple[float, ...] | None = None
    """Mean of each channel, pixels in [0, 1], by which images are normalised for a teacher of your own; none: what
    torchvision or timm say of the architecture, else the data's."""
    teacher_std: tuple[float, ...] | None = None
    """Standard deviations, likewise."""
    teacher_data: str | None = None
    """Data set on which the teacher is pre-trained, named like `data`; none: the student's."""
    teacher_classes: str | None = None
    """Text file with the teacher's classes, one a line: those on which it is pre-trained, or of a teacher of your own
    the names of its scores, in their order. None: the window, or all classes of its data, or names nobody knows."""
    teacher_embedding: str | None = None
    """Module whose output is the teacher's embedding; none: what goes into its last linear layer."""
    teacher_features: tuple[str, ...] | None = None
    """Modules whose outputs are the teacher's feature maps; none: the last at every resolution."""
    student_weights: str | None = None
    """Weights from which every student starts, the vanilla one too, a file like `teacher_weights`; its head starts
    anew. None: initial weights of its seed."""
    student_classes: str | None = None
    """Text file with the student's classes, one a line; none: the window, or all classes where the teacher's are
    given."""
    student_embedding: str | None = None
    """Module whose output is the student's embedding; none: what goes into its last linear layer."""
    student_features: tuple[str, ...] | None = None
    """Modules whose outputs are the student's feature maps; none: the last at every resolution."""

    def __post_init__(self) -> None:
        """Check also what belongs together."""
        super().__post_init__()
        for name in ("teacher_image_size", "teacher_mean", "teacher_std"):
            is_read = self.teacher_weights is not None or getattr(self, name) is None
            self.require(
                is_read, name, "none without teacher_weights: a teacher that is pre-trained sees what the data is"
            )
        self.require(
            (self.teacher_mean is None) == (self.teacher_std is None),
            "teacher_std",
            "given where teacher_mean is, and only then",
        )
        if self.teacher_mean is not None and self.teacher_std is not None:
            same = len(self.teacher_mean) == len(self.teacher_std)
            self.require(
                same and len(self.teacher_mean) in (1, 3), "teacher_mean", "1 or 3 numbers, as many as teacher_std"
            )
        self.require(min(self.teacher_std or (1.0,)) > 0, "teacher_std", "numbers above 0")
        self.require(
            self.teacher_data is None or self.teacher_weights is None,
            "teacher_data",
            "none with teacher_weights: a teacher that is brought is not pre-trained",
        )

    @property
    def is_explicit(self) -> bool:
        """Whether the label spaces are given, and the overlap is what their names say, instead of sliding windows."""
        given = (self.teacher_weights, self.teacher_data, self.teacher_classes, self.student_classes)
        return any(each is not None for each in given)
