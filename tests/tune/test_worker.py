"""What one job leaves behind must not reach the next one in its process; and how jobs end."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import outcomes
import pytest
import torch
from outcomes import assert_same_outcome, row_of, rows_without_times

import tune.backend.worker
from refilled.data.images import make_image_set
from refilled.errors import UserError
from refilled.execution import run_folder
from refilled.metrics import END, EpochMetrics, Report, TrialEnd
from refilled.presets import smoke
from refilled.storage import Storage
from refilled.tasks.classification import load_task
from tune.backend.cluster import Resources
from tune.backend.worker import (
    WorkersLostError,
    known_process_state,
    report_trial,
    train_fn_per_worker,
    work,
)

RUN = dataclasses.replace(smoke().run, overlap=0.4, epochs=(1, 2), teacher_epochs=2)
ONE = Resources(num_workers=1, cpus_per_worker=1.0, gpus_per_worker=0.0, slots=1, slots_now=1)
PLACE = {"num_threads": 1, "num_gpus": 0.0}
ABSURD = RUN.with_overrides({"classifier.schedule.learning_rate": 1e30})

# Each leaves the process as some trial might; the second column says whether it changes a run's numbers, or ends it,
# where nothing puts the state back.
SABOTAGE: dict[str, tuple[Callable[[], object], bool]] = {
    "default dtype": (lambda: torch.set_default_dtype(torch.float64), False),
    "default device": (lambda: torch.set_default_device("meta"), True),
    "gradients": (lambda: torch.set_grad_enabled(False), True),
    "inference mode": (lambda: enter_inference_mode(), True),
    "autocast": (lambda: torch.set_autocast_enabled("cpu", True), True),
    "oneDNN": (lambda: torch.backends.mkldnn.set_flags(False), True),
    "matmul precision": (lambda: torch.set_float32_matmul_precision("medium"), False),
    "convolution precision": (lambda: setattr(torch.backends.mkldnn.conv, "fp32_precision", "bf16"), False),
    "threads": (lambda: torch.set_num_threads(3), False),
    "denormals": (lambda: torch.set_flush_denormal(True), False),
    "determinism": (lambda: torch.use_deterministic_algorithms(True), False),
    "anomalies": (lambda: torch.autograd.set_detect_anomaly(True), False),
    "generators": (lambda: (torch.manual_seed(9), np.random.seed(9), random.seed(9)), False),
    "cuDNN": (lambda: setattr(torch.backends.cudnn, "benchmark", True), False),
}
ENTERED: list[torch.inference_mode] = []


def enter_inference_mode() -> None:
    ENTERED.append(torch.inference_mode())
    ENTERED[-1].__enter__()


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """The storage of a run in a process that did nothing before."""
    storage = Storage.open(tmp_path_factory.mktemp("clean"))
    code = "import json, sys; from refilled.storage import Storage; from tune.backend.worker import work; "
    code += "work('run', json.loads(sys.argv[1]), Storage.open(sys.argv[2]), num_threads=1, num_gpus=0.0)"
    subprocess.run([sys.executable, "-c", code, json.dumps(RUN.to_dict()), storage.location], check=True, timeout=120)
    return storage


@pytest.fixture
def prepared(clean: Storage, tmp_path: Path) -> Storage:
    return with_teacher(clean, tmp_path)


def with_teacher(clean: Storage, folder: Path) -> Storage:
    """A storage that has the teacher already."""
    for name in ("cache", "teachers"):
        shutil.copytree(clean.root / name, folder / name)
    return Storage.open(folder)


@pytest.fixture
def own_state() -> Iterator[None]:
    """Puts the state of the tests' process back."""
    yield
    with known_process_state(0, 1):
        pass
    while ENTERED:
        ENTERED.pop().__exit__(None, None, None)
    torch.set_grad_enabled(True)
    torch.set_autocast_enabled("cpu", False)  # the guard's own context puts back what it found


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_job_begins_as_in_a_new_process(name: str, clean: Storage, prepared: Storage, own_state: None) -> None:
    SABOTAGE[name][0]()
    work("run", RUN.to_dict(), prepared, **PLACE)
    with known_process_state(0, 1):
        assert_same_outcome(run_folder(RUN, prepared), run_folder(RUN, clean))


