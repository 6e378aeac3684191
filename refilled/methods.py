"""Which loss terms there are, and which of them make up which method: two tables.

A method is written as the names of its terms, `+` between the terms of a stage and `>` between stages. The last stage
is `classifier`, which trains the whole student; a stage before it is `embedding`, which trains all but the head. A term
that is not the package's own is `path/file.py:Name`.

The tables know names alone; `refilled.terms` has the terms, and `refilled.stages` puts both together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

from refilled.errors import UserError

StageName = Literal["embedding", "classifier"]

TERMS: Mapping[str, str] = {
    "cross_entropy": "cross_entropy:CrossEntropy",
    "kd": "kd:Kd",
    "comparison": "comparison:Comparison",
    "lkd": "lkd:Lkd",
    "weighted_lkd": "lkd:WeightedLkd",
    "rkd": "rkd:Rkd",
    "aml": "aml:Aml",
    "fitnet": "fitnet:Fitnet",
    "vid": "vid:Vid",
    "crd": "crd:Crd",
    "at": "at:At",
}
"""Terms by name: where each is, in `refilled.terms`. One that stands beside cross-entropy needs no line below."""

_NAMED: Mapping[str, str] = {
    "student": "cross_entropy",  # Eq. 1
    "kd": "cross_entropy+kd",  # Eq. 2
    "refilled_emb": "comparison>cross_entropy",  # Eq. 5, then 1
    "refilled_lkd": "cross_entropy+lkd",  # Eq. 8 from scratch
    "refilled_minus": "comparison>cross_entropy+lkd",  # Eq. 5, then 8
    "refilled": "comparison>cross_entropy+weighted_lkd",  # Eq. 5, then 10
    "rkd": "rkd>cross_entropy",  # in two stages, as the paper runs it
    "aml": "aml>cross_entropy",  # likewise
}
_BESIDE = {
    term: f"cross_entropy+{term}" for term in TERMS if not any(term in re.split("[+>]", row) for row in _NAMED.values())
}
METHODS: Mapping[str, str] = {**_NAMED, **_BESIDE}
"""Terms by stage, by the method's name."""

VANILLA = "student"
"""The method that has no teacher, beside which the others are judged."""
SHORT_VANILLA = f"{VANILLA}, classifier epochs only"
"""What tables call its refits with the classifier stage's epochs alone, which a two-stage method also has."""
NO_TEACHER = "none"
"""The teacher, where one is named, of runs that ask none and so are shared by all teachers of their search."""

_USER = re.compile(r"[^+>:\s][^+>:]*\.py:[A-Za-z_][A-Za-z0-9_]*")
_PACKAGE = re.compile(
    r"(?!(?:torchvision|timm):)[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*"
)


@lru_cache(maxsize=256)
def terms_of(method: str) -> Mapping[StageName, tuple[str, ...]]:
    """The names of a method's terms by stage, stages in the order in which they are trained.

    Args:
        method: A name of the table, a composition, or one term of the user's, which stands beside cross-entropy.

    Raises:
        UserError: It is none of these.
    """
    text = METHODS.get(method, method)
    if _USER.fullmatch(text):
        text = f"cross_entropy+{text}"
    stages = [tuple(stage.split("+")) for stage in text.split(">")]
    is_composed = ">" in text or "+" in text or text in METHODS.values()
    whole = (
        is_composed and len(stages) <= 2 and all(term in TERMS or is_users(term) for stage in stages for term in stage)
    )
    if not whole or any(len(set(stage)) < len(stage) for stage in stages):
        raise UserError(
            f"method must be one of {', '.join(METHODS)}, or terms by stage such as 'rkd>cross_entropy+lkd', of "
            f"{', '.join(TERMS)} and path/file.py:Name, got {_shown(method)}."
        )
    names: tuple[StageName, ...] = ("embedding", "classifier")
    return dict(zip(names[-len(stages) :], stages, strict=True))


def composition(method: str) -> str:
    """The method as terms by stage, whatever name it has: `comparison>cross_entropy+lkd`."""
    return ">".join("+".join(terms) for terms in terms_of(method).values())


def name_of(method: str) -> str:
    """The table's name of a method that is written as its terms; others stay as they are."""
    rows = {row: name for name, row in METHODS.items()}
    return rows.get(composition(method), method)


def has_embedding_stage(method: str) -> bool:
    """Whether a method trains the embedding before the classifier."""
    return "embedding" in terms_of(method)


def user_terms(method: str) -> tuple[str, ...]:
    """Those of a method's terms that are `path/file.py:Name`."""
    return tuple(term for terms in terms_of(method).values() for term in terms if is_users(term))


def is_users(name: str) -> bool:
    """Whether a name has the form `path/file.py:Name`, of something in a file of the user's own."""
    return _USER.fullmatch(name) is not None


def is_of_package(name: str) -> bool:
    """Whether a name has the form `package.module:name`, of something that Python can import."""
    return not is_users(name) and _PACKAGE.fullmatch(name) is not None


def _shown(method: str) -> str:
    return repr(method) if len(method) <= 80 else f"{method[:80]!r}..."
