"""Node-shared memory: flat arrays that every rank of a node can read and write.

A node is one memory. MPI-3 shared windows (MPI 4.1, section 12.2.3) give each rank a part of
its own in a segment that all ranks of the node map, so that what one rank writes the others read
where it lies: nothing is packed, sent or unpacked.
"""

from __future__ import annotations

import atexit
import bisect
import os
import shutil
import warnings
import weakref
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mpizero.memory.shared_file import SharedFile
from mpizero.world import holdings
from mpizero.world.startup import load_mpi
from mpizero.world.survival import lifeline

if TYPE_CHECKING:
    from mpi4py import MPI

PAGE = 4096
_SHM = "/dev/shm"

NOWHERE = -1  # the spot of private memory

# A spot is the number of a window and an offset in it, in one integer.
_OFFSET_BITS = 44

# Left free when memory is taken: MPI's own segments and other programs live there too.
_SHM_RESERVE = 16 << 20


# What has not been freed, in the order of creation, which ranks have in common. Open MPI frees what
# is left itself, in the order of numbers that each rank gives for itself, and every window waits
# for the others' ranks: a job that had freed some and made others then never ended.
_alive: dict[int, Window] = {}
_process = os.getpid()


class Window:
    """One shared allocation: ``parts[r]`` is the part of the node's rank r, as bytes.

    With ``common`` there is one part only, which is every rank's own.
    """

    def __init__(self, comm: MPI.Intracomm, nbytes: int, common: bool = False) -> None:
        mpi = load_mpi()
        info = mpi.Info.Create()
        # Parts on pages of their own, which the operating system places near the rank that
        # touches them first.
        info.Set("alloc_shared_noncontig", "true")
        rounded = max(1, -(-nbytes // PAGE)) * PAGE
        self._owner = 0 if common else comm.rank
        mine = rounded if self._owner == comm.rank else 0
        self._win = mpi.Win.Allocate_shared(mine, 1, info, comm)
        info.Free()
        # One epoch for the window's whole life: loads and stores need no more than Win_sync.
        self._win.Lock_all(mpi.MODE_NOCHECK)
        self.parts = tuple(
            np.frombuffer(self._win.Shared_query(rank)[0], np.uint8)[:nbytes]
            for rank in range(1 if common else comm.size)
        )
        self.own = self.parts[self._owner]
        self.address = self.own.ctypes.data
        self._nbytes = nbytes
        # Order this rank's loads and stores before and after (MPI_Win_sync). On CPUs that reorder
        # stores (Arm, POWER) another rank could be told of a value and still read the old one
        # (MPI 4.1, section 12.7).
        self.sync = self._win.Sync
        _alive[id(self)] = self

    def lend(self) -> Any:
        """This rank's part as an array of its own: it lives as long as any view of it."""
        return np.frombuffer(self._win.Shared_query(self._owner)[0], np.uint8)[: self._nbytes]

    def free(self) -> None:
        """Give the memory back. Collective over the node; its arrays must not be used any more."""
        del _alive[id(self)]
        self.parts, self.own = (), np.empty(0, np.uint8)
        self._win.Unlock_all()
        self._win.Free()


Shared = Window | SharedFile


def open_shared(comm: MPI.Intracomm, nbytes: int, common: bool = False) -> Shared:
    """Memory that the ranks of a node share, of the kind that this job can have. Collective."""
    return (Window if lifeline() is None else SharedFile)(comm, nbytes, common)


class NodeMemory:
    """Allocates arrays in shared windows of a node, and finds the other ranks' counterparts.

    A window is held (see ``holdings``) for as long as a rank has arrays in it. ``ranks``: the
    numbers in the job of those of ``comm``; ``name``: one that is theirs alone.
    """

    def __init__(self, comm: MPI.Intracomm, name: holdings.Name, ranks: Sequence[int]) -> None:
        self.comm = comm
        self._name, self._ranks = name, ranks
        self._windows: dict[int, Shared] = {}  # by number, the same on all ranks of the node
        self._own: list[Shared] = []  # no arrays: whoever asked for them has them until the end
        self._next = 0
        # (address of the own part, number), sorted. Replaced, never changed: the progress thread
        # may be looking for an array while this one allocates.
        self._places: tuple[tuple[int, int], ...] = ()
        self._warned = False

    def allocate(self, count: int, dtype: Any) -> Any:
        """A zeroed 1-D array in node-shared memory; collective over the node.

        Where /dev/shm has no room for the parts of all ranks, an array in private memory, with a
        warning the first time.
        """
        holdings.settle(self.comm, self._ranks)
        nbytes = count * np.dtype(dtype).itemsize
        if nbytes == 0 or not self._has_room(nbytes):
            return np.zeros(count, dtype)
        window = open_shared(self.comm, nbytes)
        window.own[...] = 0  # first touch by the owner
        number = self._keep(window)
        self._places = tuple(sorted([*self._places, (window.address, number)]))
        return self._lend(window, number, dtype)

    def allocate_common(self, count: int, dtype: Any) -> Any:
        """A 1-D array, zero to begin with, that is one and the same for all ranks of the node.

        Collective over the node. None where there is no room, with a warning the first time.
        Its pages lie near the ranks that write to them first.
        """
        holdings.settle(self.comm, self._ranks)
        nbytes = count * np.dtype(dtype).itemsize
        if not self._has_room(nbytes if self.comm.rank == 0 else 0):
            return None
        window = open_shared(self.comm, nbytes, common=True)  # new pages are zero
        return self._lend(window, self._keep(window), dtype)

    def window(self, nbytes: int, share: float = 1.0) -> Shared | None:
        """A window until ``close``; None if it would take more than ``share`` of the room.

        Collective.
        """
        if self._lacking(nbytes, share) is not None:
            return None
        self._own.append(open_shared(self.comm, nbytes))
        return self._own[-1]

    def spot(self, array: Any) -> int:
        """Where a contiguous array lies in node-shared memory, as one integer; else ``NOWHERE``.

        Ranks whose arrays are each other's counterparts get the same.
        """
        places = self._places
        if not places or not isinstance(array, np.ndarray):
            return NOWHERE
        address = array.ctypes.data
        at = bisect.bisect(places, (address, self._next)) - 1
        if at < 0:
            return NOWHERE
        start, number = places[at]
        offset = address - start
        if offset + array.nbytes > self._windows[number].own.nbytes:
            return NOWHERE
        return number << _OFFSET_BITS | offset

    def counterparts(self, array: Any, spot: int) -> list[Any]:
        """All ranks' arrays of the form of ``array`` at a spot that all have agreed upon."""
        offset = spot & ((1 << _OFFSET_BITS) - 1)
        end, dtype = offset + array.nbytes, array.dtype
        parts = self._windows[spot >> _OFFSET_BITS].parts
        return [part[offset:end].view(dtype) for part in parts]

    def close(self) -> None:
        """Free what has no arrays. Collective over the node.

        Arrays stay where they are, and what they hold is given back like anything else.
        """
        while self._own:
            self._own.pop().free()

    def abandon(self) -> None:
        """Let go of it all, without the other ranks. What arrays are in use keeps its memory."""
        self._windows, self._places, self._own = {}, (), []

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's parts."""
        return sum(window.own.nbytes for window in self._windows.values())

    def _keep(self, window: Shared) -> int:
        number, self._next = self._next, self._next + 1
        self._windows[number] = window
        return number

    def _lend(self, window: Shared, number: int, dtype: Any) -> Any:
        array = window.lend().view(dtype)
        name = (*self._name, number)
        holdings.keep(name, self._ranks, partial(self._free, number))
        # Views refer to the array that they derive from in the end: when it dies, all have.
        weakref.finalize(array.base, holdings.let_go, name).atexit = False
        return array

    def _has_room(self, nbytes: int) -> bool:
        lacking = self._lacking(nbytes)
        if lacking is not None:
            self._warn(lacking)
        return lacking is None

    def _free(self, number: int) -> None:
        window = self._windows.pop(number)
        self._places = tuple(place for place in self._places if place[1] != number)
        window.free()

    def _lacking(self, nbytes: int, share: float = 1.0) -> tuple[int, int] | None:
        """``_fits``, once all that can be is given back."""
        lacking = self._fits(nbytes, share)
        if lacking is not None:
            holdings.settle(self.comm, self._ranks, thoroughly=True)
            lacking = self._fits(nbytes, share)
        return lacking

    def _fits(self, nbytes: int, share: float = 1.0) -> tuple[int, int] | None:
        """None if ``share`` of the room is enough for all ranks' parts; else (free, needed) bytes.

        The node's first rank looks, so that all say the same.
        """
        free: int | None = self.comm.bcast(_free_shared_memory())
        needed = sum(self.comm.allgather(nbytes)) + PAGE * self.comm.size
        if free is None or needed <= (free - _SHM_RESERVE) * share:
            return None
        return free, needed

    def _warn(self, lacking: tuple[int, int]) -> None:
        free, needed = lacking
        if not self._warned and self.comm.rank == 0:
            warnings.warn(
                f"{_SHM} has {free >> 20} MiB free, of which {_SHM_RESERVE >> 20} MiB are left to "
                f"MPI and others, and {needed >> 20} MiB are needed for "
                "node-shared memory; going on with private memory, which is slower. To raise it: "
                "docker run --shm-size=8g, podman the same, Apptainer binds the host's, or "
                f"`mount -o remount,size=50% {_SHM}`.",
                RuntimeWarning,
                stacklevel=5,
            )
        self._warned = True


@atexit.register  # when this is imported, so that what others do at exit still finds its arrays
def _free_all() -> None:
    """Collective, as MPI's own end is, which follows (unless the user has called it)."""
    if os.getpid() != _process:  # a fork's end
        return
    while _alive and not load_mpi().Is_finalized():
        next(iter(_alive.values())).free()


def _free_shared_memory() -> int | None:
    """Bytes free where MPI puts shared segments; None where there is no such place (not Linux)."""
    override = os.environ.get("MPIZERO_SHM_FREE")  # for trying what happens when it is small
    if override:
        return int(override)
    if lifeline() is not None:  # files without a name lie nowhere
        return None
    try:
        return shutil.disk_usage(_SHM).free
    except OSError:
        return None
