"""What a benchmark ran on: a figure without that says nothing."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

from mpi4py import MPI


def describe() -> dict[str, str]:
    """CPU, cores, memory, system, and the versions that matter."""
    library = MPI.Get_library_version().strip("\0 \n").splitlines()[0].split(",")[0]
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{int(_field('/proc/meminfo', 'MemTotal').split()[0] or 0) >> 20} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "mpi": " ".join(library.split()),
        **{name: version(name) for name in ("mpi4py", "numpy", "torch")},
        "python": platform.python_version(),
    }


def _field(file: str, name: str) -> str:
    path = Path(file)
    for line in path.read_text().splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "0"
