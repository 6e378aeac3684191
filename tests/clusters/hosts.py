"""Several hosts on one machine: network namespaces with an address each, on one switch."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

INTERFACE = "eth0"
_ETC = Path("/etc/netns")  # what `ip netns exec` lays over /etc


def missing() -> str:
    """Why there can be no hosts here, or nothing."""
    if shutil.which("ip") is None:
        return "needs the command ip (Debian: iproute2)"
    if os.getuid() != 0:
        return "needs root, to make network namespaces"
    probe = f"rf-{uuid.uuid4().hex[:8]}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode != 0:
        return "needs a kernel and a sandbox that allow network namespaces"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return ""


class Hosts:
    """`num` hosts, 10.77.0.1 and on, that reach each other and nothing else. They share files and processes' ids."""

    def __init__(self, num: int) -> None:
        mark = uuid.uuid4().hex[:6]
        self._switch = f"rf-{mark}-switch"
        self._names = [f"rf-{mark}-{number}" for number in range(num)]

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove()

    def address(self, number: int) -> str:
        """Of a host."""
        return f"10.77.0.{number + 1}"

    def on(self, number: int) -> list[str]:
        """What a command begins with that is to run on a host; its process is that of the command."""
        return ["ip", "netns", "exec", self._names[number]]

    def namespace(self, number: int) -> int:
        """What `os.stat` says of a host's network: its inode, as in /proc/PID/ns/net."""
        return os.stat(f"/run/netns/{self._names[number]}").st_ino

    def _make(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge", "up")
        for number, name in enumerate(self._names):
            _ip("netns", "add", name)
            port = f"port{number}"
            _ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", name)
            _ip("-n", self._switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"{self.address(number)}/24", "dev", INTERFACE)
            for link in ("lo", INTERFACE):
                _ip("-n", name, "link", "set", link, "up")
            _ip("-n", name, "route", "add", "default", "dev", INTERFACE)
            (_ETC / name).mkdir(parents=True)
            # As on Debian: the host's own name is no address that others reach.
            (_ETC / name / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()}\n")

    def _remove(self) -> None:
        for name in (*self._names, self._switch):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
            shutil.rmtree(_ETC / name, ignore_errors=True)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
