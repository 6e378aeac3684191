"""What a run and a search are, as checked, documented plain data."""

from refilled.config.base import Config, content_hash
from refilled.config.embedding_cache import EmbeddingCacheConfig
from refilled.config.parts import (
    ClassifierConfig,
    ComparisonConfig,
    EmbeddingConfig,
    KdConfig,
    LkdConfig,
    OptimizerConfig,
    ScheduleConfig,
    TeacherConfig,
    TermConfig,
    ViewConfig,
    WeightedLkdConfig,
)
from refilled.config.run import Precision, RunConfig
from refilled.config.search import ExportFormat, SearchConfig
from refilled.config.searched import Choice, Float, Searched
from refilled.config.tables import Sources, TermSettings

__all__ = [
    "Choice",
    "ClassifierConfig",
    "ComparisonConfig",
    "Config",
    "EmbeddingCacheConfig",
    "EmbeddingConfig",
    "ExportFormat",
    "Float",
    "KdConfig",
    "LkdConfig",
    "OptimizerConfig",
    "Precision",
    "RunConfig",
    "ScheduleConfig",
    "SearchConfig",
    "Searched",
    "Sources",
    "TeacherConfig",
    "TermConfig",
    "TermSettings",
    "ViewConfig",
    "WeightedLkdConfig",
    "content_hash",
]