@pytest.mark.parametrize("name", [name for name, (_, matters) in SABOTAGE.items() if matters])
def test_the_sabotage_would_reach_an_unguarded_job(
    name: str, clean: Storage, prepared: Storage, own_state: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune.backend.worker, "known_process_state", lambda seed, num_threads: contextlib.nullcontext())
    SABOTAGE[name][0]()
    try:
        work("run", RUN.to_dict(), prepared, **PLACE)
    except (RuntimeError, TypeError, NotImplementedError, IndexError):  # what torch says of such states
        return
    with known_process_state(0, 1):
        assert rows_without_times(run_folder(RUN, prepared)) != rows_without_times(run_folder(RUN, clean))


def state() -> dict[str, Any]:
    """All that the guard sets, as far as it can be asked for."""
    backends = torch.backends
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.zeros(1).device,
        "threads": torch.get_num_threads(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": [(torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in ("cpu", "cuda")],
        "cache": (torch.is_autocast_cache_enabled(), torch.autocast_increment_nesting() - 1),
        "nesting": torch.autocast_decrement_nesting(),
        "denormal": float(torch.tensor([1e-39]) * 1.0),
        "precision": [
            each.fp32_precision
            for each in (backends.cuda.matmul, backends.mkldnn.matmul, backends.mkldnn.conv, backends.cudnn.conv)
        ],
        "cudnn": (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic),
        "mkldnn": (torch._C._get_mkldnn_enabled(), torch._C._get_mkldnn_deterministic()),
        "draws": (float(torch.rand(1)), float(np.random.rand()), random.random()),
    }


def test_every_setting_comes_back_and_the_generators_depend_on_the_seed_alone(own_state: None) -> None:
    with known_process_state(7, 1):
        expected = state()
    for change, _ in SABOTAGE.values():
        change()
    torch.autocast_increment_nesting()
    torch.set_autocast_cache_enabled(False)
    torch.backends.fp32_precision = "tf32"
    torch.backends.cudnn.deterministic = True
    torch.backends.mkldnn.set_flags(True, True)
    with known_process_state(7, 1):
        assert state() == expected
    with known_process_state(8, 1):
        assert all(a != b for a, b in zip(state()["draws"], expected["draws"], strict=True))


def test_compiled_graphs_do_not_outlive_their_job(own_state: None) -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    doubled = torch.compile(lambda values: values * 2, backend=counter)
    for _ in range(2):
        with known_process_state(0, 1):
            doubled(torch.ones(2))
            doubled(torch.ones(2))
    assert counter.frame_count == 2


def test_runs_leave_the_images_that_a_process_keeps_as_they_were(prepared: Storage) -> None:
    work("run", RUN.to_dict(), prepared, **PLACE)
    task = load_task(RUN, prepared)
    assert task is load_task(RUN, prepared)  # kept, not read again
    assert task.validation is not None
    for each in (task.train, task.validation):
        assert make_image_set(each.images, each.labels, each.class_names).digest == each.digest


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FloatingPointError("too large"), "diverged"),
        (UserError("data must exist."), "failed"),
        (WorkersLostError("gone"), "failed"),
    ],
)
def test_a_final_error_is_reported_as_the_trials_end(error: Exception, kind: Any) -> None:
    sent: list[dict[str, Any]] = []

    def train(report: Report) -> None:
        report(row_of(4))
        raise error

    report_trial(train, sent.append)
    assert sent == [row_of(4).to_dict(), {END: kind, "end_reason": str(error)}]
    assert TrialEnd.from_dict(sent[1]) == TrialEnd(kind, str(error))
    with pytest.raises(KeyError):
        report_trial(lambda report: {}["missing"], sent.append)
    assert len(sent) == 2


def test_a_full_disk_is_an_end_of_its_own(tmp_path: Path) -> None:
    def train(report: Report) -> None:
        report(row_of(3))
        raise RuntimeError("a library's own") from OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

    sent: list[dict[str, Any]] = []
    report_trial(train, sent.append)
    end = TrialEnd.from_dict(sent[-1])
    assert (len(sent), end.kind) == (2, "storage_full")
    assert str(tmp_path) in end.reason
    assert "is full: free some space" in end.reason


def test_a_train_group_is_not_tried_again_where_its_run_diverged(prepared: Storage) -> None:
    arguments = {"job": "run", "config": ABSURD.to_dict(), "storage": prepared, **PLACE, "reports": False}
    error = train_fn_per_worker(arguments)
    assert isinstance(error, FloatingPointError)
    assert "epoch" in str(error)


