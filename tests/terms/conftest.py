from __future__ import annotations

import pytest
from term_bench import Bench, new_bench


@pytest.fixture
def bench() -> Bench:
    return new_bench()
