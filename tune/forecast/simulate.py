"""How long work takes on some slots, and how much of it pruning leaves: the arithmetic of a forecast."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from refilled.config.search import Pruner

if TYPE_CHECKING:
    import optuna

REPEATS = 24  # simulated studies of every kind


@dataclass(frozen=True)
class Work:
    """One run of a phase, in parts that depend on when it starts and how far it goes.

    Attributes:
        stages: of each the epochs, the seconds of an epoch with the teacher looked up, and with the teacher running.
        fixed_s: seconds beside the epochs.
        shares: names the teacher and images, whose prototypes and bank are made once; none: no teacher.
        prototypes_s: seconds to make the prototypes.
        bank_s: seconds to build the bank; none: there is to be none.
        waits: whether runs wait for a bank that is being built, or go on without.
    """

    stages: tuple[tuple[int, float, float], ...]
    fixed_s: float
    shares: str | None = None
    prototypes_s: float = 0.0
    bank_s: float | None = None
    waits: bool = False

    @property
    def num_epochs(self) -> int:
        """Of a whole run."""
        return sum(epochs for epochs, _, _ in self.stages)

    def epochs_s(self, num_epochs: int, *, looked_up: bool) -> float:
        """Seconds of the first epochs."""
        seconds, left = 0.0, num_epochs
        for epochs, bank_s, live_s in self.stages:
            seconds += min(epochs, left) * (bank_s if looked_up else live_s)
            left -= min(epochs, left)
        return seconds


@dataclass(frozen=True)
class Done:
    """What came of packing work into slots: seconds until all is done, busy seconds of all slots, and epochs."""

    wall_s: float = 0.0
    busy_s: float = 0.0
    epochs: float = 0.0


@dataclass
class _Shared:
    """When prototypes and bank of one teacher and set of images are there."""

    prototypes_at_s: float | None = None
    bank_at_s: float | None = None


@dataclass
class _Slots:
    """List scheduling: the next work goes to whichever slot is free first."""

    free_s: list[float]
    shared: dict[str, _Shared] = field(default_factory=dict)

    def start(self, work: Work, num_epochs: int, start_s: float) -> float:
        """Seconds that work takes which starts then."""
        now_s, looked_up = start_s + work.fixed_s, False
        if work.shares is not None:
            shared = self.shared.setdefault(work.shares, _Shared())
            if shared.prototypes_at_s is None or shared.prototypes_at_s > now_s:  # who comes too early makes its own
                now_s += work.prototypes_s
                shared.prototypes_at_s = min(shared.prototypes_at_s or now_s, now_s)
            if work.bank_s is not None:
                if shared.bank_at_s is None:
                    shared.bank_at_s = now_s = now_s + work.bank_s
                elif work.waits:
                    now_s = max(now_s, shared.bank_at_s)
                looked_up = shared.bank_at_s <= now_s
        return now_s + work.epochs_s(num_epochs, looked_up=looked_up) - start_s


def pack(
    works: Sequence[tuple[Work, int]],
    slots: int,
    *,
    fresh_slots: int = 0,
    worker_start_s: float = 0.0,
    limit_s: float | None = None,
    max_epochs: int | None = None,
) -> Done:
    """Give work to slots in its order, each piece to the slot that is free first, as the search does.

    Args:
        works: each with the epochs it goes on for.
        slots: side by side.
        fresh_slots: of these, those whose worker has yet to be started.
        worker_start_s: what starting it takes.
        limit_s: when nothing goes on any more.
        max_epochs: that all work may train together.
    """
    here = _Slots([worker_start_s] * fresh_slots + [0.0] * (slots - fresh_slots))
    heapq.heapify(here.free_s)
    wall_s = busy_s = epochs = 0.0
    for work, wanted in works:
        start_s = heapq.heappop(here.free_s)
        num_epochs = wanted if max_epochs is None else min(wanted, max_epochs - int(epochs))
        if num_epochs <= 0 or (limit_s is not None and start_s >= limit_s):
            break
        took_s = here.start(work, num_epochs, start_s)
        done = 1.0 if limit_s is None else min(1.0, (limit_s - start_s) / took_s)
        epochs += done * num_epochs
        busy_s += done * took_s
        wall_s = max(wall_s, start_s + done * took_s)
        heapq.heappush(here.free_s, start_s + done * took_s)
    return Done(wall_s=wall_s, busy_s=busy_s, epochs=epochs)


def simulate_pruning(kind: Pruner, num_epochs: int, num_trials: int) -> list[list[int]]:
    """Epochs of the trials of a study, in order, for a few simulated studies with the search's own pruner.

    Every trial's value is an independent draw from one distribution and the same at every epoch, so ranks persist over
    rungs, no trial knows what the ones before it taught the sampler, and each ends before the next begins.
    """
    import optuna

    from tune.studies.pruning import RungPruner, make_pruner

    pruner = make_pruner(kind, num_epochs)
    rungs = pruner.rungs if isinstance(pruner, RungPruner) else ()
    draw = random.Random(0)
    studies = []
    for _ in range(REPEATS if rungs else 1):
        study = optuna.create_study(direction="maximize", pruner=pruner)
        studies.append([_epochs_of_trial(study.ask(), rungs, num_epochs, draw.random) for _ in range(num_trials)])
    return studies


def _epochs_of_trial(trial: optuna.Trial, rungs: Sequence[int], num_epochs: int, draw: Callable[[], float]) -> int:
    value = draw()
    for epoch in rungs:
        trial.report(value, epoch)
        if trial.should_prune():
            return epoch
    return num_epochs
