"""One run: which data and classes, which networks, which method, for how long."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from refilled.config.embedding_cache import EmbeddingCacheConfig
from refilled.config.fields import NonNegativeInt, PositiveFloat, PositiveInt, Range, Share, ShareBelowOne
from refilled.config.networks import NetworksConfig
from refilled.config.parts import ClassifierConfig, EmbeddingConfig, OptimizerConfig, TeacherConfig, ViewConfig
from refilled.config.tables import Sources, TermSettings
from refilled.methods import has_embedding_stage

Precision = Literal["float32", "float64", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class RunConfig(NetworksConfig):
    """Everything that determines one training, and with the data and the code its every number."""

    data: str = "digits"
    """Where images come from: digits, cifar100, parquet:PATH or imagefolder:PATH."""
    image_size: Annotated[int, Range(4)] | None = None
    """Resize every image to this many pixels a side; none: images are of one size already."""
    class_order: str = "alphabetical"
    """Order in which the windows slide over the classes: alphabetical, cifar_fs, or a file with one class a line."""
    num_teacher_classes: Annotated[int, Range(2)] | None = None
    """Classes of the teacher, the first of the order; none: half of all."""
    num_student_classes: Annotated[int, Range(2)] | None = None
    """Classes of the student; none: half of all."""
    overlap: Share = 1.0
    """Share of the student's classes that are the teacher's too (section 5.1.1, Figure 4)."""
    val_fraction: ShareBelowOne = 0.1
    """Share of the training images held out for validation, in every class; 0: train on all, validate on none."""
    split_seed: NonNegativeInt = 0
    """Seed of the validation split."""
    images_per_class: Annotated[int, Range(2)] | None = None
    """Training images that the student has of each class, those held out for validation included (Figure 6b); the
    smaller of two numbers takes a part of the larger's images. None: all."""

    teacher: str = "convnet-32"
    """Architecture of the teacher: wrn-DEPTH-WIDTH, mobilenet-WIDTH, convnet-WIDTH, torchvision:NAME, timm:NAME, or a
    factory of your own as path/file.py:Name or package.module:name."""
    student: str = "convnet-8"
    """Architecture of the student, named likewise."""
    method: str = "refilled"
    """A method's name, or its terms by stage: 'rkd>cross_entropy+lkd'; a term of your own is path/file.py:Name."""
    epochs: tuple[NonNegativeInt, NonNegativeInt] = (40, 40)
    """Epochs of stage embedding and of stage classifier; a method without stage embedding ignores the first."""
    teacher_epochs: PositiveInt = 40
    """Epochs of the teacher's pre-training (Eq. 1)."""
    global_batch_size: Annotated[int, Range(2)] = 256
    """Images a step, over all workers together."""
    seed: NonNegativeInt = 0
    """Seed of the student's initial weights, order and views."""
    precision: Precision = "float32"
    """float32, float64, or bfloat16 (autocast, channels-last)."""
    compile: bool = False
    """Compile the student with torch.compile; pays off on a GPU and over many epochs."""
    checkpoint_every: PositiveInt = 1
    """Epochs between checkpoints; what is lost with a worker is trained again, to the same numbers."""
    max_image_gib: PositiveFloat | None = None
    """Most memory that a set of images may take, in GiB; larger ones are read from the file of decoded images batch by
    batch, one batch ahead, to the same numbers. None: half of what is free."""
    data_digest: str | None = None
    """Digest that the training images must have, as configurations, cards and MLflow tell it; a search notes that of
    the images with which it begins, and every worker refuses others. None: any."""
    teacher_data_digest: str | None = None
    """Likewise of `teacher_data`."""
    ncm_images_per_class: PositiveInt = 50
    """Training images a class that estimate the class means for validation during stage embedding."""

    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    pretraining: TeacherConfig = field(default_factory=TeacherConfig)
    embedding_cache: EmbeddingCacheConfig = field(default_factory=EmbeddingCacheConfig)
    terms: TermSettings = field(default_factory=TermSettings)
    """Settings of the terms that have no place in `embedding` and `classifier`, by the term's name."""
    sources: Sources = field(default_factory=Sources)
    """Source text of the user's own files that the run names."""

    def __post_init__(self) -> None:
        """Check also that the stages of the method have epochs."""
        super().__post_init__()
        self.require(self.epochs[1] >= 1, "epochs", "at least 1 for stage classifier")
        if has_embedding_stage(self.method):
            self.require(self.epochs[0] >= 1, "epochs", f"at least 1 for stage embedding of {self.method}")
