"""Ray heads as a user starts them, with a token and on ports of their own, and the jobs that are submitted to one."""

from __future__ import annotations

import itertools
import os
import re
import secrets
import shutil
import subprocess
import sysconfig
import time
import venv
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from commands import LONGEST_S, QUIET_S, ROOT, EndedBadlyError, Place, free_port
from processes import belonging, kill

DECOY = "decoy"
NOT_UPLOADED = (
    ".venv",
    ".git",
    "data",
    "runs",
    "mlruns",
    "build",
    "tests",
    "refilled.egg-info",
    ".pytest_cache",
    ".hypothesis",
)


class Head(Place):
    """One Ray head; whatever has its folder open ends with it."""

    def __init__(self) -> None:
        super().__init__()
        self.port = free_port()
        self.dashboard = f"http://127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None
        self.token = secrets.token_hex(32)
        self.token_path = self.folder / "token"
        self.token_path.touch(mode=0o600)
        self.token_path.write_text(self.token)

    def __enter__(self) -> Self:
        try:
            self.set_up()
        except BaseException:
            self.__exit__(None, None, None)  # nobody else would end what is there already
            raise
        return self

    def set_up(self) -> None:
        """Start the head."""
        raise NotImplementedError

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        deadline = time.monotonic() + 30.0
        while (found := belonging(self.folder)) and time.monotonic() < deadline:  # some start others before they end
            for pid in found:
                kill(pid)
            time.sleep(0.1)
        if self._process is not None:
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        """Of a driver that joins, with the token."""
        return super().environment | {
            "RAY_ADDRESS": f"127.0.0.1:{self.port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_path),
        }

    def start(self, ray: Path, environment: Mapping[str, str], *flags: str) -> None:
        """Start the head and wait until it is there.

        Args:
            ray: the program.
            environment: of the head and its workers.
            flags: of `ray start`, beside those about ports and folders.
        """
        command = [str(ray), "start", "--head", "--block", "--disable-usage-stats", f"--port={self.port}"]
        command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={self.folder}"]
        command += [f"--dashboard-port={self.dashboard.rpartition(':')[2]}"]
        command += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
        own = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
        log = self.folder / "head.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, *flags], env=own, stdout=output, stderr=output, start_new_session=True
            )
        deadline = time.monotonic() + QUIET_S
        while "Ray runtime started" not in log.read_text(errors="replace"):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise EndedBadlyError(f"no head: {log.read_text(errors='replace')}")
            time.sleep(0.2)


class JobHead(Head):
    """A head of two CPUs whose jobs find every library but not this package, and a copy of the code to submit.

    Attributes:
        python: the jobs' interpreter.
        code: the working directory, as a user's: with files beside the code that no job needs, each named `DECOY`.
        said: what every command of `ray` printed, for whoever searches it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self.code = self.folder / "code"
        self.python = self.folder / "venv/bin/python"
        self._numbers = itertools.count()

    def set_up(self) -> None:
        """Copy the code, make the jobs' environment, start the head."""
        copy_of_the_code(self.code)
        for name in (*NOT_UPLOADED, "tune"):
            (self.code / name).mkdir(exist_ok=True)
            (self.code / name / DECOY).touch()
        self._ray = libraries_only(self.folder / "venv")
        self.start(self._ray, self.environment, "--num-cpus=2")

    @property
    def environment(self) -> dict[str, str]:
        """Of this head's commands; nothing in it leads to the package or to another token."""
        kept = {
            name: value for name, value in super().environment.items() if not name.startswith(("PYTHON", "VIRTUAL"))
        }
        path = f"{self.python.parent}:{os.environ['PATH']}"
        return kept | {"PATH": path, "HOME": str(self.folder), "RAY_ADDRESS": self.dashboard}

    @property
    def strangers(self) -> dict[str, dict[str, str]]:
        """Environments of those who do not have the token: `none` has none, `wrong` has another."""
        none = {name: value for name, value in self.environment.items() if not name.startswith("RAY_AUTH_")}
        path = self.folder / "wrong"
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
        return {"none": none, "wrong": none | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}}

    def ray(self, *words: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """A command of `ray`, given in the working directory; its output is one text, stderr included."""
        done = subprocess.run(
            [str(self._ray), *words],
            env=self.environment if environment is None else environment,
            cwd=self.code,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LONGEST_S,
            check=False,
        )
        self.said.append(done.stdout)
        return done

    def submit(self, entrypoint: str, *, wait: bool = True) -> tuple[str, subprocess.CompletedProcess[str]]:
        """Submit a job and, unless told otherwise, follow its log to its end; its name and what was printed."""
        name = f"job-{next(self._numbers)}"
        flags = [] if wait else ["--no-wait"]
        words = ["job", "submit", "--submission-id", name, *flags, "--working-dir", ".", "--"]
        return name, self.ray(*words, *entrypoint.split())

    def status(self, name: str) -> str:
        """In Ray's word, such as STOPPED."""
        text = self.ray("job", "status", name).stdout
        found = re.search(
            rf"'{name}'.*?\b(pending|running|stopped|succeeded|failed)\b", text, re.DOTALL | re.IGNORECASE
        )
        assert found, text
        return found[1].upper()

    @property
    def unpacked(self) -> list[Path]:
        """Working directories of jobs, as they arrived."""
        folder = (self.folder / "session_latest").resolve() / "runtime_resources/working_dir_files"
        return [path for path in folder.glob("_ray_pkg_*") if path.is_dir()]


def copy_of_the_code(target: Path) -> None:
    """What git would upload: every file that it knows or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in names.rstrip("\0").split("\0"):
        if (ROOT / name).is_file():  # it may be deleted and still be known
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


def libraries_only(folder: Path) -> Path:
    """Make an environment with every library of this one, but not what is installed in place; returns its `ray`."""
    venv.create(folder, symlinks=True)
    inside = {"base": str(folder), "platbase": str(folder)}
    libraries = Path(sysconfig.get_path("purelib", "venv", inside))
    for source in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for library in Path(source).iterdir():
            if not library.name.startswith(("__editable__", "__pycache__", "refilled")):
                (libraries / library.name).symlink_to(library)
    ray = folder / "bin/ray"
    ray.write_text(f"#!{folder}/bin/python\nfrom ray.scripts.scripts import main\n\nmain()\n")
    ray.chmod(0o755)
    return ray
