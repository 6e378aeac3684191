"""A real MLflow server that tests kill and start again, and a gate before it that hangs, refuses or loses answers."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

Answer = Literal["pass", "refuse", "hang", "lose"]
START_S = 120.0


class Server:
    """`mlflow server` on a SQLite file, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        options = ["--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db", "--workers", "1"]
        options += ["--artifacts-destination", str(self._folder / "artifacts"), "--port", str(self.port)]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *options],
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            time.sleep(0.1)
        raise TimeoutError((self._folder / "server.log").read_text())

    def kill(self) -> None:
        """SIGKILL to all of its processes."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class Gate:
    """Stands before a server; `answer` decides by method and path what becomes of a request.

    pass: the server answers. refuse: status 500. hang: no answer, and the server hears nothing. lose: the server does
    what is asked, and its answer is lost.
    """

    def __init__(self, port: int) -> None:
        self.answer: Callable[[str, str], Answer] = lambda method, path: "pass"
        self.num_passed = 0
        self._is_open = threading.Event()
        gate = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def _serve(self) -> None:
                answer = gate.answer(self.command, self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.close_connection = True
                if answer in ("pass", "lose"):
                    gate.num_passed += 1
                    backend = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                    headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
                    backend.request(self.command, self.path, body, headers)
                    reply = backend.getresponse()
                    status, content = reply.status, reply.read()
                    backend.close()
                else:
                    status, content = 500, b"{}"
                if answer in ("hang", "lose"):
                    gate._is_open.wait(60)
                    return
                with contextlib.suppress(OSError):  # the client gave up
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815  (the names http.server calls)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def always(self, answer: Answer) -> None:
        """From now on every request has this answer."""
        self.answer = lambda method, path: answer

    def close(self) -> None:
        """Let hanging requests go."""
        self._is_open.set()
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def cut_off_driver(
    gate: Gate, script: str, *arguments: str, environment: dict[str, str] | None = None
) -> Iterator[None]:
    """A driver that MLflow refuses from its first words on, killed without warning when the block ends.

    Args:
        gate: Before the server.
        script: Prints "started", waits for a line, works, prints "told", and waits again.
        arguments: Of the script, behind the gate's address.
        environment: Of its process.
    """
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), gate.uri, *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdin is not None
    assert driver.stdout is not None
    try:
        assert driver.stdout.readline() == "started\n"
        gate.always("refuse")
        driver.stdin.write("\n")
        driver.stdin.flush()
        assert driver.stdout.readline() == "told\n"
        yield
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.communicate()
