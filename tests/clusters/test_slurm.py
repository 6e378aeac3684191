"""`slurm.sh` run by a real shell, with programs that stand in for Slurm, Ray and the search."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster_texts import CLUSTERS

WAIT_S = 30.0

# Takes srun's options off and runs the rest, as on another node.
SRUN = """#!/usr/bin/env bash
echo "srun $*" >>"$LOG"
while [[ $1 == --* ]]; do case $1 in --overlap) shift ;; *) shift 2 ;; esac; done
[[ $1 == hostname ]] && echo 10.1.0.1 && exit
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
[[ $1 == show ]] && printf 'node1\\nnode2\\n' && exit
echo "scontrol $*" >>"$LOG"
"""
RAY = """#!/usr/bin/env bash
echo "ray $*" >>"$LOG"
echo $$ >>"$PIDS"
exec sleep 600
"""
PYTHON = f"""#!/usr/bin/env bash
case $1 in
  -c) exec {sys.executable} "$@" ;;
  -) exit 0 ;;
esac
stat -c 'token %a' "$RAY_AUTH_TOKEN_PATH" >>"$LOG"
stat -c 'folder %a' "$(dirname "$RAY_AUTH_TOKEN_PATH")" >>"$LOG"
cp "$RAY_AUTH_TOKEN_PATH" "$TOKEN"
echo $$ >>"$PIDS"
echo "driver $RAY_ADDRESS $*" >>"$LOG"
[[ $END == wait ]] && exec sleep 600
exit "$END"
"""


class Job:
    """One run of the script, its standing-in programs in a folder of their own."""

    def __init__(self, folder: Path, end: str) -> None:
        self._log, self._pids, self._token = folder / "log", folder / "pids", folder / "token"
        self.private = folder / "private"
        self.private.mkdir()
        for name, content in {"srun": SRUN, "scontrol": SCONTROL, "ray": RAY, "python": PYTHON}.items():
            (folder / name).write_text(content)
            (folder / name).chmod(0o755)
        environment = os.environ | {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "REFILLED_PYTHON": str(folder / "python"),
            "REFILLED_PRIVATE": str(self.private),
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_CPUS_PER_TASK": "8",
            "SLURM_GPUS_ON_NODE": "4",
            "RAY_ADDRESS": "http://127.0.0.1:8265",
            "LOG": str(self._log),
            "PIDS": str(self._pids),
            "TOKEN": str(self._token),
            "END": end,
        }
        self.process = subprocess.Popen(
            ["bash", str(CLUSTERS / "slurm.sh"), "cifar100", "--storage", "/shared/a folder"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    @property
    def token(self) -> str:
        return self._token.read_text()

    @property
    def alive(self) -> list[int]:
        """Processes of Ray and the search that are still there."""
        return [int(pid) for pid in self._pids.read_text().split() if Path(f"/proc/{pid}").exists()]

    def until(self, pattern: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not re.search(pattern, self.log, re.MULTILINE):
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Job]]:
    jobs: list[Job] = []

    def begin(end: str) -> Job:
        jobs.append(Job(tmp_path, end))
        return jobs[-1]

    yield begin
    for job in jobs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.process.pid, signal.SIGKILL)
        job.process.communicate()


def test_search_runs_on_the_first_node_and_everything_ends_with_it(start: Callable[[str], Job]) -> None:
    job = start("0")
    output, _ = job.process.communicate(timeout=WAIT_S)
    assert job.process.returncode == 0, output
    assert "driver 10.1.0.1:6379 tune/search.py cifar100 --storage /shared/a folder\n" in job.log
    assert re.search(r"srun .*--nodelist node1 \S+/ray start .*--num-gpus 4 --head --port 6379", job.log)
    assert re.search(r"srun .*--nodelist node2 \S+/ray start .*--num-gpus 4 --address 10.1.0.1:6379\n", job.log)
    assert job.alive == []
    assert list(job.private.iterdir()) == []
    assert "requeue" not in job.log


def test_token_is_for_its_owner_only_and_is_never_shown(start: Callable[[str], Job]) -> None:
    job = start("0")
    output, _ = job.process.communicate(timeout=WAIT_S)
    lines = job.log.splitlines()  # other nodes write between them
    assert "token 600" in lines
    assert "folder 700" in lines
    assert re.fullmatch(r"[0-9a-f]{64}", job.token)
    assert job.token not in job.log + output


def test_failure_is_the_jobs_failure(start: Callable[[str], Job]) -> None:
    job = start("3")
    job.process.communicate(timeout=WAIT_S)
    assert job.process.returncode == 3
    assert job.alive == []
    assert "requeue" not in job.log


def test_signal_before_the_limit_ends_everything_and_queues_again(start: Callable[[str], Job]) -> None:
    job = start("wait")
    job.until("^driver ")
    job.process.send_signal(signal.SIGUSR1)
    output, _ = job.process.communicate(timeout=WAIT_S)
    assert job.process.returncode == 0, output
    assert job.log.count("scontrol requeue 42\n") == 1
    assert job.alive == []
    assert list(job.private.iterdir()) == []


def test_cancelling_ends_everything(start: Callable[[str], Job]) -> None:
    job = start("wait")
    job.until("^driver ")
    job.process.send_signal(signal.SIGTERM)
    job.process.communicate(timeout=WAIT_S)
    assert job.process.returncode == 143
    assert job.alive == []
    assert list(job.private.iterdir()) == []
    assert "requeue" not in job.log
