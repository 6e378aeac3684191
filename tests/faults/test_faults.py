"""A few faults of every carrier; `make faults` injects many of every kind."""

from __future__ import annotations

import mmap
import os
import random
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from end_state import differences
from inject import SCENARIOS, SEARCH, Scenario, Tally, inject

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("scenario", "faults"),
    [
        (Scenario("search", f"{SEARCH} --trials 2 --epochs 6 10", ("trial", "driver"), (0.5, 2.0)), 2),
        (
            Scenario(
                "train",
                "tune/train.py --epochs 30 40 --teacher-epochs 10 --cpus-per-worker 0.5 --workers 2",
                ("train worker", "controller"),
                (0.5, 2.0),
            ),
            2,
        ),
    ],
    ids=["search", "train.py"],
)
def test_a_command_that_is_broken_ends_like_one_that_was_not(scenario: Scenario, faults: int, tmp_path: Path) -> None:
    """Invariant 3."""
    tally = Tally(Counter(), Counter())
    assert inject(scenario, faults, random.Random(0), tmp_path, tally)
    assert tally.injected == tally.recovered == Counter(dict.fromkeys(scenario.faults, 1))


def test_every_scenario_names_faults_that_exist() -> None:
    from processes import TITLES

    known = {*TITLES, "driver", "process group", "SIGTERM", "node"}
    assert all(set(scenario.faults) <= known for scenario in SCENARIOS)


def test_end_states_that_differ_are_told_apart() -> None:
    state = {"trials": {"cell": [{"number": 0, "value": 0.5}]}, "mlflow": {"key": [{"status": "FINISHED"}]}}
    doubled = state | {"mlflow": {"key": [{"status": "FINISHED"}] * 2}}
    running = state | {"mlflow": {"key": [{"status": "RUNNING"}]}}
    lost = state | {"trials": {"cell": []}}
    assert differences(state, state) == []
    assert [len(differences(state, other)) for other in (doubled, running, lost)] == [1, 1, 1]


def test_shared_memory_that_another_program_uses_is_not_left_over() -> None:
    from processes import SHARED_MEMORY, abandoned_since

    before = set(os.listdir(SHARED_MEMORY))
    with tempfile.NamedTemporaryFile(dir=SHARED_MEMORY, prefix="refilled-test-") as file:
        file.write(b"1")
        file.flush()
        own = Path(file.name).name
        assert own in abandoned_since(before)
        with mmap.mmap(file.fileno(), 1):
            assert own not in abandoned_since(before)
        assert own not in abandoned_since({*before, own})
