"""Whether a new trial explores a new embedding stage or goes on from a finished one, and from which."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from refilled.config import RunConfig
from refilled.identity import determines_first_stage
from tune.studies.study_store import StudyPlan, epochs_trained

MIN_COMPLETE = 4  # whole trials before anything is worth going on from


@dataclass(frozen=True)
class Point:
    """A finished embedding stage: the settings that made it, and the number of the trial that had the best value."""

    params: Mapping[str, Any]
    number: int


@dataclass
class _Arm:
    improvements: int = 0
    epochs: int = 0

    def rate(self, prior_epochs: int) -> float:
        """Improvements per epoch, as if one more had come in one more whole trial."""
        return (self.improvements + 1) / (self.epochs + prior_epochs)


class EmbeddingChoice:
    """Of exploring and re-using, take what has brought more improvements of the best value per epoch trained.

    A trial that re-uses trains stage classifier alone, so it wins early; once it no longer improves the best value
    its rate falls below that of exploring, and the other way round. A stage is chosen with a probability that falls
    with the square of its rank by the best value that any trial reached from it.
    """

    def __init__(self, plan: StudyPlan) -> None:
        self._num_epochs = plan.num_epochs
        self._run = plan.run
        self._epochs_after = plan.run.epochs[1]

    def choose(self, trials: Sequence[FrozenTrial], seed: int) -> Point | None:
        """The stage that the next trial goes on from; none to explore.

        Args:
            trials: all of the study so far.
            seed: of this choice.
        """
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        if len(complete) < MIN_COMPLETE:
            return None
        explore, reuse = self._arms(trials)
        if reuse.rate(self._num_epochs) <= explore.rate(self._num_epochs):
            return None
        best: dict[tuple[tuple[str, str], ...], FrozenTrial] = {}
        for trial in sorted(complete, key=lambda each: (-(each.value or 0.0), each.number)):
            best.setdefault(_stage_of(trial, self._run), trial)
        ranked = list(best.values())
        weights = [1 / (rank + 1) ** 2 for rank in range(len(ranked))]
        (chosen,) = random.Random(seed).choices(ranked, weights)
        run = self._run
        kept = {name: value for name, value in chosen.params.items() if determines_first_stage(name, run)}
        return Point(kept, chosen.number)

    def _arms(self, trials: Sequence[FrozenTrial]) -> tuple[_Arm, _Arm]:
        explore, reuse = _Arm(), _Arm()
        best = float("-inf")
        for trial in trials:
            is_reuse = trial.user_attrs.get("origin") == "reuse"
            arm = reuse if is_reuse else explore
            if trial.state == TrialState.RUNNING:
                arm.epochs += self._epochs_after if is_reuse else self._num_epochs
            else:
                arm.epochs += epochs_trained(trial)
            if trial.state == TrialState.COMPLETE and trial.value is not None and trial.value > best:
                best = trial.value
                arm.improvements += 1
        return explore, reuse


def _stage_of(trial: FrozenTrial, run: RunConfig) -> tuple[tuple[str, str], ...]:
    return tuple(
        sorted((name, repr(value)) for name, value in trial.params.items() if determines_first_stage(name, run))
    )
