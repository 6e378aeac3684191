"""Contrastive representation distillation with a memory (Tian, Krishnan and Isola, ICLR 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled import distributed
from refilled.config import Float, Searched, TermConfig
from refilled.config.fields import PositiveFloat, PositiveInt, ShareBelowOne
from refilled.errors import UserError
from refilled.keyed import derive_seed, keyed_uint64, keyed_uniform
from refilled.losses import contrastive_logits, contrastive_nce, sample_negatives
from refilled.terms.base import GlobalBatch, Local, Needs, Setting, Term, mean_of_rows


@dataclass(frozen=True, kw_only=True)
class CrdConfig(TermConfig):
    """weight x (student against the teacher's memory + teacher against the student's)."""

    weight: PositiveFloat = 0.8
    """Weight of the loss (the authors' 0.8)."""
    dim: PositiveInt = 128
    """Width of the shared space and of the memories."""
    temperature: PositiveFloat = 0.07
    """Temperature of the scores."""
    momentum: ShareBelowOne = 0.5
    """What a memory keeps of a row at an update."""
    num_negatives: PositiveInt = 16_384
    """Negatives of an image, of other classes; all that there are where these are fewer."""
    positive: Literal["exact", "relax"] = "exact"
    """exact: the image's own row of the memory; relax: that of any image of its class."""


class Crd(Term):
    """Two linear maps into a shared space, a memory of both sides with a row for each training image, two constants.

    Negatives are drawn without replacement, keyed by (seed, epoch, image). The constants Z are taken from the first
    global batch, as mean score x N. State: 2 x N x dim numbers, 25.6 MB of a checkpoint at N = 25,000. Any label
    spaces.
    """

    name: ClassVar[str] = "crd"
    Config: ClassVar[type[CrdConfig]] = CrdConfig
    space: ClassVar[tuple[Searched, ...]] = (Searched("temperature", Float(0.02, 0.5, log=True)),)
    weight_space: ClassVar[Searched] = Searched("weight", Float(0.05, 10.0, log=True))
    needs: ClassVar[Needs] = Needs(student=frozenset({"embedding"}), teacher=frozenset({"embedding"}))

    labels: Tensor
    student_memory: Tensor
    teacher_memory: Tensor
    log_normalisers: Tensor

    def __init__(self, config: CrdConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.student_map = nn.Linear(setting.student.embedding_dim, config.dim)
        self.teacher_map = nn.Linear(setting.known_teacher.embedding_dim, config.dim)
        self._seed = setting.seed
        self.num_images = len(setting.labels)
        counts = torch.bincount(setting.labels)
        self.num_negatives = min(config.num_negatives, self.num_images - int(counts.max()))
        if self.num_negatives < 1:
            raise UserError("method crd needs training images of at least two classes, which are its negatives.")
        self.register_buffer("labels", setting.labels, persistent=False)
        for side in ("student", "teacher"):
            self.register_buffer(f"{side}_memory", self._start_of_memory(side))
        # ln Z of the student's and of the teacher's scores; NaN until the first batch has been seen.
        self.register_buffer("log_normalisers", torch.full((2,), math.nan))
        self._has_normalisers = False

    def rows(self, local: Local) -> dict[str, Tensor]:
        """Each image's loss, both sides together, and what both memories are going to take."""
        dtype = self.student_map.weight.dtype
        student = F.normalize(self.student_map(local.student.embedding.to(dtype)), dim=1)
        teacher = F.normalize(self.teacher_map(local.known_teacher.embedding.to(dtype)), dim=1)
        columns = self._columns(local)
        of_student = contrastive_logits(student, self.teacher_memory, columns, temperature=self.config.temperature)
        of_teacher = contrastive_logits(teacher, self.student_memory, columns, temperature=self.config.temperature)
        self._set_normalisers(of_student, of_teacher)
        losses = [
            contrastive_nce(logits - log_z, num_images=self.num_images)
            for logits, log_z in zip((of_student, of_teacher), self.log_normalisers, strict=True)
        ]
        return {"crd": losses[0] + losses[1], "crd_student": student.detach(), "crd_teacher": teacher.detach()}

    def loss(self, rows: dict[str, Tensor], batch: GlobalBatch) -> Tensor:
        """Mean over the global batch."""
        loss: Tensor = self.config.weight * mean_of_rows(rows["crd"])
        return loss

    def update(self, rows: dict[str, Tensor], batch: GlobalBatch) -> None:
        """Move the rows of the batch's images towards their new embeddings, on the unit sphere."""
        for memory, new in (
            (self.student_memory, rows["crd_student"]),
            (self.teacher_memory, rows["crd_teacher"]),
        ):
            moved = self.config.momentum * memory[batch.image_ids] + (1 - self.config.momentum) * new
            memory[batch.image_ids] = F.normalize(moved, dim=1)

    def _start_of_memory(self, side: str) -> Tensor:
        """Uniform within ±sqrt(3 / dim), so that a row's expected squared length is 1."""
        images, columns = torch.arange(self.num_images)[:, None], torch.arange(self.config.dim)
        drawn = keyed_uniform(derive_seed(self._seed, "memory", side), images, columns)
        start: Tensor = (2 * drawn - 1) * (3 / self.config.dim) ** 0.5
        return start.float()

    def _columns(self, local: Local) -> Tensor:
        """Rows of the memories that each image is compared with, [b, 1 + K], its positive first."""
        negatives = sample_negatives(
            self.labels,
            local.image_ids,
            num_negatives=self.num_negatives,
            seed=derive_seed(self._seed, "negatives"),
            step_key=local.epoch,
        )
        positives = local.image_ids if self.config.positive == "exact" else self._of_class(local)
        return torch.cat((positives[:, None], negatives), dim=1)

    def _of_class(self, local: Local) -> Tensor:
        """An image of each image's class, drawn by (seed, epoch, image), [b]."""
        order = self.labels.argsort(stable=True)
        sizes = self.labels.bincount()
        own = sizes[local.labels]
        draws = keyed_uint64(derive_seed(self._seed, "positives"), local.epoch, local.image_ids)
        places = (sizes.cumsum(0) - sizes)[local.labels] + (draws.bitwise_and(2**62 - 1) % own)
        chosen: Tensor = order[places]
        return chosen

    def _set_normalisers(self, of_student: Tensor, of_teacher: Tensor) -> None:
        """Take ln Z from the first global batch; later calls do nothing."""
        if not self._has_normalisers and bool(self.log_normalisers.isnan().any()):
            # No score is above 1/τ times a row's length; so shifted, float64 holds the smallest beside the largest.
            shift = 1 / self.config.temperature
            sums = [(logits.detach().double() - shift).exp().sum() for logits in (of_student, of_teacher)]
            count = torch.tensor(float(of_student.numel()), dtype=torch.float64, device=of_student.device)
            student, teacher, number = distributed.sum_over_workers(torch.stack([*sums, count]))
            means = torch.stack([student, teacher]) / number
            self.log_normalisers.copy_(means.log() + shift + math.log(self.num_images))
        self._has_normalisers = True
