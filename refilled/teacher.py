"""The teacher: pre-trained once, frozen, asked for embeddings, scores and feature maps.

A teacher is itself a run: the vanilla student of its own architecture on the teacher's classes, in a folder named by
content hash, so any trial on any node finds it again, a killed pre-training continues, and two trials that need it at
once train it once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from refilled.config import ClassifierConfig, RunConfig, content_hash
from refilled.identity import run_key
from refilled.models import Model
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


def pretraining_run(config: RunConfig) -> RunConfig:
    """The run that makes a configuration's teacher: Eq. 1 on the teacher's window, with the recipe `pretraining`.

    Everything else keeps its default, so that two configurations with the same teacher name the same run.
    """
    recipe = config.pretraining
    return RunConfig(
        data=config.data,
        image_size=config.image_size,
        class_order=config.class_order,
        num_teacher_classes=config.num_teacher_classes,
        num_student_classes=config.num_teacher_classes,
        overlap=1.0,
        val_fraction=config.val_fraction,
        split_seed=config.split_seed,
        teacher=config.teacher,
        student=config.teacher,
        method="student",
        epochs=(0, config.teacher_epochs),
        global_batch_size=recipe.global_batch_size,
        seed=recipe.seed,
        precision=config.precision,
        classifier=ClassifierConfig(schedule=recipe.schedule),
        optimizer=recipe.optimizer,
        views=config.views,
        # The teacher's own file alone: what it was made of must not depend on who asked for it first.
        sources=config.sources.only({config.teacher.rpartition(":")[0]}),
    )


def teacher_folder(config: RunConfig, storage: Storage) -> RunFolder:
    """Where the teacher of a configuration is kept, whether or not it exists yet."""
    pretraining = pretraining_run(config)
    task = load_task(pretraining, storage)
    return RunFolder(storage, storage.root / "teachers" / run_key(pretraining, task.spaces, task.data_digest))


def identity_of(folder: RunFolder) -> str:
    """Hash of a finished teacher's configuration and weights."""
    return content_hash([folder.path.name, hashlib.sha256(folder.model_path.read_bytes()).hexdigest()])


class KnownEmbeddings(Protocol):
    """What the teacher says of training images and views, where that is known already."""

    def embed(self, image_ids: Tensor, view_ids: Tensor) -> Tensor:
        """Embeddings [B, D] by image and view, int64 [B] each."""


class FrozenTeacher:
    """A pre-trained network that is only asked, never trained.

    Attributes:
        identity: Hash of its configuration and weights.
        embedding_dim: D.
        num_classes: C', of its own head.
        feature_channels: Channels of every feature map.
        borders_end_in_relu: See `Model.borders_end_in_relu`.
        prototypes: [C, D] class means of the student's classes over the whole training split, unaugmented (Eq. 6).
        cache: What it says of every training image and view, where that is known already.
    """

    def __init__(
        self, model: Model, prototypes: Tensor, compute: Compute, rounding: torch.dtype, identity: str
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
        self.cache: KnownEmbeddings | None = None

    @classmethod
    def load(cls, config: RunConfig, task: Task, storage: Storage, compute: Compute) -> FrozenTeacher:
        """The finished teacher of a configuration, with its prototypes for the student's classes.

        Args:
            config: The configuration of the student's run.
            task: The student's images.
            storage: Where the teacher must be already.
            compute: Device and precision.
        """
        folder = teacher_folder(config, storage)
        storage.fetch(folder.model_path)
        model = compute.place_model(load_model(folder.model_path))
        identity = identity_of(folder)

        def build(path: Path | None) -> Mapping[str, Any]:
            means = class_means(model, task.train, task.normalization, compute)
            if path is not None:
                (path / "prototypes.pt").write_bytes(tensor_bytes({"prototypes": means.cpu()}))
            return {"teacher": identity, "train_digest": task.train.digest, "precision": config.precision}

        key = content_hash([identity, task.train.digest, config.precision])
        artifact = storage.artifacts.make(PROTOTYPES, key, build)
        assert artifact is not None, "it waits for whoever is making it"
        prototypes = load_tensors(artifact.path / "prototypes.pt")["prototypes"].to(compute.device)
        return cls(model, prototypes, compute, getattr(torch, config.embedding_cache.dtype), identity)

    def embed(self, images: Tensor, image_ids: Tensor, view_ids: Tensor) -> Tensor:
        """Embeddings [B, D] of views of training images, as an embedding cache has them, with or without one.

        Args:
            images: The views, normalised, [B, C, H, W].
            image_ids: Int64 [B], positions in the training set.
            view_ids: Int64 [B].
        """
        if self.cache is not None:
            return self.cache.embed(image_ids, view_ids)
        return self.embed_live(images).to(self._rounding).to(self._compute.dtype)

    def output(self, images: Tensor) -> TeacherOutput:
        """Embedding, rounded like `embed`'s, and maps of normalised images [B, C, H, W], by running the network."""
        with torch.no_grad():
            output = self._compute.forward(self._model, images)
        embedding = output.embedding.to(self._rounding).to(self._compute.dtype)
        return TeacherOutput(embedding, tuple(wide(each) for each in output.features))

    def embed_live(self, images: Tensor) -> Tensor:
        """Embeddings [B, D] of normalised images [B, C, H, W], by running the network, unrounded."""
        with torch.no_grad():
            return self._compute.forward(self._model, images).embedding

    def logits(self, embedding: Tensor) -> Tensor:
        """The teacher's own class scores [B, C'] of its embeddings [B, D]."""
        with torch.no_grad():
            scores: Tensor = self._model.head(embedding)
        return scores
