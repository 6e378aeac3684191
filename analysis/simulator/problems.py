"""The small real problems whose learning curves are recorded: hard enough that few settings come near the best."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from refilled.config import RunConfig, ViewConfig
from refilled.presets import cifar100, smoke

OVERLAPS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # section 5.1.1


def problems(cifar_data: str = "cifar100") -> Mapping[str, RunConfig]:
    """Runs by name; names that differ in the overlap alone are neighbouring cells of one search.

    Half of the digits are held out, which leaves 67 images a class to learn from and makes accuracies as fine as 0.3 %.

    Args:
        cifar_data: Where CIFAR-100 is, as `RunConfig.data` says it.
    """
    digits = dataclasses.replace(smoke().run, student="convnet-3", val_fraction=0.5)
    cifar = dataclasses.replace(
        cifar100().run,
        data=cifar_data,
        num_teacher_classes=10,
        num_student_classes=10,
        overlap=0.4,
        val_fraction=0.2,
        teacher="convnet-32",
        student="convnet-8",
        teacher_epochs=15,
        epochs=(4, 8),
        global_batch_size=128,
        precision="float32",
        views=ViewConfig(num_views=8),
    )
    found = {f"digits-{overlap:g}": dataclasses.replace(digits, overlap=overlap) for overlap in OVERLAPS}
    found["digits-student"] = dataclasses.replace(digits, overlap=0.4, method="student", epochs=(0, sum(digits.epochs)))
    found["cifar-0.4"] = cifar
    found["cifar-student"] = dataclasses.replace(cifar, method="student", epochs=(0, sum(cifar.epochs)))
    return found
