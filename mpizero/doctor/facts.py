"""What the doctor knows: plain values, which travel between ranks and into JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """The GPU that a rank is bound to. ``numa``: the NUMA node it hangs on, if that is known."""

    name: str
    address: str  # on the PCI bus: the same for two ranks that share it
    numa: int | None = None


@dataclass(frozen=True)
class RankFacts:
    """One process, and the host that it is on. Sizes in bytes; every list sorted."""

    host: str
    rank: int = 0  # in MPI's world; the launcher's where MPI does not run
    cores: tuple[int, ...] = ()  # that it may run on, as the kernel numbers hardware threads
    physical: tuple[int, ...] = ()  # for each of them, the first hardware thread of its core
    numa: tuple[int, ...] = ()  # the NUMA nodes of its cores
    host_cores: int = 1  # that the host has
    variables: Mapping[str, str] = field(default_factory=dict)  # those that matter here
    versions: Mapping[str, str] = field(default_factory=dict)  # of python, mpizero, numpy, ...
    shm_size: int | None = None
    shm_free: int | None = None
    host_gpus: int = 0  # that the host has, whether or not this process may use them
    gpu: Gpu | None = None
    fast_network: tuple[str, ...] = ()  # devices that bypass TCP: InfiniBand, Slingshot, EFA, ...
    interfaces: tuple[str, ...] = ()  # of the kernel's network that are up, less the loopback
    clocks: tuple[float, ...] = ()  # seconds since the epoch, right after barriers of all ranks

    def to_json(self) -> str:
        """Text for another rank: hosts with different versions still understand each other."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RankFacts:
        """What ``to_json`` gave, also in another version of mpizero."""
        document: dict[str, Any] = json.loads(text)
        known = {each.name for each in fields(cls)}
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in document.items()
            if name in known
        }
        if document.get("gpu"):
            values["gpu"] = Gpu(**document["gpu"])
        return cls(**values)


@dataclass(frozen=True)
class Launcher:
    """Who started this process, and the commands that could have."""

    name: str = ""  # "" for a plain python
    rank: int = 0
    size: int | None = None  # None if it did not say
    found: Mapping[str, str] = field(default_factory=dict)  # mpirun, srun, ...: where they are
    mpirun_says: str = ""  # of its version

    @property
    def alone(self) -> bool:
        """Plain python, also in a shell of a Slurm job: nothing has started this as a rank."""
        return self.name in ("", "a Slurm allocation")


@dataclass(frozen=True)
class Mpi:
    """The MPI library, and how it started. ``error``: what went wrong there, if anything."""

    error: str = ""
    trial: str = ""  # why it does not start in a process without a launcher, if it does not
    loaded: bool = True  # False: no library could be loaded at all
    started: bool = False
    library: str = ""  # the first line of its own version text
    path: str = ""  # of the libmpi; "" where the system does not tell
    mpi4py: str = ""
    wheels: tuple[str, ...] = ()  # "mpich 5.0.2": those of this environment that carry an MPI
    size: int = 1
    nodes: int = 1  # groups of ranks that share memory, as MPI says
    thread_level: str = ""
    built_for_cuda: bool | None = None  # what it says of itself (MPIX_Query_cuda_support)
    cuda_aware: bool = False  # what a transfer of device memory has shown
    cuda_reason: str = ""
    nccl_reason: str = ""  # why data does not go from GPU to GPU by NCCL; "": it does


@dataclass(frozen=True)
class Timings:
    """A quick measurement, all ranks at once. ``bytes`` is the large array's size."""

    small_bytes: int
    small_seconds: float  # an all-reduce of the small array
    bytes: int
    seconds: float  # an all-reduce of the large array
    copy_seconds: float  # the slowest rank's copy of as much, within its own memory
    correct: bool


@dataclass(frozen=True)
class Facts:
    """All that is judged: every rank that could be asked, the launcher, MPI, and times."""

    ranks: tuple[RankFacts, ...]
    launcher: Launcher = Launcher()
    mpi: Mpi = Mpi()
    timings: Timings | None = None

    @property
    def hosts(self) -> dict[str, list[RankFacts]]:
        """The ranks of each host, in the order of first ranks."""
        found: dict[str, list[RankFacts]] = {}
        for rank in self.ranks:
            found.setdefault(rank.host, []).append(rank)
        return found
