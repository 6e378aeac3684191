"""What a user writes: a term and networks, as texts, and a small run with them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from refilled.config import RunConfig
from refilled.presets import smoke
from refilled.stages import with_own_code

TERM = (Path(__file__).parents[1] / "examples/own_term/my_terms.py").read_text(encoding="utf-8") + "\n\nNOTHING = 3\n"
NETWORK = '''
from torch import Tensor, nn

from refilled.models import Model, Output


class Tiny(Model):
    """One convolution."""

    def __init__(self, *, num_classes: int, in_channels: int, image_size: int, dropout: float) -> None:
        super().__init__(embedding_dim=6, num_classes=num_classes, feature_channels=(6,))
        self.conv = nn.Conv2d(in_channels, 6, 3, padding=1)
        self.scale = nn.Parameter(__import__("torch").rand(6))
        self.head = nn.Linear(6, num_classes)

    def forward(self, images: Tensor, dropout_keys: Tensor | None = None) -> Output:
        maps = self.conv(images) * self.scale[:, None, None]
        return self.pool_and_classify(maps.relu(), (maps,))


def broken(**arguments: object) -> Model:
    raise RuntimeError("no such network")


def other(**arguments: object) -> nn.Module:
    return nn.Linear(2, 2)
'''


def small(method: str, **changes: object) -> RunConfig:
    run = dataclasses.replace(smoke().run, method=method, overlap=0.4, epochs=(1, 1), teacher_epochs=1)
    return with_own_code(dataclasses.replace(run, **changes))  # type: ignore[arg-type]
