"""Losses as pure functions on tensors, one idea a file."""

from refilled.losses.asymmetric import asymmetric_matching
from refilled.losses.comparison import comparison_matching
from refilled.losses.contrastive import contrastive_logits, contrastive_nce, sample_negatives
from refilled.losses.distances import NonFiniteEmbeddingError, check_finite
from refilled.losses.feature_maps import attention_loss, hint_loss, match_size, pair_maps, variational_loss
from refilled.losses.local import local_distillation
from refilled.losses.posterior import teacher_posterior
from refilled.losses.prototypes import PrototypeSum, class_prototypes
from refilled.losses.relational import relational_distillation
from refilled.losses.truncated import truncated_comparison_matching
from refilled.losses.weights import instance_weights

__all__ = [
    "NonFiniteEmbeddingError",
    "PrototypeSum",
    "asymmetric_matching",
    "attention_loss",
    "check_finite",
    "class_prototypes",
    "comparison_matching",
    "contrastive_logits",
    "contrastive_nce",
    "hint_loss",
    "instance_weights",
    "local_distillation",
    "match_size",
    "pair_maps",
    "relational_distillation",
    "sample_negatives",
    "teacher_posterior",
    "truncated_comparison_matching",
    "variational_loss",
]
