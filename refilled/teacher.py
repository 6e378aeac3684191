"""The teacher: pre-trained once or brought, frozen, asked for embeddings, scores and feature maps.

A teacher that is pre-trained is itself a run: the vanilla student of its own architecture on the teacher's classes, in
a folder named by content hash, so any trial on any node finds it again, a killed pre-training continues, and two trials
that need it at once train it once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from refilled.brought import brought_teacher
from refilled.config import ClassifierConfig, RunConfig, content_hash
from refilled.data.label_space import LabelSpaces
from refilled.data.pixels import gather
from refilled.data.views import Views
from refilled.errors import UserError
from refilled.identity import identity_of_brought, run_key
from refilled.models import Model, Output
from refilled.models.adapted import Adapted
from refilled.stages import own_code
from refilled.storage import Kind, Storage
from refilled.storage.model_file import load_model
from refilled.storage.run_folder import RunFolder
from refilled.storage.tensor_file import load_tensors, tensor_bytes
from refilled.tasks.classification import Task, load_task
from refilled.terms import TeacherOutput
from refilled.terms.base import wide
from refilled.training.compute import Compute
from refilled.training.evaluation import class_means

PROTOTYPES = Kind("prototypes")
ASKED_AT_ONCE = 16  # images, of another library's network on a processor: a multiple of all vector lengths


def pretraining_run(config: RunConfig) -> RunConfig:
    """The run that makes a configuration's teacher: Eq. 1 on the teacher's classes, with the recipe `pretraining`.

    Everything else keeps its default, so that two configurations with the same teacher name the same run.
    """
    assert config.teacher_weights is None, "a teacher that is brought is not pre-trained"
    recipe = config.pretraining
    data = config.teacher_data or config.data
    return RunConfig(
        data=data,
        data_digest=config.data_digest if data == config.data else config.teacher_data_digest,
        image_size=config.image_size,
        class_order=config.class_order if data == config.data else "alphabetical",
        num_teacher_classes=config.num_teacher_classes,
        num_student_classes=config.num_teacher_classes,
        # Where classes are given, the run's own are the teacher's, or all of its data.
        teacher_data=data if config.is_explicit else None,
        teacher_classes=config.teacher_classes,
        student_classes=config.teacher_classes,
        overlap=1.0,
        val_fraction=config.val_fraction,
        split_seed=config.split_seed,
        teacher=config.teacher,
        student=config.teacher,
        student_embedding=config.teacher_embedding,
        student_features=config.teacher_features,
        method="student",
        epochs=(0, config.teacher_epochs),
        global_batch_size=recipe.global_batch_size,
        seed=recipe.seed,
        precision=config.precision,
        classifier=ClassifierConfig(schedule=recipe.schedule),
        optimizer=recipe.optimizer,
        views=config.views,
        # The teacher's own files alone: what it was made of must not depend on who asked for it first.
        sources=own_code(config, config.teacher, *([config.teacher_classes] if config.teacher_classes else [])),
    )


def teacher_folder(config: RunConfig, storage: Storage) -> RunFolder:
    """Where the teacher of a configuration that pre-trains one is kept, whether or not it exists yet."""
    pretraining = pretraining_run(config)
    task = load_task(pretraining, storage)
    return RunFolder(storage, storage.root / "teachers" / run_key(pretraining, task.spaces, task.data_digest))


def teacher_name(config: RunConfig, storage: Storage) -> str:
    """What names a configuration's teacher before it is there: its folder's name, or what is brought."""
    if config.teacher_weights is None:
        return teacher_folder(config, storage).path.name
    return content_hash(identity_of_brought(config))


def is_ready(config: RunConfig, storage: Storage) -> bool:
    """Whether the teacher of a configuration is there: pre-trained, or brought."""
    return config.teacher_weights is not None or teacher_folder(config, storage).result() is not None


def load_network(config: RunConfig, task: Task, storage: Storage) -> tuple[Model, str]:
    """The finished teacher's network on the CPU, and the hash of what it is."""
    if config.teacher_weights is not None:
        return brought_teacher(config, task, storage), content_hash(identity_of_brought(config))
    folder = teacher_folder(config, storage)
    storage.fetch(folder.model_path)
    return load_model(folder.model_path), identity_of(folder)


