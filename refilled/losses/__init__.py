"""The losses of REFILLED: pure functions on tensors, one idea a file."""

from refilled.losses.comparison import comparison_matching
from refilled.losses.distances import NonFiniteEmbeddingError, check_finite
from refilled.losses.local import local_distillation
from refilled.losses.posterior import teacher_posterior
from refilled.losses.prototypes import PrototypeSum, class_prototypes
from refilled.losses.truncated import truncated_comparison_matching
from refilled.losses.weights import instance_weights

__all__ = [
    "NonFiniteEmbeddingError",
    "PrototypeSum",
    "check_finite",
    "class_prototypes",
    "comparison_matching",
    "instance_weights",
    "local_distillation",
    "teacher_posterior",
    "truncated_comparison_matching",
]
