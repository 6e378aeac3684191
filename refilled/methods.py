"""Which loss terms make up which method: a table.

A method is written as the names of its terms, `+` between the terms of a stage and `>` between stages. The last stage
is `classifier`, which trains the whole student; a stage before it is `embedding`, which trains all but the head. A term
that is not the package's own is `path/file.py:Name`.

This table knows names alone; `refilled.terms` has the terms, and `refilled.stages` puts both together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

from refilled.errors import UserError

StageName = Literal["embedding", "classifier"]

METHODS: Mapping[str, str] = {
    "student": "cross_entropy",  # Eq. 1
    "kd": "cross_entropy+kd",  # Eq. 2
    "refilled_emb": "comparison>cross_entropy",  # Eq. 5, then 1
    "refilled_lkd": "cross_entropy+lkd",  # Eq. 8 from scratch
    "refilled_minus": "comparison>cross_entropy+lkd",  # Eq. 5, then 8
    "refilled": "comparison>cross_entropy+weighted_lkd",  # Eq. 5, then 10
    "rkd": "rkd>cross_entropy",  # as the paper runs it, section 5.1.2
    "aml": "aml>cross_entropy",  # likewise
    "fitnet": "cross_entropy+fitnet",
    "at": "cross_entropy+at",
    "vid": "cross_entropy+vid",
    "crd": "cross_entropy+crd",
}

VANILLA = "student"
"""The method that has no teacher, beside which the others are judged."""

_USER_TERM = r"[^+>:\s][^+>:]*\.py:[A-Za-z_][A-Za-z0-9_]*"
_TERM = re.compile(rf"[a-z][a-z0-9_]*|{_USER_TERM}")
_USER = re.compile(_USER_TERM)


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
    is_composed = ">" in text or "+" in text or method in METHODS
    whole = is_composed and len(stages) <= 2 and all(_TERM.fullmatch(term) for stage in stages for term in stage)
    if not whole or any(len(set(stage)) < len(stage) for stage in stages):
        raise UserError(
            f"method must be one of {', '.join(METHODS)}, or terms by stage such as "
            f"'rkd>cross_entropy+lkd' or 'path/file.py:Name', got {_shown(method)}."
        )
    names: tuple[StageName, ...] = ("embedding", "classifier")
    return dict(zip(names[-len(stages) :], stages, strict=True))


def composition(method: str) -> str:
    """The method as terms by stage, whatever name it has: `comparison>cross_entropy+lkd`."""
    return ">".join("+".join(terms) for terms in terms_of(method).values())


def has_embedding_stage(method: str) -> bool:
    """Whether a method trains the embedding before the classifier."""
    return "embedding" in terms_of(method)


def user_terms(method: str) -> tuple[str, ...]:
    """Those of a method's terms that are `path/file.py:Name`."""
    return tuple(term for terms in terms_of(method).values() for term in terms if is_users(term))


def is_users(name: str) -> bool:
    """Whether a name has the form `path/file.py:Name`, of something in a file of the user's own."""
    return _USER.fullmatch(name) is not None


def _shown(method: str) -> str:
    return repr(method) if len(method) <= 80 else f"{method[:80]!r}..."
