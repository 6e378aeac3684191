"""An S3 server on loopback, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

START_S = 60.0


class ObjectStore:
    """moto's S3 with one empty bucket; what is in it is gone when it ends."""

    bucket = "refilled"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What lets clients find it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Returns when the bucket is there."""
        with (self._folder / "store.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
                env=os.environ | self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        request = urllib.request.Request(f"{self.environment['AWS_ENDPOINT_URL']}/{self.bucket}", method="PUT")
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(request, timeout=5):
                return
            time.sleep(0.1)
        raise TimeoutError((self._folder / "store.log").read_text())

    def requests(self) -> list[str]:
        """The requests so far, such as `PUT /bucket/folder/file`."""
        lines = (self._folder / "store.log").read_text(errors="replace").splitlines()
        found = [line.partition('"')[2].partition(" HTTP/")[0] for line in lines if " HTTP/" in line]
        return [request.replace("\x1b[35m\x1b[1m", "").replace("\x1b[33m", "") for request in found]

    def pause(self) -> None:
        """Let it answer nobody."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it answer again."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGCONT)

    def stop(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