def identity_of(folder: RunFolder) -> str:
    """Hash of a finished teacher's configuration and weights."""
    return content_hash([folder.path.name, hashlib.sha256(folder.model_path.read_bytes()).hexdigest()])


class KnownEmbeddings(Protocol):
    """What the teacher says of training images and views, where that is known already."""

    def embed(self, image_ids: Tensor, view_ids: Tensor) -> Tensor:
        """Embeddings [B, D] by image and view, int64 [B] each."""


def input_identity(task: Task) -> list[object]:
    """What tells a teacher's input from the student's; nothing where it is the same."""
    if task.for_teacher is None:
        return []
    seen = task.for_teacher
    normalization = seen.normalization
    return [[seen.train.digest, normalization.mean.tolist(), normalization.std.tolist(), normalization.size]]


class InputView:
    """Views of training images as the teacher sees them: at its own size, under its own normalisation.

    Args:
        config: The run's.
        task: Its images.
        compute: Device and precision.
    """

    def __init__(self, config: RunConfig, task: Task, compute: Compute) -> None:
        seen = task.as_teacher_sees
        self._is_students = task.for_teacher is None
        self._normalization, self._compute = seen.normalization, compute
        self._images = seen.train.images
        self._views = Views(config.views, scale=self._images.shape[2] / task.train.images.shape[2])

    def like(self, images: Tensor, image_ids: Tensor, view_ids: Tensor) -> Tensor:
        """What the student sees [B, C, H, W] as the teacher does; arguments as in `FrozenTeacher.embed`."""
        return images if self._is_students else self(image_ids, view_ids)

    def __call__(self, image_ids: Tensor, view_ids: Tensor) -> Tensor:
        """Normalised views [B, c, h, w] of training images."""
        device = self._compute.device
        pixels = gather(self._images, image_ids).to(device)
        return self._compute.place_images(self._views.render(pixels, view_ids.to(device)), self._normalization)


