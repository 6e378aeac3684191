"""Contracts of what can be plugged in, as test classes to inherit: a loss term, a network, a data source.

    from refilled.testing import TermContract

    class TestRegression(TermContract):
        term = "my_terms.py:Regression"

pytest collects the inherited tests; each says in its name what must hold. Nothing of the package imports this room.
"""

from refilled.testing.models import ModelContract
from refilled.testing.sources import SourceContract
from refilled.testing.terms import TermContract

__all__ = ["ModelContract", "SourceContract", "TermContract"]
