"""Which embedding caches runs share, and whether one asks less of the teacher than the runs would without."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from refilled.config import RunConfig, content_hash
from refilled.data.views import Views
from refilled.stages import stages_of
from refilled.storage import Storage
from refilled.tasks.classification import load_task
from refilled.teacher import input_identity, teacher_name


@dataclass
class SharedCache:
    """One embedding cache, and how much it would be used.

    Attributes:
        run: One of the runs that ask for it.
        epochs: What all of them train with a teacher that a cache can answer for.
    """

    run: RunConfig
    epochs: int

    @property
    def num_views(self) -> int:
        """Passes of the teacher over the data to compute it."""
        return len(Views(self.run.views).view_ids)


def epochs_with_teacher(config: RunConfig) -> int:
    """Epochs of a run whose steps ask the teacher what a cache can answer."""
    return sum(stage.num_epochs for stage in stages_of(config) if stage.is_cacheable)


def pays(config: RunConfig, epochs: int) -> bool:
    """Whether a cache asks less of the teacher than the runs that share it would without; or what the mode says.

    Args:
        config: The configuration of one of the runs.
        epochs: What all of them train with the teacher.
    """
    if config.embedding_cache.mode != "auto":
        return config.embedding_cache.mode == "cached"
    return len(Views(config.views).view_ids) < epochs


def shared_caches(runs: Iterable[tuple[RunConfig, int]], storage: Storage) -> Mapping[str, SharedCache]:
    """The different caches that runs would share, by what names them before their teacher is there."""
    caches: dict[str, SharedCache] = {}
    for run, count in runs:
        if (name := cache_name(run, storage)) is not None:
            caches.setdefault(name, SharedCache(run, 0)).epochs += epochs_with_teacher(run) * count
    return caches


def cache_name(run: RunConfig, storage: Storage) -> str | None:
    """What names a run's embedding cache before its teacher is there; none where it asks for none."""
    if run.embedding_cache.mode == "live" or not epochs_with_teacher(run):
        return None
    task = load_task(run, storage)
    views, dtype = run.views.to_dict(), run.embedding_cache.dtype
    teacher = teacher_name(run, storage)
    return content_hash([teacher, task.train.digest, views, run.precision, dtype, *input_identity(task)])
