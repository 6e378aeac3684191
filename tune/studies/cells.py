"""What a search is made of: cells of its grid, and in each cell its methods."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from refilled.config import RunConfig, content_hash
from refilled.data.label_space import LabelSpaces
from refilled.identity import run_key
from refilled.networks import NetworkSize
from tune.studies.space import as_data


class Place(NamedTuple):
    """One cell of the grid, in which methods are compared; its data is the search's."""

    overlap: float
    teacher: str
    student: str
    images_per_class: int | None = None

    @property
    def name(self) -> str:
        """For people: `0.4 wrn-40-2>wrn-16-1`, with `25 a class` behind it where the student has so few images."""
        few = "" if self.images_per_class is None else f" {self.images_per_class} a class"
        return f"{self.overlap:g} {self.teacher}>{self.student}{few}"


@dataclass(frozen=True)
class Cell:
    """One method in one cell of the grid: what has a study and a winner of its own.

    A method that asks no teacher, such as the vanilla student, has one study for all teachers of the same overlap and
    student; its `teacher` is "none".
    """

    overlap: float
    teacher: str
    student: str
    run: RunConfig
    spaces: LabelSpaces
    data_digest: str
    num_validation_images: int
    teacher_size: NetworkSize | None = None
    student_size: NetworkSize | None = None

    @property
    def images_per_class(self) -> int | None:
        """The student's training images of each class; none: all."""
        return self.run.images_per_class

    @property
    def place(self) -> Place:
        """Where it stands on the grid; of a method that asks no teacher, that of all teachers."""
        return Place(self.overlap, self.teacher, self.student, self.images_per_class)

    @property
    def method(self) -> str:
        """As it was asked for."""
        return self.run.method

    @property
    def name(self) -> str:
        """For people: `0.4 wrn-40-2>wrn-16-1 refilled`."""
        return f"{self.place.name} {self.method}"

    @property
    def group(self) -> str:
        """Names what the cell is compared with: all that has the same overlap, student and images."""
        few = "" if self.images_per_class is None else f" {self.images_per_class} a class"
        return f"{self.overlap:g} {self.student}{few}"

    @property
    def tags(self) -> dict[str, str]:
        """What MLflow's runs of this cell carry."""
        return {
            "cell": self.name,
            "overlap": f"{self.overlap:g}",
            "teacher": self.teacher,
            "student": self.student,
            "method": self.method,
            "data_digest": self.data_digest,
            **({} if self.images_per_class is None else {"images_per_class": str(self.images_per_class)}),
        }

    @cached_property
    def identity(self) -> str:
        """Hash of what defines the cell's studies: the run, its classes and data, and what is searched."""
        return content_hash([run_key(self.run, self.spaces, self.data_digest), as_data(self.run)])
