"""One search: a grid of cells, a budget, and where things run and are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from refilled.config.base import Config, is_positive, require
from refilled.config.run import RunConfig
from refilled.methods import composition

Sampler = Literal["tpe", "gp", "random", "qmc"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)
Pruner = Literal["halving", "hyperband", "median", "none"]
PRUNERS: tuple[str, ...] = get_args(Pruner)


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Config):
    """A whole search; a preset is a function that returns one."""

    run: RunConfig = field(default_factory=RunConfig)
    """What every run of the search shares; cells, methods and trials vary it."""
    methods: tuple[str, ...] = ("student", "refilled")
    """Methods that are compared in every cell, each with a study of its own: names such as student, refilled or rkd, or
    terms by stage such as 'rkd>cross_entropy+lkd' with your own as path/file.py:Name. --method A is short for --methods
    student A."""
    overlaps: tuple[float, ...] = (0.0, 0.4, 1.0)
    """Overlap ratios of the grid (section 5.1.1)."""
    teachers: tuple[str, ...] = ("convnet-32",)
    """Teacher architectures of the grid."""
    students: tuple[str, ...] = ("convnet-8",)
    """Student architectures of the grid."""
    trials: int = 16
    """Trials of every method in every cell; on average, see `adaptive_share`."""
    max_hours: float | None = None
    """Hours after the start in which trials may run; none starts that would end later, at the pace of those before."""
    max_epochs_total: int | None = None
    """Epochs that all trials of the search may train together; none: no limit."""
    adaptive_share: float = 0.25
    """Share of the trials that goes where the winner is still uncertain, instead of to all cells alike."""
    seeds: int = 3
    """Refits of every winner, each with its own seed."""
    sampler: Sampler = "gp"
    """Who draws trials, all of Optuna: gp (a Gaussian process), tpe (multivariate), random or qmc."""
    pruner: Pruner = "halving"
    """Who stops trials early, within their cell: halving (asynchronous), hyperband, median or none."""
    transfer: bool = True
    """Let a cell begin with the winners of its neighbours, nearest overlap and nearest architectures, and let its
    sampler know what they tried."""
    share_embeddings: bool = False
    """Let trials go on from a finished embedding stage of another one, with classifier settings of their own."""
    deterministic: bool = False
    """Same trials and winners for the same seed, in whatever order trials end; waits for every `generation`."""
    generation: int = 4
    """Trials of a cell that are drawn together, knowing nothing of each other's values (deterministic only)."""
    workers_per_trial: int = 1
    """Workers of one trial."""
    trial_backend: Literal["auto", "torch_trainer"] = "auto"
    """auto: worker processes that are kept from trial to trial; torch_trainer: a new Ray Train group every trial."""
    cpus_per_worker: float = 1.0
    """CPUs of one worker; torch uses as many threads, at least one."""
    gpus_per_worker: float = 0.0
    """GPUs of one worker; a fraction lets several trials share one."""
    storage: str = "runs"
    """Folder of caches, teachers, run folders, stores, summary; or of an object store: s3://BUCKET/FOLDER, gs://..."""
    tracking_uri: str | None = None
    """MLflow tracking URI; none: a SQLite file in the storage folder."""
    study_storage: str | None = None
    """Optuna storage URL; none: a SQLite file in the storage folder."""
    experiment: str = "refilled"
    """MLflow experiment, and the name under which the search is continued."""
    price_per_hour: float | None = None
    """Price of one hour of the whole cluster, for the forecast's cost."""
    forecast: bool = True
    """Time a few steps first, and say how many epochs and hours the search will take."""
    dry_run: bool = False
    """Only print the forecast."""
    resume: bool | None = None
    """Continue a search that has trials already, or refuse to; none: ask on a terminal, continue elsewhere."""

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("methods", "overlaps", "teachers", "students"):
            values = getattr(self, name)
            require(len(values) >= 1, name, "at least one value", values)
            require(len(set(values)) == len(values), name, "different values", values)
        spelled = [composition(method) for method in self.methods]
        require(
            len(set(spelled)) == len(spelled), "methods", f"different, but they are {', '.join(spelled)}", self.methods
        )
        for overlap in self.overlaps:
            require(0 <= overlap <= 1, "overlaps", "in [0, 1]", overlap)
        require(self.trials >= 1, "trials", "at least 1", self.trials)
        require(self.max_hours is None or is_positive(self.max_hours), "max_hours", "above 0 or none", self.max_hours)
        most = self.max_epochs_total
        require(most is None or most >= 1, "max_epochs_total", "at least 1 or none", most)
        require(0 <= self.adaptive_share < 1, "adaptive_share", "in [0, 1)", self.adaptive_share)
        require(self.sampler in SAMPLERS, "sampler", f"one of {', '.join(SAMPLERS)}", self.sampler)
        require(self.pruner in PRUNERS, "pruner", f"one of {', '.join(PRUNERS)}", self.pruner)
        require(self.generation >= 1, "generation", "at least 1", self.generation)
        backends = ("auto", "torch_trainer")
        require(self.trial_backend in backends, "trial_backend", " or ".join(backends), self.trial_backend)
        price = self.price_per_hour
        require(price is None or (math.isfinite(price) and price >= 0), "price_per_hour", "at least 0 or none", price)
        require(
            not (self.deterministic and self.max_hours is not None),
            "max_hours",
            "none with deterministic: how much is done in an hour differs from time to time; use max_epochs_total",
            self.max_hours,
        )
        require(
            not (self.deterministic and self.sampler == "qmc"),
            "sampler",
            "another with deterministic: Optuna's sequence loses points when its driver is killed",
            self.sampler,
        )
        require(self.seeds >= 1, "seeds", "at least 1", self.seeds)
        require(self.workers_per_trial >= 1, "workers_per_trial", "at least 1", self.workers_per_trial)
        require(self.cpus_per_worker > 0, "cpus_per_worker", "above 0", self.cpus_per_worker)
        require(self.gpus_per_worker >= 0, "gpus_per_worker", "at least 0", self.gpus_per_worker)
        require(self.run.val_fraction > 0, "val_fraction", "above 0 in a search", self.run.val_fraction)
        require(bool(self.experiment.strip()), "experiment", "a name", self.experiment)
