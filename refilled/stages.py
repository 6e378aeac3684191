"""A run's stages: what each trains, for how long, with which terms and their settings."""

from __future__ import annotations

import dataclasses
import importlib
import keyword
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from refilled.config import RunConfig, ScheduleConfig, SearchConfig, Sources, TermConfig, TermSettings
from refilled.config.base import FieldError
from refilled.data.label_space import LabelSpaces
from refilled.errors import UserError
from refilled.methods import TERMS, StageName, is_of_package, is_users, terms_of, user_terms
from refilled.terms import Term
from refilled.terms.base import Needs, StudentNeed, TeacherNeed
from refilled.user_code import load_object, read_source, read_text
from refilled.user_package import files_of

_NAME = re.compile(r"[a-z][a-z0-9_]*")
# Settings of terms are flags `--NAME.SETTING`, beside those of a run, of a search and of `tune/train.py`.
_TAKEN = {*TERMS, "refit", "workers", "help"} | {
    field.name for config in (RunConfig, SearchConfig) for field in dataclasses.fields(config)
}


_LISTS = ("teacher_classes", "student_classes")


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: The stage's name.
        num_epochs: Its length.
        schedule: Learning rates.
        weight: Factor on the sum of the terms' losses.
        terms: Classes of its terms, in the order of the method.
        trains: The whole student, or all of it but the head.
        validates_by: The student's own head, or the nearest class mean of its embedding.
    """

    name: StageName
    num_epochs: int
    schedule: ScheduleConfig
    weight: float
    terms: tuple[type[Term], ...]
    trains: Literal["all", "embedding"]
    validates_by: Literal["head", "nearest_mean"]

    @property
    def teacher_needs(self) -> frozenset[TeacherNeed]:
        """What its terms ask of the teacher."""
        return frozenset(need for term in self.terms for need in term.needs.teacher)

    @property
    def needs_teacher(self) -> bool:
        """Whether its terms ask the teacher anything."""
        return bool(self.teacher_needs)

    @property
    def is_cacheable(self) -> bool:
        """Whether the teacher's embeddings are all that is asked of it, which a cache can serve."""
        return self.needs_teacher and "features" not in self.teacher_needs


