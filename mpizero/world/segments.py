"""MPI's own shared memory, left without a name: then nothing stays when a job is killed.

Both MPIs put a segment for messages within a node into /dev/shm when they start, and take its name
away when they end in good order. A killed job leaves it there, until nobody can start one any more.
What all ranks of a node have mapped needs no name.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mpizero.world.startup import load_mpi

if TYPE_CHECKING:
    from mpi4py import MPI

_FOLDER = "/dev/shm/"
_OF_MPI = ("mpich_shm_", "sm_segment.", "vader_segment.")  # how MPICH's and Open MPI's are called


def unname_segments(node: MPI.Intracomm) -> None:
    """Unlink the segments that all ranks of ``node`` have mapped. Collective over it.

    Not in a job that was spawned by another (MPI_Comm_spawn), which may still look for the name.
    """
    mpi = load_mpi()
    mine = set() if mpi.Comm.Get_parent() != mpi.COMM_NULL else _mapped()
    everyones: list[set[str]] = node.allgather(mine)
    if node.rank == 0:
        for path in set.intersection(*everyones):
            with suppress(OSError):
                os.unlink(path)


def remove_segments(pid: int) -> None:
    """Unlink what a process, which is about to be killed, has of them: while MPI starts."""
    for path in _mapped(pid):
        if path.removeprefix(_FOLDER).startswith(_OF_MPI):
            with suppress(OSError):
                os.unlink(path)


def _mapped(pid: int | str = "self") -> set[str]:
    """The files of /dev/shm that a process maps, and that still have a name."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:  # not Linux
        return set()
    paths = {line.split(None, 5)[5] for line in lines if _FOLDER in line}
    return {path for path in paths if path.startswith(_FOLDER) and Path(path).exists()}
