"""MPI's own shared memory, left without a name: then nothing stays when a job is killed.

Both MPIs put a segment for messages within a node into /dev/shm when they start, and take its name
away when they end in good order. A killed job leaves it there, until nobody can start one any more.
What all ranks of a node have mapped needs no name.

A name is taken from nothing but what MPI is seen to make: /dev/shm is the users' place, too, for
data sets and memory of their own. ``noted`` looks at it before and after MPI_Init, in which mpi4py
lets no other Python of the process run. Where MPI had been started before we came nobody has
looked, and all names stay.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI

_FOLDER = "/dev/shm/"

# How MPICH's and Open MPI's are called. What is called otherwise is not theirs; what is called so
# need not be.
_OF_MPI = ("mpich_shm_", "sm_segment.", "vader_segment.")

_NAME = "mpizero-before-mpi"  # of the memory in which a process shows what it had mapped before

Key = tuple[int, int]  # device and inode: a file, whatever its name


@dataclass(frozen=True)
class _Start:
    """What this process saw when it started MPI."""

    handle: int  # of the memory that shows ``before``
    before: frozenset[Key]  # was mapped
    made: frozenset[Key]  # was not there at all, and was mapped when MPI had started


_start: _Start | None = None


@contextmanager
def noted() -> Iterator[None]:
    """In here this process starts MPI: see which files of /dev/shm are made and mapped by that."""
    global _start
    before, there = frozenset(_mapped()), _there()
    handle = _show(before)
    if handle is None:
        yield
        return
    _start = _Start(handle, before, frozenset())
    try:
        yield
    finally:
        _start = _Start(handle, before, frozenset(_mapped()) - before - there)


def unname_segments(node: MPI.Intracomm) -> None:
    """Unlink the segments that all ranks of ``node`` have mapped. Collective over it.

    Those that one of them has made by starting MPI, and that none had mapped before. Not in a job
    that was spawned by another (MPI_Comm_spawn), which may still look for the name.
    """
    global _start
    from mpi4py import MPI

    start, _start = _start, None
    if start is not None:
        os.close(start.handle)
    is_child = MPI.Comm.Get_parent() != MPI.COMM_NULL
    now = {} if start is None or is_child else _mapped()
    before, made = (start.before, start.made) if start is not None else (frozenset(), frozenset())
    everyones: list[tuple[dict[Key, str], frozenset[Key], frozenset[Key]]] = node.allgather(
        (now, before, made)
    )
    if node.rank == 0:
        by_all = set.intersection(*(set(each) for each, _, _ in everyones))
        by_mpi = frozenset().union(*(each for _, _, each in everyones))
        earlier = frozenset().union(*(each for _, each, _ in everyones))
        for key in (by_all & by_mpi) - earlier:
            _unlink(now[key], key)


def remove_segments(pid: int) -> None:
    """Unlink what a process, which is about to be killed, has of them: while MPI starts.

    Nothing of a process that has not shown what it had mapped before.
    """
    before = _shown(pid)
    if before is not None:
        for key, path in _mapped(pid).items():
            if key not in before:
                _unlink(path, key)


def _unlink(path: str, key: Key) -> None:
    """Take the name from a file that MPI has made, if it is still that file's."""
    with suppress(OSError):
        found = os.stat(path, follow_symlinks=False)
        if (
            path.removeprefix(_FOLDER).startswith(_OF_MPI)
            and (found.st_dev, found.st_ino) == key
            and stat.S_ISREG(found.st_mode)
            and found.st_uid == os.geteuid()
        ):
            os.unlink(path)


def _mapped(pid: int | str = "self") -> dict[Key, str]:
    """The files of /dev/shm that a process maps, and what they are, or were, called."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        return {}
    found = {}
    for line in lines:
        fields = line.split(None, 5)
        if len(fields) == 6 and fields[5].startswith(_FOLDER):
            major, minor = fields[3].split(":")
            found[os.makedev(int(major, 16), int(minor, 16)), int(fields[4])] = fields[5]
    return found


def _there() -> frozenset[Key]:
    """What there is in /dev/shm, of whomever."""
    try:
        device = os.stat(_FOLDER).st_dev
        with os.scandir(_FOLDER) as entries:
            return frozenset((device, each.inode()) for each in entries)
    except OSError:
        return frozenset()


def _show(keys: frozenset[Key]) -> int | None:
    """Put it into memory that other processes of this user can read; None where there is none."""
    try:
        handle = os.memfd_create(_NAME)
    except (AttributeError, OSError):  # not Linux
        return None
    os.write(handle, "".join(f"{device} {inode}\n" for device, inode in keys).encode())
    return handle


def _shown(pid: int) -> frozenset[Key] | None:
    """What a process has shown; None if it has not, or is past it, or cannot be seen."""
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if f"memfd:{_NAME}" in os.readlink(link):
                pairs = (line.split() for line in link.read_text().splitlines())
                return frozenset((int(device), int(inode)) for device, inode in pairs)
    except (OSError, ValueError):  # it has ended, or is another user's
        pass
    return None
