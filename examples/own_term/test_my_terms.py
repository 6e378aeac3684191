"""`pytest examples/own_term`: whether the term keeps what the platform promises of every loss."""

from refilled.testing import TermContract


class TestRegression(TermContract):
    """Its checks are inherited."""

    term = "my_terms.py:Regression"
