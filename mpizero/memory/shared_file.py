"""Node-shared memory without MPI's windows, for jobs that survive the death of a rank.

Making or freeing a window is collective over communicators of MPI's own, which nobody can revoke:
a rank that dies in between leaves the others waiting for ever. So such jobs map a file that has no
name (memfd, Linux): it is gone when the last rank that maps it is, whoever dies and when, and a
rank's part of it outlives the rank.
"""

from __future__ import annotations

import mmap
import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from mpizero.errors import LaunchError

if TYPE_CHECKING:
    from mpi4py import MPI

PAGE = 4096

_lock = threading.Lock()


class SharedFile:
    """One shared allocation: ``parts[r]`` is the part of the node's rank r, as bytes, zeroed.

    Like ``node_shared.Window``, whose place it takes. With ``common`` there is one part only, which
    is every rank's own. Making one is collective; it is given back when no array of it is left.
    """

    def __init__(self, comm: MPI.Intracomm, nbytes: int, common: bool = False) -> None:
        rounded = max(1, -(-nbytes // PAGE)) * PAGE
        sizes = comm.allgather(rounded)
        if common:
            sizes = sizes[:1]
        self._map = _map_together(comm, sum(sizes))
        starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
        whole = np.frombuffer(self._map, np.uint8)
        self.parts = tuple(whole[start : start + nbytes] for start in starts)
        self._owner = 0 if common else comm.rank
        self._place = slice(starts[self._owner], starts[self._owner] + nbytes)
        self.own = self.parts[self._owner]
        self.address = self.own.ctypes.data
        self.sync = fence

    def lend(self) -> Any:
        """This rank's part as an array of its own: it lives as long as any view of it."""
        return np.frombuffer(self._map, np.uint8)[self._place]

    def free(self) -> None:
        """Let go of it; its arrays must not be used any more."""
        self.parts, self.own = (), np.empty(0, np.uint8)


def fence() -> None:
    """Order this rank's loads and stores before and after, as MPI_Win_sync does.

    What precedes the release of a lock comes before what follows its next acquisition, on all CPUs:
    so nothing passes both.
    """
    _lock.acquire()
    _lock.release()
    _lock.acquire()
    _lock.release()


def _map_together(comm: MPI.Intracomm, nbytes: int) -> mmap.mmap:
    """Map one and the same memory on all ranks of ``comm``, which are of one node."""
    handle, trouble, found = -1, "", None
    if comm.rank == 0:
        try:
            handle = os.memfd_create("mpizero")
            os.truncate(handle, nbytes)
        except (OSError, AttributeError) as error:
            trouble = str(error)
    place = comm.bcast(f"/proc/{os.getpid()}/fd/{handle}")
    try:
        if not trouble:
            own = handle if comm.rank == 0 else os.open(place, os.O_RDWR | os.O_CLOEXEC)
            try:
                found = mmap.mmap(own, nbytes)
            finally:
                if comm.rank != 0:
                    os.close(own)
    except OSError as error:
        trouble = str(error)
    troubles = [each for each in comm.allgather(trouble) if each]  # all have opened it, or tried
    if handle >= 0:
        os.close(handle)
    if troubles or found is None:
        raise LaunchError(
            f"the ranks of a node cannot share memory: {'; '.join(troubles)}. init(elastic=True) "
            "needs Linux, and ranks that see each other's processes (one container a node)."
        )
    return found
