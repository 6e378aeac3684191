"""What a search found, as objects: one result a cell and method, as in `summary.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from refilled.config import RunConfig
from refilled.errors import UserError
from refilled.storage.files import folder_name

if TYPE_CHECKING:
    import pandas as pd

    from refilled.student import Student

_SHOWN = (
    *("overlap", "teacher", "student", "images_per_class", "method", "val_accuracy"),
    *("test_accuracy_mean", "test_accuracy_ci95", "difference_mean", "difference_ci95"),
)


@dataclass(frozen=True)
class Result:
    """One method in one cell of a search.

    Attributes:
        overlap: Share of the student's classes that are the teacher's too.
        teacher: Architecture of the teacher.
        student: Of the student.
        images_per_class: The student's training images of each class; none: all.
        method: The method.
        run: The winner's configuration.
        val_accuracy: The winner's, in [0, 1].
        test_accuracy: By seed of its refits, in [0, 1].
        mean: Of these.
        ci95: Half width of the 95 % interval; none with one seed.
        difference: Mean difference to the vanilla student, paired by seed; none where there is none.
        difference_ci95: Half width of its interval.
        folder: Run folder of the refit with the first seed, whose student `load` gives.
        row: All that `summary.json` says.
    """

    overlap: float
    teacher: str
    student: str
    images_per_class: int | None
    method: str
    run: RunConfig
    val_accuracy: float
    test_accuracy: tuple[float, ...]
    mean: float
    ci95: float | None
    difference: float | None
    difference_ci95: float | None
    folder: Path
    row: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of_row(cls, row: Mapping[str, Any], storage: Path) -> Result:
        """From an object of `summary.json` in a storage folder."""
        return cls(
            overlap=row["overlap"],
            teacher=row["teacher"],
            student=row["student"],
            images_per_class=row["images_per_class"],
            method=row["method"],
            run=RunConfig.from_dict(row["config"]),
            val_accuracy=row["val_accuracy"],
            test_accuracy=tuple(row["test_accuracy"]),
            mean=row["test_accuracy_mean"],
            ci95=row["test_accuracy_ci95"],
            difference=row["difference_mean"],
            difference_ci95=row["difference_ci95"],
            folder=storage / "runs" / folder_name(row["run_keys"][0]),
            row=row,
        )

    def load(self, **options: Any) -> Student:
        """The trained student; options as in `refilled.load`."""
        from refilled.loading import load

        return load(self.folder, **options)


class SearchResults(Sequence[Result]):
    """The results of a search in the order of its table."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], storage: Path) -> None:
        self._results = [Result.of_row(row, storage) for row in rows]

    @overload
    def __getitem__(self, index: int) -> Result: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Result]: ...
    def __getitem__(self, index: int | slice) -> Result | Sequence[Result]:
        return self._results[index]

    def __len__(self) -> int:
        """Number of methods over all cells."""
        return len(self._results)

    def __iter__(self) -> Iterator[Result]:
        return iter(self._results)

    def of(self, **where: Any) -> list[Result]:
        """Those with these attributes, such as `of(overlap=0.4, method="refilled")`."""
        return [each for each in self if all(getattr(each, name) == value for name, value in where.items())]

    def best(self, **where: Any) -> Result:
        """The one with the best validation accuracy among `of(**where)`; test accuracies choose nothing.

        Raises:
            UserError: There is none.
        """
        found = self.of(**where)
        if not found:
            raise UserError(f"The search has no result with {where}.")
        return max(found, key=lambda each: each.val_accuracy)

    def to_frame(self) -> pd.DataFrame:
        """One row a result: cell, method, accuracies and intervals as in `summary.json`, and the folder."""
        import pandas as pd

        rows = [{name: each.row[name] for name in _SHOWN} | {"folder": str(each.folder)} for each in self]
        return pd.DataFrame(rows, columns=[*_SHOWN, "folder"])

    def __repr__(self) -> str:
        return self.to_frame().drop(columns="folder").to_string()
