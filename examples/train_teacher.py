"""A teacher from outside: torchvision's resnet18, trained in a plain torch loop that knows nothing of refilled.

    python examples/train_teacher.py --data parquet:DIR --classes 50 --out teacher

writes `teacher.pt` (the weights), `teacher.txt` (its classes) and `students.txt` (as many other classes of the data,
for which a student is wanted). What brings it:

    python tune/search.py --data parquet:DIR --teachers torchvision:resnet18 --teacher-weights teacher.pt \
        --teacher-classes teacher.txt --teacher-image-size 32 --teacher-mean 0.5 0.5 0.5 --teacher-std 0.25 0.25 0.25 \
        --student-classes students.txt --students mobilenet-0.25 --images-per-class 25
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

from refilled.data.sources import load_train
from refilled.storage import Storage

MEAN, STD = 0.5, 0.25  # what the teacher is told apart from its weights: how it wants its pixels


def normalised(images: Tensor) -> Tensor:
    """Uint8 [B, C, H, W] as the network sees it; grey images become three equal channels."""
    return ((images.float() / 255 - MEAN) / STD).expand(-1, 3, -1, -1)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to an eighth and mirrored or not."""
    side = images.shape[-1]
    reach = max(1, side // 8)
    padded = F.pad(images, [reach] * 4)
    moves = torch.randint(0, 2 * reach + 1, (len(images), 2), generator=generator).tolist()
    shifted = torch.stack([each[:, y : y + side, x : x + side] for each, (y, x) in zip(padded, moves, strict=True)])
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, shifted.flip(-1), shifted)


def train(
    network: nn.Module, images: Tensor, labels: Tensor, epochs: int, *, bfloat16: bool, batch_size: int = 256
) -> None:
    """SGD with a one-cycle schedule."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    network.train()
    for epoch in range(epochs):
        began_s, loss_sum = time.perf_counter(), 0.0
        for chosen in torch.randperm(len(images), generator=generator).split(batch_size):
            views = normalised(augmented(images[chosen], generator)).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = F.cross_entropy(network(views), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.item() * len(chosen)
        print(
            f"epoch {epoch + 1}: loss {loss_sum / len(images):.3f}, {time.perf_counter() - began_s:.0f} s", flush=True
        )


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest score is their label's."""
    network.eval()
    parts = zip(images.split(500), labels.split(500), strict=True)
    return sum(int((network(normalised(each)).argmax(1) == truth).sum()) for each, truth in parts) / len(labels)


def main() -> None:
    """Read, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="as `python tune/search.py --data`")
    parser.add_argument("--image-size", type=int, default=None)
    parser.add_argument("--classes", type=int, default=5, help="the first so many of the data, by name")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--bfloat16", action="store_true", help="faster where the processor has it")
    parser.add_argument("--out", type=Path, default=Path("teacher"))
    given = parser.parse_args()
    torch.manual_seed(0)
    data = load_train(given.data, storage=Storage.open("runs"), image_size=given.image_size)
    names = sorted(data.class_names)
    own = [data.class_names.index(name) for name in names[: given.classes]]
    new_label = torch.full((len(names),), -1)
    new_label[own] = torch.arange(len(own))
    labels = new_label[data.labels]
    images, labels = data.images[labels >= 0], labels[labels >= 0]
    is_held = torch.arange(len(labels)) % 10 == 0  # a tenth, to see how good it is
    network = resnet18(num_classes=len(own)).to(memory_format=torch.channels_last)
    train(network, images[~is_held], labels[~is_held], given.epochs, bfloat16=given.bfloat16)
    print(f"accuracy on held-out images: {accuracy(network, images[is_held], labels[is_held]):.3f}")
    torch.save(network.state_dict(), given.out.with_suffix(".pt"))
    given.out.with_suffix(".txt").write_text("\n".join(names[: given.classes]) + "\n", encoding="utf-8")
    others = names[given.classes : 2 * given.classes]
    given.out.with_name("students.txt").write_text("\n".join(others) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
