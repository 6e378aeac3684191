"""A search of trials that are known beforehand, through the platform's own Tune run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.tune import Callback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from refilled.storage import Storage
from tune.backend.tuner import TrialFunction, run_trials

Row = Mapping[str, Any]


class FixedList(Searcher):
    """Suggests samples in their order."""

    def __init__(self, samples: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self._samples = list(samples)

    def suggest(self, trial_id: str) -> Any:
        return self._samples.pop(0) if self._samples else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: Row | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        raise RuntimeError("a fixed list begins anew")


class Watcher(FIFOScheduler):
    """Keeps every row of every trial, by the `name` in its sample, and stops where it is told to."""

    def __init__(self, stops: Callable[[str, Row], bool] = lambda name, row: False) -> None:
        super().__init__()
        self._stops = stops
        self.rows: dict[str, list[Row]] = {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Row) -> str:
        self.rows.setdefault(trial.config["name"], []).append(dict(result))
        stops = self._stops(trial.config["name"], result)
        return str(TrialScheduler.STOP if stops else TrialScheduler.CONTINUE)

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Errors(Callback):
    """The last line of the error of every trial that failed."""

    def __init__(self) -> None:
        self.by_name: dict[str, str] = {}

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.by_name[trial.config["name"]] = str(trial.get_error()).strip().splitlines()[-1]


def run_list(
    function: TrialFunction,
    samples: Sequence[Mapping[str, Any]],
    storage: Storage,
    stops: Callable[[str, Row], bool] = lambda name, row: False,
) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Run samples, each with a `name`, one after the other; the rows and the errors by name."""
    watcher, errors = Watcher(stops), Errors()
    run_trials(function, FixedList(samples), watcher, slots=1, name="list", storage=storage, callbacks=[errors])
    return watcher.rows, errors.by_name
