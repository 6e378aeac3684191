from dataclasses import dataclass

import optuna
import pytest

from refilled.networks import NetworkSize
from tune.studies.warm_start import source_cells, warm_start_report

SIZES = {  # parameters and multiply-adds
    "wrn-40-2": (2_255_156, 327_600_000),
    "wrn-16-2": (703_284, 101_100_000),
    "wrn-40-1": (569_780, 83_300_000),
    "wrn-16-1": (180_916, 26_700_000),
    "mobilenet-0.5": (869_892, 12_200_000),
    "mobilenet-0.25": (238_772, 3_400_000),
}


@dataclass(frozen=True)
class Place:
    overlap: float
    teacher: str = "wrn-40-2"
    student: str = "wrn-16-1"
    method: str = "refilled"
    images_per_class: int | None = None

    @property
    def name(self):
        return f"{self.overlap} {self.teacher} {self.student} {self.images_per_class} {self.method}"

    @property
    def teacher_size(self):
        return NetworkSize(*SIZES[self.teacher], 1) if self.teacher in SIZES else None

    @property
    def student_size(self):
        return NetworkSize(*SIZES[self.student], 1)


def test_the_nearest_overlap_and_the_nearest_architectures_give():
    earlier = [
        Place(0.0),
        Place(0.2),
        Place(0.4, student="wrn-40-2"),
        Place(0.4, student="mobilenet-0.25"),
        Place(0.4, student="wrn-16-2"),
        Place(0.4, method="student"),
        Place(0.2, student="wrn-16-2"),
    ]
    assert source_cells(Place(0.4), earlier) == (Place(0.2).name, Place(0.4, student="mobilenet-0.25").name)
    assert source_cells(Place(0.4), earlier[:1]) == (Place(0.0).name,)
    assert source_cells(Place(0.0), []) == ()
    assert source_cells(Place(0.6, method="student"), earlier) == (Place(0.4, method="student").name,)


def test_teachers_count_as_much_as_students():
    far, near = Place(1.0, teacher="wrn-16-1"), Place(1.0, teacher="wrn-16-2")
    assert source_cells(Place(1.0), [far, near]) == (near.name,)


def test_names_with_a_dot_have_a_distance_too():
    near, far = Place(1.0, student="mobilenet-0.5"), Place(1.0, student="wrn-40-2")
    assert source_cells(Place(1.0, student="mobilenet-0.25"), [far, near]) == (near.name,)


def test_without_a_teacher_students_alone_count():
    far, near = Place(1.0, teacher="none", student="wrn-40-2"), Place(1.0, teacher="none", student="wrn-16-2")
    assert source_cells(Place(1.0, teacher="none"), [far, near]) == (near.name,)


def test_the_nearest_number_of_images_gives_too():
    ten, fifty, everything = (Place(0.4, images_per_class=number) for number in (10, 50, None))
    elsewhere = Place(0.2, images_per_class=25)
    asked = Place(0.4, images_per_class=25)
    assert source_cells(asked, [everything, ten, fifty]) == (fifty.name,)
    assert source_cells(asked, [everything, elsewhere]) == (elsewhere.name, everything.name)
    assert source_cells(everything, [ten, fifty]) == (fifty.name,)


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
