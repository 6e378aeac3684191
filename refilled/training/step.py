"""One step: what both networks say of a batch, the rows that the terms ask for, their loss, and the update."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from refilled import distributed
from refilled.data.batches import Batch
from refilled.data.pixels import gather
from refilled.keyed import derive_seed, keyed_uint64
from refilled.stages import Stage
from refilled.terms import GlobalBatch, Local, TeacherOutput, Term
from refilled.terms.base import wide
from refilled.training.learner import Learner


def step(
    learner: Learner, stage: Stage, optimizer: torch.optim.Optimizer, batch: Batch, epoch: int
) -> tuple[Tensor, Tensor]:
    """One update by one global batch; returns its loss, detached, and the norm of its gradients; nothing waits."""
    device = learner.compute.device
    local = _local(learner, stage, batch, epoch)
    rows = _gather(learner.present_terms, local, batch)
    everyone = GlobalBatch(
        image_ids=batch.image_ids.to(device, non_blocking=True),
        labels=batch.labels.to(device, non_blocking=True),
        classes=batch.classes.to(device, non_blocking=True),
        largest_class=batch.largest_class,
        epoch=epoch,
    )
    loss = stage.weight * _sum(term.loss(rows, everyone) for term in learner.present_terms)
    parameters = learner.parameters()
    for parameter in parameters:  # those that the stage does not train, too: else their gradients would add up
        parameter.grad = None
    loss.backward()  # type: ignore[no-untyped-call]  # torch's, without types
    distributed.sum_gradients(parameters)
    norm = nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
    optimizer.step()
    with torch.no_grad():
        detached = {name: each.detach() for name, each in rows.items()}
        for term in learner.present_terms:
            term.update(detached, everyone)
    return loss.detach(), norm


def _local(learner: Learner, stage: Stage, batch: Batch, epoch: int) -> Local:
    """This worker's images and what both networks say of them."""
    config, compute = learner.config, learner.compute
    share = batch.share.to(compute.device, non_blocking=True)
    view_ids = learner.views.draw(share, seed=config.seed, epoch=epoch)
    pixels = gather(learner.images, share)
    images = compute.place_images(learner.views.render(pixels, view_ids), learner.task.normalization)
    keys = keyed_uint64(derive_seed(config.seed, "dropout"), epoch, share) if config.optimizer.dropout else None
    output = compute.forward(learner.trained, images, keys)
    teacher = None
    if stage.needs_teacher:
        assert learner.teacher is not None
        if stage.is_cacheable:
            teacher = TeacherOutput(learner.teacher.embed(images, share, view_ids), ())
        else:
            teacher = learner.teacher.output(images, share, view_ids)
    if any("features" in term.needs.student for term in stage.terms):
        output = output._replace(features=tuple(wide(each) for each in output.features))
    start = sum(batch.counts[: distributed.rank()])
    return Local(
        image_ids=share,
        labels=batch.labels[start : start + len(share)].to(compute.device, non_blocking=True),
        images=images,
        student=output,
        teacher=teacher,
        epoch=epoch,
    )


def _gather(terms: Iterable[Term], local: Local, batch: Batch) -> dict[str, Tensor]:
    """The rows that the terms ask for, of all workers; what several terms ask for is gathered once.

    Raises:
        ValueError: Two terms give different rows one name.
    """
    asked: dict[str, Tensor] = {}
    for term in terms:
        for name, rows in term.rows(local).items():
            if asked.setdefault(name, rows) is not rows:
                raise ValueError(f"term {term.name} gives the rows {name!r} another meaning than a term before it")
    return {name: distributed.gather_rows(rows, batch.counts) for name, rows in asked.items()}


def _sum(losses: Iterable[Tensor]) -> Tensor:
    first, *others = losses
    for each in others:
        first = first + each
    return first
