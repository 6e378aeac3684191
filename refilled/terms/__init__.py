"""Loss terms, one a file. A new one is a file here and a line in `refilled.methods.TERMS`."""

from refilled.terms.base import (
    GlobalBatch,
    Local,
    MapTerm,
    Needs,
    Setting,
    Teacher,
    TeacherOutput,
    Term,
)

__all__ = ["GlobalBatch", "Local", "MapTerm", "Needs", "Setting", "Teacher", "TeacherOutput", "Term"]
