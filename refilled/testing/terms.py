"""What must hold of a loss term."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping
from typing import Any, ClassVar

import docstring_parser
import numpy as np
import torch
from torch import Tensor

from refilled.config import Choice, RunConfig, Searched
from refilled.errors import UserError
from refilled.stages import term_class
from refilled.terms import Term
from refilled.testing.bench import BATCH, SHARES, Seen, TermBench, state_of, trace
from refilled.testing.named import differing, located, sources_of
from refilled.testing.workers import run_on

TOLERANCE = 1e-9  # relative, in float64: sums in another order


class TermContract:
    """Inherit it, name a term, and pytest runs the checks.

        class TestRegression(TermContract):
            term = "my_terms.py:Regression"

    Two small networks are trained on a few images with the term alone, on 1, 2 and 4 workers, in float64. A path is
    looked up beside the file of the test, then in the current folder.
    """

    term: ClassVar[str | type[Term]]
    """As a method names it, or a class that other processes can import."""
    settings: ClassVar[Mapping[str, Any]] = {}
    """Settings under which the term is tested; the others have their defaults."""
    _kept_traces: ClassVar[dict[int, list[list[Seen]]]]

    # ---- settings

    def test_every_setting_is_documented(self) -> None:
        """Its docstring is the help of its flag."""
        told: dict[str, str] = {}
        for each in self._kind().Config.__mro__[:-1]:
            params = docstring_parser.parse_from_object(each).params
            told |= {param.arg_name: param.description or "" for param in params if param.arg_name not in told}
        silent = [name for name in self._setting_names() if not told.get(name, "").strip()]
        assert not silent, f"these settings must have a docstring below them: {', '.join(silent)}"

    def test_defaults_are_accepted_and_survive_a_round_trip(self) -> None:
        """A run keeps settings as plain data."""
        kind = self._kind()
        try:
            config = kind.Config()
            again = kind.Config.from_dict(json.loads(json.dumps(config.to_dict())))
        except (UserError, TypeError) as error:
            raise AssertionError(f"Config refuses its own defaults: {error}") from error
        assert again == config, f"defaults come back changed: {config} and {again}"

    def test_searched_settings_are_settings_and_all_their_values_are_accepted(self) -> None:
        """A search may draw both ends of an interval, and every choice."""
        kind = self._kind()
        names = self._setting_names()
        for entry in self._searched():
            assert entry.name in names, f"{entry.name!r} is searched, and Config has no such setting"
            assert entry.when is None or entry.when[0] in names, f"{entry.name} depends on what is no setting"
            for value in _values(entry):
                try:
                    kind.Config.from_dict({**self.settings, entry.name: value})
                except UserError as error:
                    raise AssertionError(f"a search draws {entry.name} = {value}, which Config refuses") from error

    def test_undecayed_parameters_are_its_own(self) -> None:
        """What weight decay leaves alone is trained with the term."""
        term = self._bench().term
        own = {id(each) for each in term.parameters()}
        assert all(id(each) in own for each in term.undecayed()), "undecayed() gives what is none of the parameters"

    # ---- one process

    def test_rows_are_one_an_image_and_finite(self) -> None:
        """On every worker, however many images it has."""
        for num_workers, seen in self._traces().items():  # each step refuses rows of another number
            for rank, steps in enumerate(seen):
                assert all(step.are_finite for step in steps), f"rows on worker {rank} of {num_workers} are not finite"

    def test_loss_is_a_finite_scalar_that_teaches_the_student(self) -> None:
        """A number, with a gradient."""
        for step in self._alone():
            assert bool(step.loss.isfinite()), f"loss is {float(step.loss)}"
            reached = [each for name, each in step.gradients.items() if name.startswith("student.")]
            assert all(bool(each.isfinite().all()) for each in step.gradients.values()), "a gradient is not finite"
            assert any(bool(each.count_nonzero()) for each in reached), "no gradient reaches the student"

    def test_loss_uses_no_parameters_of_its_own(self) -> None:
        """All workers compute the same loss: a parameter used there would be counted once for each."""
        bench = self._bench()
        rows = {name: each.detach() for name, each in bench.term.rows(bench.local(0, (BATCH,))).items()}
        loss = bench.term.loss(rows, bench.batch(0))
        assert isinstance(loss, Tensor), f"loss() must return a tensor, got {type(loss).__name__}"
        assert not loss.requires_grad, "parameters belong in rows(); loss() depends on some"

    def test_nothing_is_drawn_from_the_global_generator(self) -> None:
        """Draws are keyed by seed, epoch and image (`refilled.keyed`), so that they are equal on any workers."""
        bench = self._bench()
        local, batch = bench.local(0, (BATCH,)), bench.batch(0)
        rows = self._undrawn("rows", lambda: bench.term.rows(local))
        self._undrawn("loss", lambda: bench.term.loss(rows, batch))
        detached = {name: each.detach() for name, each in rows.items()}
        with torch.no_grad():
            self._undrawn("update", lambda: bench.term.update(detached, batch))

    def test_inputs_are_left_as_they_were(self) -> None:
        """Outputs of the networks are everybody's, and a cache's."""
        bench = self._bench()
        local = bench.local(0, (BATCH,))
        assert local.teacher is not None
        given = [local.images, local.labels, *local.student[:2], *local.student.features, local.teacher.embedding]
        given += local.teacher.features
        before = [each.detach().clone() for each in given]
        rows = bench.term.rows(local)
        bench.term.loss(rows, bench.batch(0))
        with torch.no_grad():
            bench.term.update({name: each.detach() for name, each in rows.items()}, bench.batch(0))
        changed = [tuple(each.shape) for each, kept in zip(given, before, strict=True) if not torch.equal(each, kept)]
        assert not changed, f"the term changes what it is given, of shapes {changed}"

    def test_what_its_needs_do_not_name_is_not_used(self) -> None:
        """What a cache can serve, and what a stage trains, follows from `needs`."""
        kind = self._kind()
        try:
            TermBench(kind, kind.Config(**self.settings), asked_only=True).step(0)
        except (AttributeError, TypeError) as error:
            raise AssertionError(f"the term uses what its `needs` do not name: {error}") from error

    def test_same_seed_same_start(self) -> None:
        """Whatever the global generator is at."""
        starts = []
        for number in range(2):
            torch.manual_seed(number)
            starts.append(state_of(self._bench().term))
        odd = differing(starts[1], starts[0])
        assert not odd, f"these begin differently with the same seed: {', '.join(odd)}"

    def test_rounded_inputs_give_finite_numbers(self) -> None:
        """Float32, and a student that ran under bfloat16 autocast."""
        kind = self._kind()
        for precision in ("float32", "bfloat16"):
            bench = TermBench(kind, kind.Config(**self.settings), precision)
            for number in range(len(SHARES[1])):
                step = bench.step(number)
                assert bool(step.loss.isfinite()), f"loss is {float(step.loss)} in {precision}"
                odd = [name for name, each in step.gradients.items() if not bool(each.isfinite().all())]
                assert not odd, f"gradients of {', '.join(odd)} are not finite in {precision}"

    def test_state_survives_save_and_load(self) -> None:
        """A run that goes on from a checkpoint ends as if it had not stopped."""
        stopped, resumed = self._bench(), self._bench()
        for number in range(2):
            stopped.step(number)
        resumed.load(stopped.saved())
        expected, found = stopped.step(2), resumed.step(2)
        odd = differing(_numbers(found), _numbers(expected))
        assert not odd, f"after save and load these differ: {', '.join(odd)}"

    # ---- several workers

    def test_loss_is_the_same_on_every_worker(self) -> None:
        """Everybody computes it from everybody's rows."""
        for num_workers, seen in self._traces().items():
            for number in range(len(SHARES[1])):
                losses = [float(steps[number].loss) for steps in seen]
                assert len(set(losses)) == 1, f"step {number}: the {num_workers} workers have losses {losses}"

    def test_loss_does_not_depend_on_the_number_of_workers(self) -> None:
        """Whoever looks at a worker's share alone is seen here."""
        self._compare("loss", lambda step: {"loss": step.loss})

    def test_gradients_do_not_depend_on_the_number_of_workers(self) -> None:
        """Of the student and of the term's own parameters."""
        self._compare("gradients", lambda step: step.gradients)

    def test_state_does_not_depend_on_the_number_of_workers(self) -> None:
        """Parameters after the step, and buffers after `update`, on every worker."""
        self._compare("parameters or buffers", lambda step: step.state)

    # ----

    def _run(self) -> tuple[str | type[Term], RunConfig]:
        """The term as workers are told it, and a run that holds its file."""
        if not isinstance(self.term, str):
            return self.term, RunConfig()
        name = located(self.term, type(self))
        return name, RunConfig(sources=sources_of(name))

    def _kind(self) -> type[Term]:
        term, run = self._run()
        return term if isinstance(term, type) else term_class(term, run)

    def _bench(self) -> TermBench:
        kind = self._kind()
        return TermBench(kind, kind.Config(**self.settings))

    def _setting_names(self) -> list[str]:
        return [field.name for field in dataclasses.fields(self._kind().Config)]

    def _searched(self) -> tuple[Searched, ...]:
        kind = self._kind()
        return (*kind.space, *((kind.weight_space,) if kind.weight_space else ()))

    def _alone(self) -> list[Seen]:
        return self._traces()[1][0]

    def _traces(self) -> dict[int, list[list[Seen]]]:
        """By number of workers, what each saw; made once for a class of tests."""
        kept: dict[int, list[list[Seen]]] | None = vars(type(self)).get("_kept_traces")
        if kept is None:
            term, run = self._run()
            arguments = (term, dict(self.settings), run)
            kept = {1: [trace(*arguments)]} | {size: run_on(size, trace, *arguments) for size in SHARES if size > 1}
            type(self)._kept_traces = kept
        return kept

    def _compare(self, what: str, numbers: Any) -> None:
        for num_workers, seen in self._traces().items():
            for rank, steps in enumerate(seen):
                for number, (step, expected) in enumerate(zip(steps, self._alone(), strict=True)):
                    odd = differing(numbers(step), numbers(expected), tolerance=TOLERANCE)
                    assert not odd, (
                        f"step {number}: {what} on worker {rank} of {num_workers} must be as on one worker, "
                        f"but these differ: {', '.join(odd)}"
                    )

    def _undrawn(self, where: str, call: Any) -> Any:
        before = _global_generators()
        result = call()
        after = _global_generators()
        drawn = [name for name in before if before[name] != after[name]]
        assert not drawn, f"{where}() draws from the global generator of {', '.join(drawn)}"
        return result


def _global_generators() -> dict[str, object]:
    """The states of all from which a term might draw, comparable."""
    _, words, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "NumPy": (np.asarray(words).tobytes(), *rest),
        "Python's random": random.getstate(),
    }


def _values(entry: Searched) -> tuple[Any, ...]:
    domain = entry.domain
    return domain.values if isinstance(domain, Choice) else (domain.low, domain.high)


def _numbers(step: Seen) -> dict[str, Tensor]:
    return {"loss": step.loss} | step.gradients | {f"{name} after the step": each for name, each in step.state.items()}