def stages_of(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of a run, in order.

    Raises:
        UserError: A term of the method is not known.
    """
    stages = []
    for name, terms in terms_of(config.method).items():
        is_last = name == "classifier"
        stages.append(
            Stage(
                name=name,
                num_epochs=config.epochs[1] if is_last else config.epochs[0],
                schedule=config.classifier.schedule if is_last else config.embedding.schedule,
                weight=config.classifier.weight if is_last else 1.0,
                terms=tuple(term_class(term, config) for term in terms),
                trains="all" if is_last else "embedding",
                validates_by="head" if is_last else "nearest_mean",
            )
        )
    return tuple(stages)


def term_class(name: str, config: RunConfig) -> type[Term]:
    """The class of a term, the package's or, from the run's sources, the user's.

    Raises:
        UserError: It is the user's, and cannot be loaded or is no term.
    """
    if name in TERMS:
        module, _, attribute = TERMS[name].partition(":")
        own: type[Term] = getattr(importlib.import_module(f"refilled.terms.{module}"), attribute)
        return own
    found = load_object(name, config.sources, "method")
    if not (isinstance(found, type) and issubclass(found, Term)):
        raise UserError(f"method must name a subclass of refilled.terms.Term, but {name!r} is none.")
    term: type[Term] = found
    own_name = str(getattr(term, "name", ""))
    if not _NAME.fullmatch(own_name) or keyword.iskeyword(own_name) or own_name in _TAKEN:
        raise UserError(
            f"{name!r} must have a class attribute `name`, small letters, digits and _, that no term or setting has."
        )
    _check_class(name, term)
    return term


def _check_class(name: str, term: type[Term]) -> None:
    """Refuse a term of the user's whose attributes say something that would be passed over later.

    Raises:
        UserError: Naming the attribute.
    """
    is_config = isinstance(term.Config, type) and issubclass(term.Config, TermConfig)
    if not is_config or "__dataclass_fields__" not in vars(term.Config):
        raise UserError(f"{name!r} must have a Config that is a frozen dataclass and a TermConfig.")
    if term.place or not isinstance(term.needs, Needs):
        raise UserError(f"{name!r} must have needs that are Needs, and no `place`.")
    for side, known in (("student", get_args(StudentNeed)), ("teacher", get_args(TeacherNeed))):
        odd = sorted(set(getattr(term.needs, side)) - set(known))
        if odd:
            raise UserError(f"{name!r} must need {', '.join(known)} of the {side}, got {odd[0]!r}.")
    settings = {field.name for field in dataclasses.fields(term.Config)}
    for entry in (*term.space, *([term.weight_space] if term.weight_space else ())):
        if entry.name not in settings:
            raise UserError(f"{name!r} must search settings of its Config, which has no {entry.name!r}.")


def place_of(term: type[Term]) -> str:
    """Dotted name under which a run keeps a term's settings."""
    return term.place or f"terms.{term.name}"


def term_config(term: type[Term], config: RunConfig) -> TermConfig:
    """The settings of a term in a run, checked.

    Raises:
        UserError: A setting is not known to the term, or has a value that it refuses.
    """
    names = [field.name for field in dataclasses.fields(term.Config)]
    if term.place:
        holder = getattr(config, term.place)
        return term.Config(**{name: getattr(holder, name) for name in names})
    given = config.terms.of(term.name)
    unknown = sorted(set(given) - set(names))
    if unknown:
        known = ", ".join(sorted(names)) or "no settings"
        raise UserError(f"Unknown setting terms.{term.name}.{unknown[0]}; term {term.name} has {known}.")
    try:
        return term.Config.from_dict(given)
    except FieldError as error:
        raise error.within(term.name) from None


def num_epochs_of(config: RunConfig) -> int:
    """Epochs of a whole run."""
    return sum(config.epochs[1] if name == "classifier" else config.epochs[0] for name in terms_of(config.method))


def needs_teacher(config: RunConfig) -> bool:
    """Whether any stage of a run asks the teacher."""
    return any(stage.needs_teacher for stage in stages_of(config))


def check_classes(config: RunConfig, spaces: LabelSpaces) -> None:
    """Refuse a run whose terms need a teacher of the student's own classes, where it has others.

    Raises:
        UserError: With the numbers of both.
    """
    same = any(term.needs.same_classes for stage in stages_of(config) for term in stage.terms)
    if same and sorted(spaces.teacher) != sorted(spaces.student):
        raise UserError(
            f"method {config.method} needs a teacher with exactly the student's classes (Eq. 2; see "
            f"num_teacher_classes and num_student_classes), got {len(spaces.teacher)} teacher and "
            f"{len(spaces.student)} student classes that differ."
        )


def with_own_code(config: RunConfig) -> RunConfig:
    """The run with the text of every file of the user's that it names, code read here and now.

    Raises:
        UserError: A file cannot be read.
    """
    texts: dict[str, str] = {}
    for field_name, name in named_by_user(config):
        texts |= read_source(name, field_name).to_dict()
    for field_name in _LISTS:
        if (path := getattr(config, field_name)) is not None:
            known = config.sources.text_of(path)
            texts[path] = (
                known if known is not None else read_text(path, field_name, "a text file with one class a line")
            )
    return dataclasses.replace(config, sources=Sources.from_dict(texts))


def named_by_user(config: RunConfig) -> list[tuple[str, str]]:
    """What a run names that is the user's own code, with the field that does."""
    networks = [("teacher", config.teacher), ("student", config.student)]
    own = [each for each in networks if is_users(each[1]) or is_of_package(each[1])]
    return [("method", term) for term in user_terms(config.method)] + own


def own_code(config: RunConfig, *names: str) -> Sources:
    """Those of a run's sources that hold what is named: code by its name, other files by their path."""
    paths = {path for name in names for path in files_of(name, config.sources)}
    return config.sources.only({*paths, *names, *(name.rpartition(":")[0] for name in names)})


def complete(config: RunConfig) -> RunConfig:
    """The run with every setting of its terms written out, and without those of terms that it does not have.

    Raises:
        UserError: Its method cannot be run; see `check`.
    """
    check(config)
    settings: dict[str, Any] = {}
    for stage in stages_of(config):
        for term in stage.terms:
            own = term_config(term, config).flat()
            if own and not term.place:
                settings[term.name] = own
    lists = [path for field_name in _LISTS if (path := getattr(config, field_name)) is not None]
    carried = own_code(config, *(name for _, name in named_by_user(config)), *lists)
    return dataclasses.replace(config, terms=TermSettings.from_dict(settings), sources=carried)


def check(config: RunConfig) -> None:
    """Refuse a run whose method cannot be put together or run.

    Raises:
        UserError: Naming the field or term.
    """
    by_name: dict[str, type[Term]] = {}
    for stage in stages_of(config):
        for term in stage.terms:
            if by_name.setdefault(term.name, term) is not term:
                raise UserError(f"method must have terms of different names, but two classes are called {term.name!r}.")
            term_config(term, config)
            term.check(config)
            if stage.name == "embedding" and "logits" in term.needs.student:
                raise UserError(
                    f"method must not have {term.name} in stage embedding, which does not train the head, "
                    f"got {config.method!r}."
                )
        if stage.name == "classifier" and not any("logits" in term.needs.student for term in stage.terms):
            raise UserError(
                f"method must have a term that trains the head, such as cross_entropy, in its last stage, "
                f"got {config.method!r}."
            )