class FrozenTeacher:
    """A pre-trained network that is only asked, never trained.

    Attributes:
        identity: Hash of its configuration and weights.
        embedding_dim: D.
        num_classes: C', of its own head.
        feature_channels: Channels of every feature map.
        borders_end_in_relu: See `Model.borders_end_in_relu`.
        prototypes: [C, D] class means of the student's classes over the whole training split, unaugmented (Eq. 6).
        images: How it sees the training images.
        cache: What it says of every training image and view, where that is known already.
    """

    def __init__(
        self,
        model: Model,
        prototypes: Tensor,
        compute: Compute,
        rounding: torch.dtype,
        identity: str,
        images: InputView,
    ) -> None:
        self._model = model.requires_grad_(False).eval()
        self._compute = compute
        self._rounding = rounding
        self.identity = identity
        self.embedding_dim = model.embedding_dim
        self.num_classes = model.num_classes
        self.feature_channels = model.feature_channels
        self.borders_end_in_relu = model.borders_end_in_relu
        self.prototypes = prototypes
        self.images = images
        self.cache: KnownEmbeddings | None = None
        self._order: Tensor | None = None

    @classmethod
    def load(cls, config: RunConfig, task: Task, storage: Storage, compute: Compute) -> FrozenTeacher:
        """The finished teacher of a configuration, with its prototypes for the student's classes.

        Args:
            config: The configuration of the student's run.
            task: The student's images.
            storage: Where the teacher must be already.
            compute: Device and precision.
        """
        network, identity = load_network(config, task, storage)
        model = compute.place_model(network)
        seen = task.as_teacher_sees

        def build(path: Path | None) -> Mapping[str, Any]:
            means = class_means(model, seen.train, seen.normalization, compute)
            if path is not None:
                (path / "prototypes.pt").write_bytes(tensor_bytes({"prototypes": means.cpu()}))
            return {"teacher": identity, "train_digest": task.train.digest, "precision": config.precision}

        key = content_hash([identity, task.train.digest, config.precision, *input_identity(task)])
        artifact = storage.artifacts.make(PROTOTYPES, key, build)
        assert artifact is not None, "it waits for whoever is making it"
        prototypes = load_tensors(artifact.path / "prototypes.pt")["prototypes"].to(compute.device)
        rounding = getattr(torch, config.embedding_cache.dtype)
        teacher = cls(model, prototypes, compute, rounding, identity, InputView(config, task, compute))
        teacher.order_scores(task.spaces)
        return teacher

    def order_scores(self, spaces: LabelSpaces) -> None:
        """Let scores come in the order of the student's classes, where the teacher's are the same in another."""
        if spaces.teacher != spaces.student and sorted(spaces.teacher) == sorted(spaces.student):
            position = {name: number for number, name in enumerate(spaces.teacher)}
            self._order = torch.tensor([position[name] for name in spaces.student], device=self._compute.device)

    def embed(self, images: Tensor, image_ids: Tensor, view_ids: Tensor) -> Tensor:
        """Embeddings [B, D] of views of training images, as an embedding cache has them, with or without one.

        Args:
            images: The views as the student sees them, normalised, [B, C, H, W].
            image_ids: Int64 [B], positions in the training set.
            view_ids: Int64 [B].
        """
        if self.cache is not None:
            return self.cache.embed(image_ids, view_ids)
        return self.embed_live(self.images.like(images, image_ids, view_ids)).to(self._rounding).to(self._compute.dtype)

    def output(self, images: Tensor, image_ids: Tensor, view_ids: Tensor) -> TeacherOutput:
        """Embedding, rounded like `embed`'s, and maps, by running the network; arguments as in `embed`."""
        output = self._ask(self.images.like(images, image_ids, view_ids))
        embedding = output.embedding.to(self._rounding).to(self._compute.dtype)
        return TeacherOutput(embedding, tuple(wide(each) for each in output.features))

    def embed_live(self, images: Tensor) -> Tensor:
        """Embeddings [B, D] of normalised images as the teacher sees them, by running the network, unrounded."""
        return self._ask(images).embedding

    @torch.no_grad()
    def _ask(self, images: Tensor) -> Output:
        """What the network says of images.

        A processor's convolutions and products of matrices may round an image's numbers otherwise in a batch of another
        size, as was seen with other libraries' networks: these are asked in batches of one size, the last one filled
        up, so that a cache holds what a step would be told, whatever the step's batch.
        """
        if not isinstance(self._model, Adapted) or images.device.type != "cpu" or not len(images):
            return self._compute.forward(self._model, images)
        missing = -len(images) % ASKED_AT_ONCE
        filled = torch.cat([images, images[:1].expand(missing, *images.shape[1:])])
        parts = [self._compute.forward(self._model, each) for each in torch.split(filled, ASKED_AT_ONCE)]
        embedding, logits = (torch.cat(each)[: len(images)] for each in list(zip(*parts, strict=True))[:2])
        maps = tuple(torch.cat(each)[: len(images)] for each in zip(*(part.features for part in parts), strict=True))
        return Output(embedding, logits, maps)

    def logits(self, embedding: Tensor) -> Tensor:
        """The teacher's own class scores [B, C'] of its embeddings [B, D].

        Raises:
            UserError: It was brought without a head.
        """
        if not self._model.has_scores:
            raise UserError(
                "teacher_weights must have a last linear layer for methods that ask the teacher for class scores; this "
                "teacher has none, so use a method that asks for embeddings, such as refilled."
            )
        with torch.no_grad():
            scores: Tensor = self._model.head(embedding)
        return scores if self._order is None else scores[:, self._order]
