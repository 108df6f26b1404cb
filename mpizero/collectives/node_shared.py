"""Collectives among the ranks of one node, by loads and stores in shared memory.

Arrays that lie in node-shared memory at the same place on every rank are reduced where they are:
a barrier, each rank combines its own slice straight out of all ranks' arrays and writes the result
back into them, a barrier. Others pass through a scratch area that all ranks map, chunk by chunk, so
that what one rank writes the others find in the shared cache.

Ordering: a barrier orders the ranks, MPI_Win_sync on both sides of it their loads and stores
(MPI 4.1, section 12.7); without it a CPU that reorders stores could show old values.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from mpizero.collectives.interface import Algorithm
from mpizero.collectives.transport import cut_evenly
from mpizero.memory.node_shared import NodeMemory, Window
from mpizero.reduction import Operation

if TYPE_CHECKING:
    from mpi4py import MPI

# Per rank and slot. Large enough to make the barrier behind each chunk cheap, small enough for all
# ranks' slots to stay in a shared cache.
SLOT_BYTES = 1 << 20

# Three slots in turn, for the three chunks that an all-reduce has under way. Whoever is a barrier
# ahead then writes where nobody reads any more.
_SLOTS = 3
# Before them: where an array lies (two integers), and how many barriers this rank has come to.
_HEADER_BYTES = 128
_COUNTER = slice(64, 72)

# Up to this size a second barrier costs more than combining the whole array on every rank.
SMALL_BYTES = 32 << 10


class NodeShared(Algorithm):
    name = "node_shared"

    def __init__(self, comm: MPI.Intracomm, memory: NodeMemory, crowded: bool) -> None:
        self._comm = comm
        self._memory = memory
        self._crowded = crowded  # more ranks than cores
        self._arrivals = 0
        self.rank, self.size = comm.rank, comm.size
        self._scratch: Window | None = None
        self._turn = 0

    def all_reduce(self, array: Any, op: Operation) -> None:
        if array.nbytes <= SMALL_BYTES:
            # Every rank combines everything: one barrier instead of two.
            op.reduce_rows(self.publish(array), array)
            return
        parts = self.counterparts(array)
        if parts is None:
            self._all_reduce_chunks(array, op)
            return
        own = cut_evenly(array.size, self.size)[self.rank]
        slices = [part[own] for part in parts]
        op.reduce_to_all(slices, slices)
        self.barrier()

    def reduce_scatter(self, array: Any, out: Any, op: Operation) -> None:
        parts = self.counterparts(array) if array.nbytes > SMALL_BYTES else None
        if parts is not None:
            own = cut_evenly(array.size, self.size)[self.rank]
            op.reduce_rows([part[own] for part in parts], out)
            self.barrier()
            return
        rows = array.reshape(self.size, -1)
        for columns in self._columns(rows):
            chunk = rows[:, columns]
            slots = self.publish(chunk)
            width = chunk.shape[1]
            mine = slice(self.rank * width, (self.rank + 1) * width)
            op.reduce_rows([slot[mine] for slot in slots], out[columns])

    def all_gather(self, block: Any, out: Any) -> None:
        rows = out.reshape(self.size, -1)
        for columns in self._columns(block.reshape(1, -1)):
            for rank, slot in enumerate(self.publish(block[columns])):
                rows[rank, columns] = slot

    def broadcast(self, array: Any, root: int) -> None:
        for columns in self._columns(array.reshape(1, -1)):
            slots = self.publish(array[columns], only=root)
            if self.rank != root:
                array[columns] = slots[root]

    def all_to_all(self, array: Any, out: Any) -> None:
        rows, results = array.reshape(self.size, -1), out.reshape(self.size, -1)
        for columns in self._columns(rows):
            chunk = rows[:, columns]
            for rank, slot in enumerate(self.publish(chunk)):
                results[rank, columns] = slot.reshape(chunk.shape)[self.rank]

    def _all_reduce_chunks(self, array: Any, op: Operation) -> None:
        """In each step publish a chunk, combine one's slice of the last, fetch the one before."""
        width = SLOT_BYTES // array.itemsize
        chunks = [array[start : start + width] for start in range(0, array.size, width)]
        published: list[list[Any]] = []
        for step in range(len(chunks) + 2):
            if step < len(chunks):
                published.append(self._place(chunks[step]))
            if 1 <= step <= len(chunks):
                slots = published[step - 1]
                own = cut_evenly(slots[0].size, self.size)[self.rank]
                op.reduce_rows([slot[own] for slot in slots], slots[self.rank][own])
            if step >= 2:
                slots = published[step - 2]
                for rank, part in enumerate(cut_evenly(slots[0].size, self.size)):
                    chunks[step - 2][part] = slots[rank][part]
            self.barrier()

    def counterparts(self, array: Any) -> list[Any] | None:
        """All ranks' arrays, after a barrier, if they lie at the same place in shared memory."""
        place = self._memory.find(array)
        window, number, offset = place if place is not None else (None, -1, 0)
        header = self._scratch_window().own[: 2 * 8].view(np.int64)
        header[0], header[1] = number, offset
        self.barrier()
        theirs = [part[: 2 * 8].view(np.int64) for part in self._scratch_window().parts]
        if window is None or any(h[0] != number or h[1] != offset for h in theirs):
            return None
        end = offset + array.nbytes
        return [part[offset:end].view(array.dtype) for part in window.parts]

    def publish(self, block: Any, only: int | None = None) -> list[Any]:
        """Show ``block`` to the other ranks; returns every rank's."""
        slots = self._place(block, only)
        self.barrier()
        return slots

    def _place(self, block: Any, only: int | None = None) -> list[Any]:
        """Write ``block`` into this rank's next slot; returns every rank's, of the same form."""
        slots = self.slots(block.size, block.dtype)
        if only is None or only == self.rank:
            slots[self.rank].reshape(block.shape)[...] = block
        return slots

    def slots(self, count: int, dtype: Any) -> list[Any]:
        """The next slot of every rank, as 1-D arrays of ``count`` elements."""
        start = _HEADER_BYTES + self._turn * SLOT_BYTES
        self._turn = (self._turn + 1) % _SLOTS
        stop = start + count * np.dtype(dtype).itemsize
        return [part[start:stop].view(dtype) for part in self._scratch_window().parts]

    def _columns(self, rows: Any) -> Iterator[slice]:
        """Column ranges of ``rows`` that fit a slot."""
        width = max(1, SLOT_BYTES // (rows.shape[0] * rows.itemsize))
        for start in range(0, rows.shape[1], width):
            yield slice(start, min(start + width, rows.shape[1]))

    def _scratch_window(self) -> Window:
        if self._scratch is None:
            self._scratch = Window(self._comm, _HEADER_BYTES + _SLOTS * SLOT_BYTES)
        return self._scratch

    def barrier(self) -> None:
        """Wait for the node's ranks; what each has stored before, all see after."""
        window = self._scratch_window()
        window.sync()
        if self._crowded:
            self._yielding_barrier(window)
        else:
            self._comm.Barrier()
        window.sync()

    def _yielding_barrier(self, window: Window) -> None:
        """Count arrivals in shared memory, and give the core away while others have not come.

        MPI's barriers spin: where ranks outnumber cores, a rank that waits burns the time slice of
        the one that it waits for (MPICH, 4 ranks on 2 cores: milliseconds for each small call, as
        ``mpizero bench --to 4K`` shows).
        """
        self._arrivals += 1
        counters = [part[_COUNTER].view(np.int64) for part in window.parts]
        counters[self.rank][0] = self._arrivals  # aligned 8 bytes: stored at once
        for counter in counters:
            while counter[0] < self._arrivals:
                os.sched_yield()
