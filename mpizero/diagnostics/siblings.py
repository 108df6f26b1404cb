"""The processes that the launcher has started on this node: found without MPI.

Each is the child of a process of the launcher's, which has no place among the ranks itself: so it
is told by its environment. A shell between the two does no harm.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mpizero.diagnostics.process import GONE, parent_of, state_of
from mpizero.diagnostics.record import NAME

# The ranks' numbers, and how many of them a node has, as launchers tell their ranks.
_RANK = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
_LOCAL_SIZE = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")

_LIBRARIES = ("libmpi.so", "libmpich.so", "libmpi_abi.so")


@dataclass(frozen=True)
class Sibling:
    """A rank of this node, or the shell that it was started by."""

    rank: int
    pid: int
    state: str
    has_come: bool  # to init(), or starts MPI on its own


def local_size() -> int | None:
    """How many ranks the launcher has started here; None where it does not say."""
    for name in _LOCAL_SIZE:
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return None


def launcher() -> int | None:
    """The process of the launcher's that has started this rank; None where that cannot be seen."""
    above = os.getpid()
    if _rank_of(above) is None:
        return None
    while _rank_of(above) is not None:
        above = parent_of(above)
    return above or None


def siblings() -> list[Sibling]:
    """The ranks of this node that are there, this one too; [] where the system does not show them.

    In the order of their ranks. What has ended is not among them.
    """
    above = launcher()
    if above is None:
        return []
    found = []
    for pid in _children_of(above):
        rank, state = _rank_of(pid), state_of(pid)
        if rank is not None and state != GONE:
            found.append(Sibling(rank, pid, state, _has_come(pid)))
    return sorted(found, key=lambda each: each.rank)


def _children_of(pid: int) -> list[int]:
    try:
        lists = [each.read_text() for each in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        lists = []
    if lists:
        return [int(child) for each in lists for child in each.split()]
    # A kernel that does not list them: look at every process.
    everyone = (int(folder.name) for folder in Path("/proc").glob("[0-9]*"))
    return [each for each in everyone if parent_of(each) == pid]


def _rank_of(pid: int) -> int | None:
    """None for what is no rank, has ended, or is another user's."""
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    given = dict(pair.split(b"=", 1) for pair in pairs if b"=" in pair)
    for name in _RANK:
        text = given.get(name.encode(), b"")
        if text.isdigit():
            return int(text)
    return None


def _has_come(pid: int) -> bool:
    """Does it keep a record, as a process does that has called init()? Has it an MPI library?"""
    folder = Path(f"/proc/{pid}")
    try:
        links = (folder / "fd").iterdir()
        if any(f"memfd:{NAME}" in os.readlink(link) for link in links):
            return True
        return any(f"/{library}" in (folder / "maps").read_text() for library in _LIBRARIES)
    except OSError:
        return False
