"""A search as a job of `ray job`, on a head of its own: submitted, submitted again, stopped, failed and refused."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from end_state import differences, end_state
from job_head import DECOY, NOT_UPLOADED, JobHead
from processes import working_as
from users_files import TERM

from refilled.storage.artifact_folder import USED

pytestmark = pytest.mark.ray

SEARCH = (
    "python tune/search.py smoke --deterministic --overlaps 1 --trials 1 --epochs 24 48 --teacher-epochs 4 --seeds 1 "
    "--no-forecast --storage"
)
PATIENCE_S = 120.0
TABLE = "Accuracy in %; test: one seed, so no interval"


@dataclass(frozen=True)
class Finished:
    """A search that nobody disturbed."""

    name: str
    storage: Path
    log: str
    state: dict[str, Any]


@pytest.fixture(scope="module")
def head() -> Iterator[JobHead]:
    with JobHead() as started:
        yield started


@pytest.fixture(scope="module")
def finished(head: JobHead, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    storage = tmp_path_factory.mktemp("jobs") / "undisturbed"
    name, job = head.submit(f"{SEARCH} {storage}")
    assert job.returncode == 0, job.stdout
    return Finished(name, storage, job.stdout, end_state(storage))


def until(is_so: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def times_of(storage: Path) -> dict[Path, int]:
    """When each file of a run, a teacher or an artifact was written last."""
    files = [path for kind in ("runs", "teachers", "cache") for path in (storage / kind).rglob("*") if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in files if path.suffix != ".lock" and path.name != USED}


def test_a_job_ends_well_and_says_what_came_of_it(head: JobHead, finished: Finished) -> None:
    assert head.status(finished.name) == "SUCCEEDED"
    assert TABLE in finished.log
    assert f"Summary: {finished.storage}/summary.json" in finished.log
    assert {run["status"] for runs in finished.state["mlflow"].values() for run in runs} == {"FINISHED"}
    assert len(finished.state["tests"]) == 3


def test_a_job_gets_the_code_and_nothing_else(head: JobHead, finished: Finished) -> None:
    (unpacked,) = head.unpacked
    assert [str(path.relative_to(unpacked)) for path in unpacked.rglob(DECOY)] == [f"tune/{DECOY}"]
    names = {path.name for path in unpacked.iterdir()}
    assert {"refilled", "tune"} <= names
    assert not names & {*NOT_UPLOADED}


def test_a_job_runs_that_copy_where_the_package_is_not_installed(head: JobHead, finished: Finished) -> None:
    alone = subprocess.run(
        [str(head.python), "-c", "import ray; import refilled"],
        env=head.environment,
        cwd=head.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "No module named 'refilled'" in alone.stderr
    (unpacked,) = head.unpacked
    assert list(unpacked.glob("tune/backend/__pycache__/worker.*.pyc"))  # it was imported there


def test_the_same_job_again_repeats_nothing(head: JobHead, finished: Finished) -> None:
    before = times_of(finished.storage)
    _, job = head.submit(f"{SEARCH} {finished.storage}")
    assert job.returncode == 0, job.stdout
    assert "2 ended and 0 interrupted trials of this search are there already; continuing." in job.stdout
    assert TABLE in job.stdout
    assert times_of(finished.storage) == before
    assert differences(finished.state, end_state(finished.storage)) == []


def test_a_job_that_was_stopped_goes_on_when_it_is_submitted_again(
    head: JobHead, finished: Finished, tmp_path: Path
) -> None:
    storage = tmp_path / "stopped"

    def has_begun() -> bool:
        return any(len(path.read_text().splitlines()) >= 2 for path in storage.glob("runs/*/metrics.jsonl"))

    name, _ = head.submit(f"{SEARCH} {storage}", wait=False)
    until(has_begun, "no trial reported two epochs")
    assert working_as("trial", head.folder)
    assert not any(head.token in title for title in command_lines())
    stop = head.ray("job", "stop", name)
    assert stop.returncode == 0, stop.stdout
    assert head.status(name) == "STOPPED"
    until(lambda: not working_as("trial", head.folder), "trials outlived their job")
    states = {trial["state"] for trials in end_state(storage)["trials"].values() for trial in trials}
    assert states <= {"RUNNING", "COMPLETE"}
    assert "RUNNING" in states, "it was stopped too late"

    _, again = head.submit(f"{SEARCH} {storage}")
    assert again.returncode == 0, again.stdout
    assert "interrupted trials of this search are there already; continuing." in again.stdout
    assert differences(finished.state, end_state(storage)) == []


def test_a_job_with_a_cell_that_has_no_result_fails(head: JobHead, tmp_path: Path) -> None:
    diverging = "--method student --classifier.weight 1e30"
    name, job = head.submit(f"{SEARCH} {tmp_path / 'failed'} {diverging}")
    assert job.returncode != 0
    assert head.status(name) == "FAILED"
    assert "has no result; its trials or refits failed." in job.stdout


def test_a_job_with_a_term_of_the_users_own(head: JobHead, tmp_path: Path) -> None:
    """The file is where the job is submitted from; its workers get the text with the run."""
    (head.code / "my_terms.py").write_text(TERM)
    try:
        method = "my_terms.py:Regression"
        name, job = head.submit(f"{SEARCH} {tmp_path / 'own'} --methods {method}")
    finally:
        (head.code / "my_terms.py").unlink()
    assert job.returncode == 0, job.stdout
    assert head.status(name) == "SUCCEEDED"
    (row,) = json.loads((tmp_path / "own" / "summary.json").read_text())
    assert (row["method"], row["terms"]) == (method, f"cross_entropy+{method}")
    assert row["config"]["sources"] == {"my_terms.py": TERM}
    assert row["baseline_test_accuracy"] is None
    assert row["test_accuracy"][0] > 0.2


@pytest.mark.parametrize(("stranger", "answer"), [("none", "Missing authentication token"), ("wrong", "Invalid")])
def test_without_the_token_nothing_is_told_and_nothing_is_run(
    stranger: str, answer: str, head: JobHead, finished: Finished, tmp_path: Path
) -> None:
    environment = head.strangers[stranger]
    submit = ["job", "submit", "--submission-id", f"stranger-{stranger}", "--working-dir", ".", "--", "true"]
    for words in (submit, ["job", "status", finished.name]):
        refused = head.ray(*words, environment=environment)
        assert refused.returncode != 0
        assert answer in refused.stdout
    assert "stranger" not in head.ray("job", "list").stdout

    driver = subprocess.run(
        [str(head.python), *SEARCH.split()[1:], str(tmp_path)],
        env=environment | {"RAY_ADDRESS": f"127.0.0.1:{head.port}", "PYTHONPATH": str(head.code)},
        cwd=head.code,
        capture_output=True,
        text=True,
        check=False,
    )
    assert driver.returncode == 2
    assert driver.stderr.startswith("search: RAY_AUTH_MODE must be token and RAY_AUTH_TOKEN_PATH a file with the token")
    assert driver.stderr.count("\n") == 1


def test_the_token_is_for_its_owner_only_and_is_never_shown(head: JobHead, finished: Finished) -> None:
    """The last test: it reads what all the others left."""
    assert head.token_path.stat().st_mode & 0o777 == 0o600
    token = head.token.encode()
    files = [path for folder in (head.folder, finished.storage) for path in folder.rglob("*") if path.is_file()]
    assert [path for path in files if path != head.token_path and token in path.read_bytes()] == []
    assert any(path.name == "job-driver-job-0.log" for path in files)
    assert not any(head.token in text for text in [*head.said, *command_lines()])


def command_lines() -> list[str]:
    """What `ps` shows of everybody's processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    return found
