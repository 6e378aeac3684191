"""One study as this driver sees it: what it draws next, which trials run, what it has spent.

Two ways to draw:

- As trials end (the default): a trial is drawn when a worker is free, from the history at that moment.
- By batches (`deterministic`): the trials of a batch are drawn together when the batch before has ended, and are pruned
  by comparison with earlier batches alone. So neither draws nor pruning depend on which trial ends first. The border of
  a batch is stored before its first trial is drawn.

Every trial's sampler is new and seeded by search, study and number, so a driver that continues draws what the one
before would have drawn. Trials that a dead driver left RUNNING are taken over as they are, under their own numbers.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from refilled.config.search import Pruner, Sampler
from tune.studies.history import history
from tune.studies.per_parameter_sampler import PerParameterSampler
from tune.studies.pruning import Visible, make_pruner
from tune.studies.samplers import LEARNING, make_sampler
from tune.studies.space import sample
from tune.studies.study_store import StudyPlan, epochs_trained, open_study, ranked

DONE = (TrialState.COMPLETE, TrialState.PRUNED)
MAX_TAKEOVERS = 10  # of a trial that reports nothing in between: it may be what kills its drivers


@dataclass(frozen=True)
class Rules:
    """How the studies of a search draw and judge their trials; fields as in `SearchConfig`."""

    seed: int = 0
    sampler: Sampler = "gp"
    pruner: Pruner = "none"
    transfer: bool = True
    deterministic: bool = False
    trial_batch: int = 4
    make_pruner: Callable[[StudyPlan, Visible | None], BasePruner] | None = None
    """Makes another pruner; is given which trials it may look at."""
    make_sampler: Callable[[StudyPlan, int], BaseSampler] | None = None
    """Makes another sampler; is given the seed of one trial."""


@dataclass(frozen=True)
class Counts:
    """How a study's trials ended, over all drivers it had, and the epochs they trained."""

    complete: int
    pruned: int
    failed: int
    running: int
    epochs: int

    @property
    def done(self) -> int:
        """Trials that count towards the budget."""
        return self.complete + self.pruned


