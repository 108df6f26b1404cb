"""Collectives among the ranks of one node, by loads and stores in shared memory.

Arrays that lie in node-shared memory at the same place on every rank are reduced where they are:
when all are ready, each rank combines its own slice straight out of all ranks' arrays and writes
the result back into them. Small arrays travel with the note that says that they are there. Others
pass through a scratch area that all ranks map, chunk by chunk, so that what one rank writes the
others find in the shared cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpizero.collectives.interface import Algorithm
from mpizero.collectives.transport import cut_evenly
from mpizero.memory.board import PAYLOAD_BYTES, Board, Page
from mpizero.memory.node_shared import NOWHERE, NodeMemory, Window
from mpizero.reduction import Operation

if TYPE_CHECKING:
    from mpi4py import MPI

# Per rank and slot. Large enough to make the barrier behind each chunk cheap, small enough for all
# ranks' slots to stay in a shared cache. Where there is no room for them, smaller ones.
SLOT_BYTES = (1 << 20, 64 << 10, 8 << 10)

# Three slots in turn, for the three chunks that an all-reduce has under way. Whoever is a barrier
# ahead then writes where nobody reads any more.
_SLOTS = 3


class NodeShared(Algorithm):
    name = "node_shared"

    def __init__(self, comm: MPI.Intracomm, memory: NodeMemory, board: Board) -> None:
        self._comm = comm
        self._memory = memory
        self._board = board
        self.rank, self.size = comm.rank, comm.size
        self._scratch: Window | None = None
        self._turn = 0

    def all_reduce(self, array: Any, op: Operation) -> None:
        if array.nbytes <= PAYLOAD_BYTES:
            # Every rank combines everything: one step instead of two.
            op.reduce_rows(self._post(array), array)
            return
        parts = self.counterparts(array)
        if parts is None:
            self._all_reduce_chunks(array, op)
        else:
            self.all_reduce_parts(parts, op)

    def all_reduce_parts(self, parts: Sequence[Any], op: Operation) -> None:
        """All-reduce of ``parts``, the arrays of all ranks, which are ready to be read."""
        own = cut_evenly(parts[0].size, self.size)[self.rank]
        slices = [part[own] for part in parts]
        op.reduce_to_all(slices, slices)
        self.barrier()

    def reduce_scatter(self, array: Any, out: Any, op: Operation) -> None:
        parts = self.counterparts(array) if array.nbytes > PAYLOAD_BYTES else None
        if parts is not None:
            self.reduce_scatter_parts(parts, out, op)
            return
        rows = array.reshape(self.size, -1)
        for columns in self._columns(rows):
            chunk = rows[:, columns]
            slots = self.publish(chunk)
            width = chunk.shape[1]
            mine = slice(self.rank * width, (self.rank + 1) * width)
            op.reduce_rows([slot[mine] for slot in slots], out[columns])

    def reduce_scatter_parts(self, parts: Sequence[Any], out: Any, op: Operation) -> None:
        """Reduce-scatter of ``parts``, the arrays of all ranks, which are ready to be read."""
        own = cut_evenly(parts[0].size, self.size)[self.rank]
        op.reduce_rows([part[own] for part in parts], out)
        self.barrier()

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
        width = self.slot_bytes // array.itemsize
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

    def spot(self, array: Any) -> int:
        """Where ``array`` lies in node-shared memory; nowhere if it is small: its bytes travel."""
        return self._memory.spot(array) if array.nbytes > PAYLOAD_BYTES else NOWHERE

    def counterparts(self, array: Any) -> list[Any] | None:
        """All ranks' arrays, ready to be read, if they lie at the same spot of shared memory."""
        spot = self.spot(array)
        notes = self._board.exchange(0, spot).notes
        if spot == NOWHERE or any(note[2] != spot for note in notes):
            return None
        return self._memory.counterparts(array)

    def publish(self, block: Any, only: int | None = None) -> list[Any]:
        """Show ``block`` to the other ranks; returns every rank's."""
        if block.nbytes <= PAYLOAD_BYTES:
            return self._post(block, only)
        slots = self._place(block, only)
        self.barrier()
        return slots

    def _post(self, block: Any, only: int | None = None) -> list[Any]:
        """``publish`` for a block that travels with a note."""
        if only is None or only == self.rank:
            own = self._board.next.payloads[self.rank][: block.nbytes]
            own.view(block.dtype).reshape(block.shape)[...] = block
        page: Page = self._board.exchange()
        return [payload[: block.nbytes].view(block.dtype) for payload in page.payloads]

    def _place(self, block: Any, only: int | None = None) -> list[Any]:
        """Write ``block`` into this rank's next slot; returns every rank's, of the same form."""
        slots = self.slots(block.size, block.dtype)
        if only is None or only == self.rank:
            slots[self.rank].reshape(block.shape)[...] = block
        return slots

    def slots(self, count: int, dtype: Any) -> list[Any]:
        """The next slot of every rank, as 1-D arrays of ``count`` elements."""
        size = self.slot_bytes
        start = self._turn * size
        self._turn = (self._turn + 1) % _SLOTS
        stop = start + count * np.dtype(dtype).itemsize
        return [part[start:stop].view(dtype) for part in self._scratch_window().parts]

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot. The first time, makes them: collective."""
        return int(self._scratch_window().own.nbytes) // _SLOTS

    def _columns(self, rows: Any) -> Iterator[slice]:
        """Column ranges of ``rows`` that fit a slot."""
        if rows.nbytes <= PAYLOAD_BYTES:
            yield slice(0, rows.shape[1])
            return
        width = max(1, self.slot_bytes // (rows.shape[0] * rows.itemsize))
        for start in range(0, rows.shape[1], width):
            yield slice(start, min(start + width, rows.shape[1]))

    def _scratch_window(self) -> Window:
        if self._scratch is None:
            for nbytes in SLOT_BYTES:
                self._scratch = self._memory.window(_SLOTS * nbytes, self._comm)
                if self._scratch is not None:
                    break
            else:
                raise MemoryError(
                    "node-shared memory is full: there is no room for "
                    f"{SLOT_BYTES[-1] * _SLOTS} bytes a rank; raise the limit of /dev/shm"
                )
        return self._scratch

    def barrier(self) -> None:
        """Wait for the node's ranks; what each has stored before, all see after."""
        self._board.exchange()
