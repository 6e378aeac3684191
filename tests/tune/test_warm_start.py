from dataclasses import dataclass

import optuna
import pytest

from tune.studies.warm_start import source_cells, warm_start_report


@dataclass(frozen=True)
class Place:
    overlap: float
    teacher: str = "wrn-40-2"
    student: str = "wrn-16-1"
    method: str = "refilled"

    @property
    def name(self):
        return f"{self.overlap} {self.teacher} {self.student} {self.method}"


def test_the_nearest_overlap_and_the_nearest_architectures_give():
    earlier = [
        Place(0.0),
        Place(0.2),
        Place(0.4, student="wrn-40-2"),
        Place(0.4, student="wrn-16-2"),
        Place(0.4, student="convnet-16"),
        Place(0.4, method="student"),
        Place(0.2, student="wrn-16-2"),
    ]
    assert source_cells(Place(0.4), earlier) == (Place(0.2).name, Place(0.4, student="wrn-16-2").name)
    assert source_cells(Place(0.4), earlier[:1]) == (Place(0.0).name,)
    assert source_cells(Place(0.0), []) == ()
    assert source_cells(Place(0.6, method="student"), earlier) == (Place(0.4, method="student").name,)


def test_teachers_count_as_much_as_students():
    far, near = Place(1.0, teacher="wrn-16-1"), Place(1.0, teacher="wrn-40-1")
    assert source_cells(Place(1.0), [far, near]) == (near.name,)


def test_the_digits_of_a_users_path_say_nothing_of_the_size_of_a_network():
    zero, one, two = (f"try-{number}/own.py:Net" for number in range(3))
    far, near = Place(1.0, teacher=zero, student="wrn-40-2"), Place(1.0, teacher=zero)
    assert source_cells(Place(1.0, teacher=one), [far, near]) == (near.name,)
    assert source_cells(Place(1.0, student=two), [Place(1.0, student=one), Place(1.0, student=zero)]) == (
        Place(1.0, student=one).name,  # equally far, so the first
    )


def study_with(*trials):
    study = optuna.create_study(direction="maximize")
    for origin, value in trials:
        trial = study.ask()
        trial.set_user_attr("origin", origin)
        if origin == "transfer":
            trial.set_user_attr("from", "neighbour")
        if value is None:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, value)
    return study


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        (
            [("default", 0.5), ("transfer", 0.6), ("sampled", 0.7)],
            (("neighbour",), 0.5, 0.6, False, pytest.approx(0.1)),
        ),
        ([("default", 0.5), ("transfer", 0.8), ("sampled", 0.7)], (("neighbour",), 0.5, 0.8, True, pytest.approx(0.3))),
        ([("default", 0.5), ("transfer", None)], (("neighbour",), 0.5, None, False, None)),
        ([("default", None), ("transfer", 0.3)], (("neighbour",), None, 0.3, True, None)),
        ([("default", 0.5), ("sampled", 0.7)], ((), 0.5, None, False, None)),
    ],
)
def test_what_was_brought_is_read_from_the_trials(trials, expected):
    study = study_with(*trials)
    found = warm_start_report(study.trials, study.best_trial)
    assert (found.sources, found.default_value, found.value, found.won, found.gain) == expected
