from __future__ import annotations

import statistics

import optuna
import pytest

from tune.forecast.simulate import Done, Work, pack, simulate_pruning

optuna.logging.set_verbosity(optuna.logging.WARNING)


def plain(epochs: int, epoch_s: float = 1.0, fixed_s: float = 0.0) -> Work:
    return Work(stages=((epochs, epoch_s, epoch_s),), fixed_s=fixed_s)


def whole(*works: Work) -> list[tuple[Work, int]]:
    return [(work, work.num_epochs) for work in works]


def test_work_goes_to_the_slot_that_is_free_first() -> None:
    done = pack(whole(plain(4), plain(1), plain(1), plain(5)), slots=2)
    assert done == Done(wall_s=7.0, busy_s=11.0, epochs=11)  # by division 5.5; 1, 1 and 5 in one slot
    assert pack(whole(plain(4), plain(1), plain(1), plain(5)), slots=9).wall_s == 5.0
    assert pack([], slots=2) == Done()


def test_fixed_seconds_count_for_every_run_and_workers_start_once_a_slot() -> None:
    runs = whole(*[plain(2, fixed_s=0.5)] * 4)
    assert pack(runs, slots=2).wall_s == 5.0
    assert pack(runs, slots=2, fresh_slots=2, worker_start_s=10.0).wall_s == 15.0
    assert pack(runs, slots=2, fresh_slots=1, worker_start_s=10.0).wall_s == 10.0  # the other slot takes them all
    assert pack(runs[:1], slots=2, fresh_slots=2, worker_start_s=10.0).wall_s == 12.5


def test_an_interrupted_run_has_its_first_stage_first() -> None:
    work = Work(stages=((2, 1.0, 10.0), (4, 3.0, 30.0)), fixed_s=0.0)
    assert [work.epochs_s(epochs, looked_up=True) for epochs in (0, 1, 2, 3, 6)] == [0, 1, 2, 5, 14]
    assert work.epochs_s(3, looked_up=False) == 50


def with_bank(shares: str = "a", *, bank_s: float | None = 5.0, waits: bool = False) -> Work:
    stages = ((2, 1.0, 10.0),)
    return Work(stages=stages, fixed_s=0.0, shares=shares, prototypes_s=1.0, bank_s=bank_s, waits=waits)


def test_one_run_builds_the_bank_and_those_beside_it_go_live_or_wait() -> None:
    first = 1 + 5 + 2  # prototypes, bank, two epochs looked up
    assert pack(whole(with_bank()), slots=1).busy_s == first
    assert pack(whole(with_bank(), with_bank()), slots=1).busy_s == first + 2
    assert pack(whole(with_bank(), with_bank()), slots=2).busy_s == first + 1 + 20  # its own prototypes, then live
    waiting = whole(with_bank(waits=True), with_bank(waits=True))
    assert pack(waiting, slots=2).busy_s == 2 * first
    assert pack(whole(with_bank(), with_bank("another")), slots=1).busy_s == 2 * first
    live = whole(with_bank(bank_s=None), with_bank(bank_s=None))
    assert pack(live, slots=1).busy_s == 1 + 20 + 20


def test_nothing_goes_on_after_the_limits() -> None:
    runs = whole(*[plain(4)] * 3)
    assert pack(runs, slots=1, limit_s=6.0) == Done(wall_s=6.0, busy_s=6.0, epochs=6.0)
    assert pack(runs, slots=1, limit_s=100.0).epochs == 12
    assert pack(runs, slots=1, max_epochs=9) == Done(wall_s=9.0, busy_s=9.0, epochs=9)
    assert pack(runs, slots=1, max_epochs=0) == Done()


def test_without_a_pruner_every_trial_is_whole() -> None:
    assert simulate_pruning("none", 30, 4) == [[30, 30, 30, 30]]


def test_halving_spares_the_first_trials_and_stops_the_others_at_its_rungs() -> None:
    studies = simulate_pruning("halving", 30, 40)
    assert all(lengths[:3] == [30, 30, 30] for lengths in studies)  # nobody is judged before the fourth
    lengths = [length for study in studies for length in study[20:]]
    assert set(lengths) == {22, 25, 30}
    # Of many trials three quarters go past every rung.
    assert statistics.mean(lengths) == pytest.approx(22 / 4 + 25 * 3 / 16 + 30 * 9 / 16, rel=0.03)


def test_simulated_studies_differ_and_come_again_alike() -> None:
    studies = simulate_pruning("halving", 30, 8)
    assert len({tuple(study) for study in studies}) > 5
    assert simulate_pruning("halving", 30, 8) == studies


@pytest.mark.parametrize("kind", ["hyperband", "median"])
def test_other_pruners_are_asked_too(kind: str) -> None:
    share = statistics.mean(sum(study) for study in simulate_pruning(kind, 30, 16)) / (16 * 30)  # type: ignore[arg-type]
    assert 0.7 < share < 0.98