@dataclass(frozen=True, kw_only=True)
class Sabotaged(EpochMetrics):
    """A row that says what a process's default type was."""

    dtype: str


def eventful(job: Any, config: Mapping[str, Any], storage: Storage, *, on_report: Report, **others: Any) -> None:
    """`work`, and an event beside it."""
    from tune.backend.worker import work

    event, marker = config["event"], storage.root / "killed"
    if event == "sabotage":
        sys.path.extend(config["tests"])
        from test_worker import SABOTAGE  # cannot be pickled: it names parts of torch that are objects

        for change, _ in SABOTAGE.values():
            change()

    def report(row: EpochMetrics) -> None:
        on_report(row)
        if event == "killed" and row.epoch == 2 and not marker.exists():
            marker.mkdir()
            os.kill(os.getpid(), signal.SIGKILL)

    if event == "sabotage":
        report(Sabotaged(**vars(row_of(1)), dtype=str(torch.get_default_dtype())))
    else:
        work(job, config["run"], storage, on_report=report, **others)


@pytest.mark.ray
def test_trials_after_sabotage_after_a_kill_and_with_final_errors(
    local_ray: None, clean: Storage, prepared: Storage
) -> None:
    import ray.cloudpickle
    from fixed_list import run_list

    from tune.backend.tuner import trial_function

    for module in (sys.modules[__name__], outcomes):  # workers cannot import a test module
        ray.cloudpickle.register_pickle_by_value(module)
    function = trial_function(ONE, prepared, backend="auto", body=eventful)
    bad = dataclasses.replace(RUN, data=f"parquet:{prepared.root / 'nowhere'}")
    other = dataclasses.replace(RUN, seed=1)
    runs = {"sabotage": RUN, "real": RUN, "diverges": ABSURD, "bad": bad, "killed": other}
    tests = [str(folder) for folder in Path(__file__).parents[:2]]
    samples = [
        {"name": name, "config": {"event": name, "run": run.to_dict(), "tests": tests}} for name, run in runs.items()
    ]
    rows, errors = run_list(function, samples, prepared)
    assert not errors

    assert rows["sabotage"][0]["dtype"] == "torch.float64"
    assert rows["sabotage"][0]["pid"] == rows["real"][0]["pid"]  # which Tune adds to every row
    assert_same_outcome(run_folder(RUN, prepared), run_folder(RUN, clean))

    assert [row.get("epoch") for row in rows["diverges"]] == [1, None]  # once: an error would be tried again
    assert rows["diverges"][-1][END] == "diverged"
    assert len(rows["bad"]) == 1
    assert rows["bad"][0][END] == "failed"
    assert "nowhere" in rows["bad"][0]["end_reason"]

    epochs_by_process: dict[int, list[int]] = {}
    for row in rows["killed"]:
        epochs_by_process.setdefault(row["pid"], []).append(row["epoch"])
    first, second = epochs_by_process.values()
    assert first == [1, 2]
    assert second[-2:] == [2, 3]  # from its checkpoint
    alone = with_teacher(clean, prepared.root / "alone")
    work("run", other.to_dict(), alone, **PLACE)
    assert_same_outcome(run_folder(other, prepared), run_folder(other, alone))


def diverging(job: Any, config: Any, storage: Storage, **others: Any) -> None:
    """`work` with an absurd learning rate."""
    from tune.backend.worker import work

    work(job, ABSURD.to_dict(), storage, **others)


@pytest.mark.ray
def test_a_study_is_told_that_its_trials_diverged(local_ray: None, prepared: Storage) -> None:
    import ray.cloudpickle

    from tune.backend.tuner import run_trials, trial_function
    from tune.studies.searcher import StudyPlan, StudyScheduler, StudySearcher, open_storage

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    plan = StudyPlan(key="cell", name="study", run=RUN, num_trials=1, num_epochs=3)
    searcher = StudySearcher([plan], open_storage(f"sqlite:///{prepared.root / 'studies.db'}"))
    function = trial_function(ONE, prepared, backend="auto", body=diverging)
    run_trials(function, searcher, StudyScheduler(searcher), slots=1, name="diverging", storage=prepared)
    trials = searcher.trials("cell")
    assert {trial.state.name for trial in trials} == {"FAIL"}
    reasons = {trial.user_attrs["failure"] for trial in trials}
    assert reasons == {"The loss is nan in epoch 2 (stage classifier)."}
    assert all(list(trial.intermediate_values) == [1] for trial in trials)  # of stage embedding, which went well
