"""The line that says on which machine a benchmark ran."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def machine_line(threads: int) -> str:
    """Processor, cores, threads used and versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = models[0] if models else model
    python = platform.python_version()
    return f"{model}, {os.cpu_count()} cores, {threads} thread(s), torch {torch.__version__}, Python {python}"
