"""What a run and a search are, as checked, documented plain data."""

from refilled.config.bank import BankConfig
from refilled.config.base import Config, content_hash
from refilled.config.parts import (
    ClassifierConfig,
    EmbeddingConfig,
    OptimizerConfig,
    ScheduleConfig,
    TeacherConfig,
    ViewConfig,
)
from refilled.config.run import (
    METHODS,
    METHODS_WITH_EMBEDDING_STAGE,
    METHODS_WITHOUT_TEACHER,
    PRECISIONS,
    Method,
    Precision,
    RunConfig,
)
from refilled.config.search import SearchConfig

__all__ = [
    "METHODS",
    "METHODS_WITHOUT_TEACHER",
    "METHODS_WITH_EMBEDDING_STAGE",
    "PRECISIONS",
    "BankConfig",
    "ClassifierConfig",
    "Config",
    "EmbeddingConfig",
    "Method",
    "OptimizerConfig",
    "Precision",
    "RunConfig",
    "ScheduleConfig",
    "SearchConfig",
    "TeacherConfig",
    "ViewConfig",
    "content_hash",
]
