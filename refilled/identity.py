"""What a run is, as opposed to where and how it is done: the keys under which runs are kept.

An identity holds the settings that determine a run's numbers and differ from a frozen table: `BASE`, and for terms that
have their settings to themselves what their `Config.added` says. So a new setting whose entry means "as before" changes
no key, and what was stored stays findable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refilled.config import Config, RunConfig, content_hash
from refilled.config.tables import digest_of
from refilled.config.weights import digest_in
from refilled.data.label_space import LabelSpaces
from refilled.methods import is_of_package, is_users, terms_of
from refilled.stages import place_of, stages_of, term_config
from refilled.user_package import identity_of_package

FORMAT = 2  # part of every identity: raise it when the numbers of a method or the meaning of an entry below change

# Never change an entry: that would give stored runs another meaning or hide them. A new setting gets a new line, with
# the value under which runs were done before there was the setting.
BASE: Mapping[str, Any] = {
    "image_size": None,
    "val_fraction": 0.1,
    "images_per_class": None,
    "split_seed": 0,
    "teacher": "convnet-32",
    "student": "convnet-8",
    "teacher_epochs": 40,
    "global_batch_size": 256,
    "seed": 0,
    "precision": "float32",
    "compile": False,
    "ncm_images_per_class": 50,
    **{
        f"{role}_{name}": None
        for role, names in {
            "teacher": ("weights", "image_size", "mean", "std", "embedding", "features"),
            "student": ("weights", "embedding", "features"),
        }.items()
        for name in names
    },
    "embedding.temperature": 0.5,
    "embedding.student_temperature": None,
    "embedding.max_negatives": None,
    "embedding.margin": None,
    "embedding.tuples": "all",
    "embedding.weight": 10.0,
    "classifier.distill_weight": 1.0,
    "classifier.temperature": 1.0,
    "classifier.student_temperature": None,
    "classifier.posterior": "prototype",
    "classifier.instance_weight": "confidence",
    "classifier.weight": 1.0,
    "views.kind": "shifts",
    "views.padding": 4,
    "views.min_area": 0.25,
    "views.flip": True,
    "views.num_views": None,
    "pretraining.global_batch_size": 128,
    "pretraining.seed": 0,
    "embedding_cache.dtype": "float16",
    **{
        f"{owner}.{name}": value
        for owner in ("optimizer", "pretraining.optimizer")
        for name, value in {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "dropout": 0.0}.items()
    },
    **{
        f"{owner}.schedule.{name}": value
        for owner in ("embedding", "classifier", "pretraining")
        for name, value in {
            "kind": "cosine",
            "learning_rate": 0.1,
            "decay": 0.2,
            "milestones": (0.5, 0.75),
            "final_fraction": 0.01,
            "peak_at": 0.3,
        }.items()
    },
}

_STORED_AS = {"embedding_cache.dtype": "bank.dtype"}  # settings that had other names when keys were first stored

# What determines nothing by itself: where data lies and how its order is named (its digest and the class lists count),
# how often a state is kept, where the teacher's embeddings come from. The method counts as its terms.
_ELSEWHERE = (
    *("data", "class_order", "num_teacher_classes", "num_student_classes", "overlap", "method", "epochs"),
    *("teacher_data", "teacher_classes", "student_classes"),
)
_INDIFFERENT = (
    *("checkpoint_every", "max_image_gib", "embedding_cache.mode", "embedding_cache.max_gib"),
    *("data_digest", "teacher_data_digest"),
)
_OF_TEACHER = (
    *("teacher", "teacher_epochs", "embedding_cache.dtype"),
    *(f"teacher_{name}" for name in ("weights", "image_size", "mean", "std", "embedding", "features")),
)
_NETWORKS = ("teacher", "student")
_WEIGHTS = ("teacher_weights", "student_weights")
_OF_NEAREST_MEAN = ("ncm_images_per_class",)
NOT_BY_ITSELF = _ELSEWHERE + _INDIFFERENT


def run_key(config: RunConfig, spaces: LabelSpaces, data_digest: str) -> str:
    """Content hash of everything that determines a run's numbers, followed by its seed.

    What the run's terms do not read does not count, so the vanilla students of all teachers are one.
    """
    return f"{content_hash(identity(config, spaces, data_digest))}-{config.seed}"


def identity(config: RunConfig, spaces: LabelSpaces, data_digest: str) -> dict[str, Any]:
    """What determines a run's numbers, as plain data.

    Args:
        config: The run's configuration.
        spaces: Its class lists.
        data_digest: Digest of the data's training part.
    """
    stages = stages_of(config)
    found: dict[str, Any] = {
        "format": FORMAT,
        "data": data_digest,
        "student_classes": spaces.student,
        "stages": [
            [stage.name, [_portable(name, config) for name in terms_of(config.method)[stage.name]]] for stage in stages
        ],
        "epochs": [stage.num_epochs for stage in stages],
    }
    if any(stage.needs_teacher for stage in stages):
        found["teacher_classes"] = spaces.teacher
        if spaces.teacher_digest:
            found["teacher_data"] = spaces.teacher_digest
    as_before = dict(BASE)
    for stage in stages:
        for term in stage.terms:
            as_before |= {f"{place_of(term)}.{name}": value for name, value in term.Config.added.items()}
    for name, value in determining(config).items():
        if name not in as_before or value != as_before[name]:
            if name in _NETWORKS:
                value = _portable(value, config)
            if name in _WEIGHTS:
                value = digest_in(value)
            found[_STORED_AS.get(name, name)] = value
    return found


def determining(config: RunConfig) -> dict[str, Any]:
    """The settings that a run reads, those that determine nothing left out, by dotted name."""
    stages = stages_of(config)
    own = config.flat()
    names = {name for name in own if name.partition(".")[0] not in ("embedding", "classifier", "terms", "sources")}
    names -= set(NOT_BY_ITSELF)
    if not any(stage.needs_teacher for stage in stages):
        names -= set(_OF_TEACHER)
    if config.teacher_weights is not None or not any(stage.needs_teacher for stage in stages):
        names -= {name for name in names if name == "teacher_epochs" or name.startswith("pretraining.")}
    if not any(stage.validates_by == "nearest_mean" for stage in stages):
        names -= set(_OF_NEAREST_MEAN)
    found = {name: own[name] for name in names}
    for stage in stages:
        found |= {name: own[name] for name in own if name.startswith(f"{stage.name}.schedule.")}
        if stage.name == "classifier":
            found["classifier.weight"] = own["classifier.weight"]
        for term in stage.terms:
            settings: Config = term_config(term, config)
            found |= {f"{place_of(term)}.{name}": value for name, value in settings.flat().items()}
    return found


def identity_of_brought(config: RunConfig) -> dict[str, Any]:
    """What a teacher that is brought is: its architecture, the content of its weights, and what its embedding is."""
    assert config.teacher_weights is not None
    return {
        "teacher": _portable(config.teacher, config),
        "weights": digest_in(config.teacher_weights),
        "embedding": config.teacher_embedding,
        "features": config.teacher_features,
    }


def _portable(name: str, config: RunConfig) -> str:
    """A name that means the same everywhere: for something of the user's, its file's digest in place of the path."""
    if is_of_package(name):
        return identity_of_package(name, config.sources)
    if not is_users(name):
        return name
    path, _, attribute = name.rpartition(":")
    return f"{digest_of(config.sources.text_of(path) or '')}:{attribute}"