class CellStudy:
    """Draws the trials of one study and counts what they spend.

    Attributes:
        plan: What the study is.
        study: The Optuna study.
        allowed: Complete or pruned trials that it may have by now; extra trials raise it.
        done: Number of complete or pruned trials.
        running: Number of trials handed out and not ended.
        failed: Number of failed trials: since this driver opened the study, or, by batches, in all.
        epochs_spent: Epochs that ended trials trained.
        pace: Epochs that this driver saw trained, and the seconds they took.
    """

    def __init__(self, plan: StudyPlan, storage: BaseStorage, rules: Rules) -> None:
        self.plan = plan
        self.study = open_study(plan, storage)
        self.allowed = plan.num_trials
        self._rules = rules
        visible = self._is_of_earlier_batch if rules.deterministic else None
        self.study.pruner = (
            rules.make_pruner(plan, visible)
            if rules.make_pruner
            else make_pruner(rules.pruner, plan.num_epochs, visible=visible)
        )
        trials = self.trials()
        self.done = sum(trial.state in DONE for trial in trials)
        self.running = 0
        self.failed = sum(trial.state == TrialState.FAIL for trial in trials) if rules.deterministic else 0
        self.epochs_spent = sum(epochs_trained(trial) for trial in trials if trial.state.is_finished())
        self.pace = (0, 0.0)
        self._batches = [tuple(each) for each in self.study.user_attrs.get("generations", [])]  # first number and size
        # By source cell, how many trials it had when this one started warm: later ones depend on who was faster.
        self._num_source_trials: dict[str, int] = dict(self.study.user_attrs.get("received", {}))
        self._source_trials: dict[str, list[FrozenTrial]] = {}
        self._drawn: deque[optuna.Trial] = deque()

    def trials(self) -> list[FrozenTrial]:
        """All trials; not copies."""
        return self.study.get_trials(deepcopy=False)

    @property
    def started(self) -> int:
        """Trials that ended well or may still."""
        return self.done + self.running + len(self._drawn)

    @property
    def gave_up(self) -> bool:
        """Whether so many trials failed that no more are started."""
        return self.failed > max(2, self.plan.num_trials // 2)

    @property
    def remaining(self) -> int:
        """Trials that may be handed out by now."""
        return 0 if self.gave_up else max(0, self.allowed - self.done - self.running)

    @property
    def can_draw(self) -> bool:
        """Whether a trial can be handed out without waiting for a batch to end."""
        return bool(self._drawn) or self.running == 0 or not self._rules.deterministic

    @property
    def epochs_reserved(self) -> int:
        """Epochs that running trials may still train."""
        return self.running * self.plan.num_epochs

    @property
    def trial_s(self) -> float:
        """Seconds of a whole trial at the pace so far; 0 while that is unknown."""
        epochs, seconds = self.pace
        return self.plan.num_epochs * seconds / epochs if epochs else 0.0

    def best(self) -> FrozenTrial | None:
        """The complete trial with the highest value, the earliest of equals."""
        return next(iter(ranked(self.trials())), None)

    def counts(self) -> Counts:
        """How the trials ended."""
        trials = self.trials()
        states = [trial.state for trial in trials]
        return Counts(
            complete=states.count(TrialState.COMPLETE),
            pruned=states.count(TrialState.PRUNED),
            failed=states.count(TrialState.FAIL),
            running=states.count(TrialState.RUNNING),
            epochs=sum(epochs_trained(trial) for trial in trials),
        )

    def learn_from(self, source: CellStudy, *, is_settled: bool) -> None:
        """Queue a settled source cell's winner, once, and show samplers all that it had tried by then.

        Settings that were tried here already are not queued. By batches a source cell that settles after the first one
        is too late.
        """
        key = source.plan.key
        if key in self._source_trials:
            return
        trials = source.trials()
        if key not in self._num_source_trials:
            if not is_settled or (self._rules.deterministic and self._batches):
                return
            # The winner alone: neighbours agree about what is good, not about what is best, and the sampler learns from
            # all that they tried. Three of their best needed more trials than one in simulation, if within noise.
            winner = source.best()
            if winner is not None:
                attributes = {"origin": "transfer", "from": key}
                self.study.enqueue_trial(winner.params, user_attrs=attributes, skip_if_exists=True)
            self._num_source_trials[key] = len(trials)
            self.study.set_user_attr("received", self._num_source_trials)
        self._source_trials[key] = [trial for trial in trials if trial.number < self._num_source_trials[key]]

    def resume(self) -> None:
        """Take over what a dead driver left; call it after `learn_from`, whose trials samplers look at."""
        self._drawn.extend(self._taken_over(self.trials()))
        if self._rules.deterministic and self._batches:
            self._complete_batch()

    def next_trial(self, most: int) -> optuna.Trial | None:
        """A trial to run, its settings drawn; none while a batch must end first.

        Args:
            most: Trials that the budget has room for, at least 1; a batch is no larger.
        """
        if not self._drawn:
            if not self._rules.deterministic:
                self._drawn.append(self._draw())
            elif self.running == 0:
                self._begin_batch(min(self._rules.trial_batch, self.remaining, most))
        if not self._drawn:
            return None
        self.running += 1
        return self._drawn.popleft()

    def ended(self, *, is_done: bool, epochs: int) -> None:
        """Account for a trial whose end is stored."""
        self.running -= 1
        self.epochs_spent += epochs
        if is_done:
            self.done += 1
        else:
            self.failed += 1

    def requeue(self, trial: optuna.Trial) -> None:
        """Hand a trial out again, before all others: its process was lost before it began."""
        self.running -= 1
        self._drawn.appendleft(trial)

    def drop_leftovers(self) -> None:
        """Fail what a dead driver left and the budget has no room for; else it would stay RUNNING for ever."""
        while self._drawn:
            trial = self._drawn.popleft()
            trial.set_user_attr("failure", "its driver died, and the budget ended before it went on")
            self.study.tell(trial, state=TrialState.FAIL)

    def _begin_batch(self, size: int) -> None:
        start = sum(trial.state != TrialState.WAITING for trial in self.trials())
        self._batches.append((start, size))
        self.study.set_user_attr("generations", self._batches)
        self._complete_batch()

    def _complete_batch(self) -> None:
        """Draw what the last batch lacks: all of it, or what a dead driver did not come to."""
        start, size = self._batches[-1]
        drawn = sum(trial.state != TrialState.WAITING and trial.number >= start for trial in self.trials())
        for _ in range(size - drawn):
            self._drawn.append(self._draw())

    def _is_of_earlier_batch(self, other: FrozenTrial, trial: FrozenTrial) -> bool:
        start = max((start for start, _ in self._batches if start <= trial.number), default=0)
        return other.number < start

    def _draw(self) -> optuna.Trial:
        trials = self.trials()
        waiting = [trial.number for trial in trials if trial.state == TrialState.WAITING]
        self._seed_sampler(min(waiting, default=len(trials)))
        trial = self.study.ask()
        self._draw_settings(trial)
        return trial

    def _draw_settings(self, trial: optuna.Trial) -> None:
        trial.set_user_attr("overrides", sample(trial, self.plan.run))

    def _taken_over(self, trials: list[FrozenTrial]) -> list[optuna.Trial]:
        """The trials that a dead driver left running, to be handed out again as they are."""
        taken = []
        for left in trials:
            if left.state != TrialState.RUNNING:
                continue
            self._seed_sampler(left.number)
            trial = optuna.Trial(self.study, left._trial_id)  # Optuna's own way back to another process's trial
            num_rows, times = left.user_attrs.get("taken_over", (0, 0))
            times = times + 1 if num_rows == len(left.intermediate_values) else 1
            trial.set_user_attr("taken_over", [len(left.intermediate_values), times])
            if times > MAX_TAKEOVERS:
                trial.set_user_attr("failure", f"its driver died {MAX_TAKEOVERS} times without a row of it")
                self.study.tell(trial, state=TrialState.FAIL)
                continue
            if "overrides" not in left.user_attrs:
                self._draw_settings(trial)
            taken.append(trial)
        return taken

    def _seed_sampler(self, number: int) -> None:
        """A new sampler for one trial."""
        cell = f"{self._rules.seed} {self.plan.key}"

        def make(what: str) -> BaseSampler:
            seed = _hash(f"{cell} {number} {what}")
            if self._rules.make_sampler is not None:
                return self._rules.make_sampler(self.plan, seed)
            return make_sampler(
                self._rules.sampler, trial_seed=seed, study_seed=_hash(cell), num_trials=self.plan.num_trials
            )

        is_learning = self._rules.make_sampler is not None or self._rules.sampler in LEARNING
        self.study.sampler = PerParameterSampler(make, self._history if is_learning else None)

    def _history(self, study: optuna.Study, trial: FrozenTrial) -> tuple[optuna.Study, FrozenTrial]:
        return history(self.trials(), trial.number, self._source_trials)


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
