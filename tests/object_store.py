"""An S3 server on loopback, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

START_S = 60.0

# moto answers every request in a thread of its own and looks before it writes: of two that make an object only where
# there is none both might. One at a time, as a store's conditional writes are.
SERVER = """
import sys, threading
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple
from werkzeug.test import Client

app, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

def one_at_a_time(environ, start_response):
    with lock:
        return app(environ, start_response)

# The bucket is there before anybody is answered: a client that was waiting would be told that there is none.
made = Client(app).put(f"/{sys.argv[2]}", base_url=f"http://127.0.0.1:{sys.argv[1]}")
assert made.status_code == 200, made.text
run_simple("127.0.0.1", int(sys.argv[1]), one_at_a_time, threaded=True)
"""


class ObjectStore:
    """moto's S3 with one empty bucket; what is in it is gone when it ends.

    Args:
        folder: Of its log.
        checks_credentials: Whether it refuses those that it does not know, which are all.
    """

    bucket = "refilled"

    def __init__(self, folder: Path, *, checks_credentials: bool = False) -> None:
        self._folder = folder
        # How many requests, of which making the bucket is one, it takes from anybody.
        self._settings = {"INITIAL_NO_AUTH_ACTION_COUNT": "1"} if checks_credentials else {}
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
        """Returns when it listens; the bucket is there then."""
        with (self._folder / "store.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SERVER, str(self.port), self.bucket],
                env=os.environ | self.environment | self._settings,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5):
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
