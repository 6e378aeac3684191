"""The tables of terms and methods, and how a composition is written."""

from __future__ import annotations

import pytest

from refilled.errors import UserError
from refilled.methods import (
    METHODS,
    TERMS,
    composition,
    has_embedding_stage,
    is_users,
    name_of,
    terms_of,
    user_terms,
)


def test_every_row_is_made_of_known_terms_and_is_its_own_composition() -> None:
    for method, row in METHODS.items():
        assert composition(method) == composition(row) == row
        assert all(term in TERMS for terms in terms_of(method).values() for term in terms)
    assert len(set(METHODS.values())) == len(METHODS)


def test_stages_of_the_papers_rows() -> None:
    two = {method for method in METHODS if has_embedding_stage(method)}
    assert two == {"refilled_emb", "refilled_minus", "refilled", "rkd", "aml"}
    assert terms_of("refilled") == {"embedding": ("comparison",), "classifier": ("cross_entropy", "weighted_lkd")}
    assert terms_of("fitnet") == {"classifier": ("cross_entropy", "fitnet")}


def test_composition_by_name() -> None:
    assert terms_of("rkd>cross_entropy+lkd") == {"embedding": ("rkd",), "classifier": ("cross_entropy", "lkd")}
    assert terms_of("cross_entropy+rkd+vid") == {"classifier": ("cross_entropy", "rkd", "vid")}


def test_a_row_that_is_spelled_out_has_its_name() -> None:
    assert name_of("cross_entropy") == "student"
    assert name_of("comparison>cross_entropy+weighted_lkd") == "refilled"
    assert name_of("cross_entropy+rkd") == "cross_entropy+rkd"


def test_a_term_of_the_users_stands_beside_cross_entropy() -> None:
    assert terms_of("some dir/file.py:Name") == {"classifier": ("cross_entropy", "some dir/file.py:Name")}
    assert terms_of("/a/f.py:N>cross_entropy") == {"embedding": ("/a/f.py:N",), "classifier": ("cross_entropy",)}
    assert user_terms("f.py:A+rkd>cross_entropy+g.py:B") == ("f.py:A", "g.py:B")
    assert is_users("a/b.py:C")
    assert not is_users("wrn-16-1")


@pytest.mark.parametrize(
    "method",
    [
        *("", "distil", "rkd>", ">rkd", "rkd>aml>cross_entropy", "cross_entropy+", "cross_entropy+cross_entropy"),
        *(
            "a.py:",
            "cross_entropy + kd",
            "file.txt:Name",
            "f.py:1a",
            "REFILLED",
            "cross_entropy+unheard_of",
            "x" * 5000,
        ),
    ],
)
def test_what_is_no_method_is_one_short_sentence(method: str) -> None:
    with pytest.raises(UserError, match="method must be one of student, kd") as caught:
        terms_of(method)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
