"""What the teacher's embedding is worth without any training: the class of the nearest training image, by cosine.

    python tests/benchmarks/bench_nearest_neighbour.py runs/summary.json

prints it beside the tested accuracies of a finished search, a line a row. Training images are those of the refits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from refilled.config import RunConfig
from refilled.data.images import ImageSet
from refilled.data.label_space import select_classes
from refilled.data.sources import load_test
from refilled.models import Model
from refilled.stages import needs_teacher
from refilled.storage import Storage
from refilled.tasks.classification import load_task
from refilled.tasks.normalization import Normalization
from refilled.teacher import load_network
from refilled.training.compute import Compute


@torch.no_grad()
def embedded(model: Model, images: ImageSet, normalization: Normalization, compute: Compute) -> torch.Tensor:
    """Unit embeddings [N, D]."""
    parts = torch.arange(len(images)).split(256)
    found = [model(compute.place_images(images.images[each], normalization)).embedding for each in parts]
    return F.normalize(torch.cat(found), dim=1)


def nearest_neighbour(run: RunConfig, storage: Storage) -> float:
    """Test accuracy of the nearest training image's class in the embedding of a run's teacher."""
    compute = Compute(torch.device("cpu"), "float32")
    task = load_task(run, storage)
    seen = task.as_teacher_sees
    model = load_network(run, task, storage)[0].eval()
    test = load_test(run.data, storage=storage, image_size=run.image_size and seen.train.images.shape[2])
    test = select_classes(test, torch.arange(len(test.labels)), task.spaces.student)
    train = embedded(model, seen.train, seen.normalization, compute)
    nearest = (embedded(model, test, seen.normalization, compute) @ train.T).argmax(dim=1)
    return float((seen.train.labels[nearest] == test.labels).float().mean())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("summary", type=Path)
    path = parser.parse_args().summary
    storage, known = Storage.open(path.parent), dict[object, float]()
    for row in json.loads(path.read_text(encoding="utf-8")):
        place = (row["overlap"], row["teacher"], row["images_per_class"])
        run = dataclasses.replace(RunConfig.from_dict(row["config"]), val_fraction=0.0)
        if needs_teacher(run) and place not in known:
            known[place] = nearest_neighbour(run, storage)
            print(f"{place}: nearest neighbour {100 * known[place]:.2f} %")
        ci95 = row["test_accuracy_ci95"]
        interval = "" if ci95 is None else f" ± {100 * ci95:.2f}"
        print(f"{place} {row['student']} {row['method']}: {100 * row['test_accuracy_mean']:.2f}{interval} %")


if __name__ == "__main__":
    main()
