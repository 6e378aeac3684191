"""One search: a grid of cells, a budget, and where things run and are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from refilled.config.base import Config, require
from refilled.config.fields import NonNegativeFloat, PositiveFloat, PositiveInt, Range, Share, ShareBelowOne
from refilled.config.run import RunConfig
from refilled.methods import composition

Sampler = Literal["tpe", "gp", "random", "qmc"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)
Pruner = Literal["none", "halving"]
ExportFormat = Literal["torch", "onnx"]
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
    overlaps: tuple[Share, ...] = (0.0, 0.4, 1.0)
    """Overlap ratios of the grid (section 5.1.1)."""
    teachers: tuple[str, ...] = ("convnet-32",)
    """Teacher architectures of the grid."""
    students: tuple[str, ...] = ("convnet-8",)
    """Student architectures of the grid."""
    images_per_class: tuple[Annotated[int, Range(2)] | Literal["all"], ...] = ("all",)
    """Training images a class that students have, an axis of the grid like overlaps (Figure 6b): numbers, or all.
    Smaller numbers take parts of the larger ones' images; those held out for validation are among them."""
    trials: PositiveInt = 16
    """Trials of every method in every cell; on average, see `adaptive_share`."""
    max_hours: PositiveFloat | None = None
    """Hours after the start in which trials may run; none starts that would end later, at the pace of those before."""
    max_epochs_total: PositiveInt | None = None
    """Epochs that all trials of the search may train together; none: no limit."""
    adaptive_share: ShareBelowOne = 0.25
    """Share of the trials that goes where the winner is still uncertain, instead of to all cells alike."""
    seeds: PositiveInt = 3
    """Refits of every winner, each with its own seed."""
    sampler: Sampler = "gp"
    """Who draws trials, all of Optuna: gp (a Gaussian process), tpe (multivariate), random or qmc."""
    pruner: Pruner = "none"
    """Who stops trials early, within their cell: none, or halving (asynchronous), which made simulated searches slower
    but may pay in runs whose order is settled early."""
    transfer: bool = True
    """Warm start: let a cell begin with the winners of its source cells, the nearest overlap and the nearest
    architectures, and show its sampler what these tried."""
    deterministic: bool = False
    """Same trials and winners for the same seed, in whatever order trials end; waits for every `trial_batch`."""
    trial_batch: PositiveInt = 4
    """Trials of a cell that are drawn together, without each other's values (deterministic only)."""
    workers_per_trial: PositiveInt = 1
    """Workers of one trial."""
    trial_backend: Literal["auto", "torch_trainer"] = "auto"
    """auto: worker processes that are kept from trial to trial; torch_trainer: a new Ray Train group every trial."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs of one worker; torch uses as many threads, at least one."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """GPUs of one worker; a fraction lets several trials share one."""
    storage: str = "runs"
    """Folder of caches, teachers, run folders, stores, summary; or of an object store: s3://BUCKET/FOLDER, gs://..."""
    tracking_uri: str | None = None
    """MLflow tracking URI; none: a SQLite file in the storage folder."""
    study_storage: str | None = None
    """Optuna storage URL; none: a SQLite file in the storage folder."""
    experiment: str = "refilled"
    """MLflow experiment, and the name under which the search is continued."""
    export: tuple[ExportFormat, ...] = ()
    """Also write the winners' students as programs of torch.export (torch) or ONNX (onnx), check and measure them."""
    register: bool = False
    """Register the best method's student of every cell in MLflow, with the alias champion; best by validation."""
    price_per_hour: NonNegativeFloat | None = None
    """Price of one hour of the whole cluster, for the forecast's cost."""
    forecast: bool = True
    """Time a few steps first, and say how many epochs and hours the search will take."""
    dry_run: bool = False
    """Only print the forecast."""
    resume: bool | None = None
    """Continue a search that has trials already, or refuse to; none: ask on a terminal, continue elsewhere."""

    def __post_init__(self) -> None:
        """Check also the grid, and fields that depend on each other."""
        super().__post_init__()
        for name in ("methods", "overlaps", "teachers", "students", "images_per_class"):
            values = getattr(self, name)
            self.require(len(values) >= 1, name, "at least one value")
            self.require(len(set(values)) == len(values), name, "different values")
        self.require(len(set(self.export)) == len(self.export), "export", "different values")
        spelled = [composition(method) for method in self.methods]
        self.require(len(set(spelled)) == len(spelled), "methods", f"different, but they are {', '.join(spelled)}")
        self.require(
            not (self.deterministic and self.max_hours is not None),
            "max_hours",
            "none with deterministic: how much is done in an hour differs from time to time; use max_epochs_total",
        )
        self.require(
            not (self.deterministic and self.sampler == "qmc"),
            "sampler",
            "another with deterministic: Optuna's sequence loses points when its driver is killed",
        )
        require(self.run.val_fraction > 0, "val_fraction", "above 0 in a search", self.run.val_fraction)
        self.require(bool(self.experiment.strip()), "experiment", "a name")
