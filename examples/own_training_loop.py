"""The losses of the package in a training loop of one's own: no platform, no configuration, plain torch.

    python examples/own_training_loop.py --epochs 8

A teacher knows digits 0 to 5; a student of digits 4 to 9 first learns to compare images as the teacher does (Eq. 3-5),
then learns its classes with help from the teacher's prototypes (Eq. 6-8).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from refilled.losses import PrototypeSum, comparison_matching, instance_weights, local_distillation, teacher_posterior
from refilled.models import Model, build_model

TEMPERATURE = 0.5


def digits_of(classes: range) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 8, 8] and labels [N] from 0, of some digits."""
    data = load_digits()
    labels = torch.from_numpy(data.target)
    chosen = (labels >= classes.start) & (labels < classes.stop)
    images = torch.from_numpy(data.images).float()[chosen, None] / 16
    return images - images.mean(), labels[chosen] - classes.start


def batches(images: Tensor, labels: Tensor, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of 64."""
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(64):
            yield images[chosen], labels[chosen]


def descend(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    """The same optimiser everywhere."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True)


def train_classifier(model: Model, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Cross-entropy (Eq. 1)."""
    optimizer = descend(model.parameters())
    for seen, truth in batches(images, labels, epochs):
        loss = F.cross_entropy(model.train()(seen).logits, truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    """Teacher, both stages, accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    shape = {"num_classes": 6, "in_channels": 1, "image_size": 8}
    teacher = build_model("convnet-32", **shape, seed=0)
    train_classifier(teacher, *digits_of(range(0, 6)), epochs)
    teacher.eval().requires_grad_(False)

    images, labels = digits_of(range(4, 10))
    is_test = torch.arange(len(labels)) % 4 == 0
    train_images, train_labels = images[~is_test], labels[~is_test]
    student = build_model("convnet-8", **shape, seed=1)
    optimizer = descend(student.parameters())
    for seen, truth in batches(train_images, train_labels, epochs):  # stage embedding
        embedding = student.train()(seen).embedding
        loss = comparison_matching(embedding, teacher(seen).embedding, truth, temperature=TEMPERATURE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    sums = PrototypeSum(6, teacher.embedding_dim)
    sums.add(teacher(train_images).embedding, train_labels)
    optimizer = descend(student.parameters())
    for seen, truth in batches(train_images, train_labels, epochs):  # stage classifier
        logits, present = student.train()(seen).logits, truth.unique()
        posterior = teacher_posterior(teacher(seen).embedding, sums.means(), present, form="prototype", temperature=1.0)
        weights = instance_weights(posterior, rule="confidence")
        loss = F.cross_entropy(logits, truth)
        loss = loss + local_distillation(logits, posterior, present, weights, temperature=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        correct = (student.eval()(images[is_test]).logits.argmax(1) == labels[is_test]).float().mean()
    print(f"test accuracy of the student: {100 * float(correct):.1f} %")


if __name__ == "__main__":
    main()
