"""Runs of searches for tests of reports: as rows of a table, or written as the platform does."""

import math

import pandas as pd

from analysis.summary import summarise
from refilled.methods import NO_TEACHER

STUDENT = {0: 0.60, 1: 0.62, 2: 0.64}
KD = {0: 0.61, 1: 0.65, 2: 0.66}
REFILLED = {0: 0.65, 1: 0.66, 2: 0.70}


def runs_of(method, tests, *, teacher="big", num_trials=1, **tags):
    """A method's trials, the last of which wins, and one refit a seed, as rows of `fetch_runs`."""
    tags = {"search_key": "s", "overlap": 0.0, "student": "small", "images_per_class": None, "role": "method"} | tags
    tags |= {"method": method, "teacher": NO_TEACHER if method == "student" else teacher}
    name = " ".join(str(value) for value in tags.values())
    rows = [
        {"kind": "trial", "trial": number, "winner": number == num_trials - 1, "val_accuracy": 0.5}
        for number in range(num_trials)
    ]
    rows += [{"kind": "refit", "seed": seed, "test_accuracy": value} for seed, value in tests.items()]
    common = {"status": "FINISHED", "winner": False, "val_accuracy": math.nan, "test_accuracy": math.nan}
    common |= {"seed": 0, "trial": None, "start_time": pd.Timestamp(0), "code_version": "v1", "data_digest": "d1"}
    return [
        common | tags | row | {"run_id": f"{name} {row['kind']} {row.get('trial', row.get('seed'))}"} for row in rows
    ]


def cells_of(*groups):
    return summarise(pd.DataFrame([row for group in groups for row in group]))


class Search:
    """Writes runs as the platform does, through the tracker."""

    def __init__(self, tracker, folder):
        self.tracker, self.folder, self.count = tracker, folder, 0

    def run(self, status="FINISHED", val=None, test=None, **tags):
        self.count += 1
        key = f"run-{self.count}"
        tags = {"role": "method", "student": "small", "method": "refilled"} | tags
        tags = {"teacher": "none" if tags["method"] == "student" else "big|net"} | tags
        tags |= {"search_key": self.folder.name, "code_version": "abc", "data_digest": "d1"}
        tags["cell"] = f"{tags['overlap']}-{tags['teacher']}-{tags['student']}"
        params = {"embedding.temperature": 4.0, "classifier.distill_weight": None}
        text_tags = {name: str(value) for name, value in tags.items()}
        self.tracker.open_run(key, name=key, params=params, tags=text_tags, folder=self.folder)
        metrics = {} if val is None else {"best/val_accuracy": val}
        self.tracker.close_run(key, status=status, metrics=metrics | ({} if test is None else {"test_accuracy": test}))
        return key
