"""One search: a grid of cells, a budget, and where things run and are kept."""

from __future__ import annotations

from dataclasses import dataclass, field

from refilled.config.base import Config, require
from refilled.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Config):
    """A whole search; a preset is a function that returns one."""

    run: RunConfig = field(default_factory=RunConfig)
    """What every run of the search shares; cells and trials vary it."""
    overlaps: tuple[float, ...] = (0.0, 0.4, 1.0)
    """Overlap ratios of the grid (section 5.1.1)."""
    teachers: tuple[str, ...] = ("convnet-32",)
    """Teacher architectures of the grid."""
    students: tuple[str, ...] = ("convnet-8",)
    """Student architectures of the grid."""
    trials: int = 16
    """Trials of every cell, and of every vanilla student beside it."""
    seeds: int = 3
    """Refits of every winner, each with its own seed."""
    workers_per_trial: int = 1
    """Workers of one trial; above 1 every trial runs on a Ray Train TorchTrainer."""
    cpus_per_worker: float = 1.0
    """CPUs of one worker; torch uses as many threads, at least one."""
    gpus_per_worker: float = 0.0
    """GPUs of one worker; a fraction lets several trials share one."""
    storage: str = "runs"
    """Folder of caches, teachers, run folders, stores and the summary."""
    tracking_uri: str | None = None
    """MLflow tracking URI; none: a SQLite file in the storage folder."""
    study_storage: str | None = None
    """Optuna storage URL; none: a SQLite file in the storage folder."""
    experiment: str = "refilled"
    """MLflow experiment, and the name under which the search is continued."""

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("overlaps", "teachers", "students"):
            values = getattr(self, name)
            require(len(values) >= 1, name, "at least one value", values)
            require(len(set(values)) == len(values), name, "different values", values)
        for overlap in self.overlaps:
            require(0 <= overlap <= 1, "overlaps", "in [0, 1]", overlap)
        require(self.trials >= 1, "trials", "at least 1", self.trials)
        require(self.seeds >= 1, "seeds", "at least 1", self.seeds)
        require(self.workers_per_trial >= 1, "workers_per_trial", "at least 1", self.workers_per_trial)
        require(self.cpus_per_worker > 0, "cpus_per_worker", "above 0", self.cpus_per_worker)
        require(self.gpus_per_worker >= 0, "gpus_per_worker", "at least 0", self.gpus_per_worker)
        require(self.run.val_fraction > 0, "val_fraction", "above 0 in a search", self.run.val_fraction)
        require(bool(self.experiment.strip()), "experiment", "a name", self.experiment)
