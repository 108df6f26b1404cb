"""Collectives among the ranks of one node, by loads and stores in shared memory.

Arrays that lie in node-shared memory at the same place on every rank are reduced where they are:
when all are ready, each rank combines its own slice straight out of all ranks' arrays and writes
the result back into them. Small arrays travel with the note that says that they are there. Others
pass through a scratch area that all ranks map, chunk by chunk, so that what one rank writes the
others find in the shared cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mpizero.collectives.interface import Algorithm
from mpizero.collectives.stages import Stages
from mpizero.collectives.transport import cut_evenly
from mpizero.memory.board import Board
from mpizero.memory.dtypes import is_half
from mpizero.memory.node_shared import NOWHERE, NodeMemory
from mpizero.reduction import Operation

# Up to this size, and for more than four ranks in proportion less, combining a whole array on every
# rank costs less than a second step. (Measured in float32 at 2 ranks, beside stages: 64 KB in 20 us
# beside 22, 128 KB in 35 beside 32. At 4 ranks 64 KB in 72 us beside 83.)
_ONE_STEP_BYTES = 64 << 10
_ONE_STEP_READ_BYTES = 3 * _ONE_STEP_BYTES
_ONE_STEP_HALF_BYTES = 16 << 10  # of 16-bit floats, which are widened first


class NodeShared(Algorithm):
    name = "node_shared"

    def __init__(self, memory: NodeMemory, board: Board) -> None:
        self._memory = memory
        self._board = board
        self.stages = Stages(board)
        self.rank, self.size = board.rank, board.size
        self._small_bytes = min(
            _ONE_STEP_BYTES, _ONE_STEP_READ_BYTES // (self.size - 1 or 1), board.payload_bytes
        )

    def is_small(self, array: Any) -> bool:
        """Is it combined as a whole on every rank, wherever it lies?"""
        most = _ONE_STEP_HALF_BYTES if is_half(array.dtype) else _ONE_STEP_BYTES
        return bool(array.nbytes <= min(most, self._small_bytes))

    def all_reduce(self, array: Any, op: Operation) -> None:
        if self.is_small(array):
            op.reduce_rows(self.publish(array), array)
            return
        parts = self.counterparts(array)
        if parts is not None:
            self.all_reduce_parts(parts, op)
            return
        self.stages.stage(array)
        self.barrier()
        self.stages.all_reduce(array, op)

    def all_reduce_parts(self, parts: Sequence[Any], op: Operation) -> None:
        """All-reduce of ``parts``, the arrays of all ranks, which are ready to be read."""
        own = cut_evenly(parts[0].size, self.size)[self.rank]
        self.all_reduce_slices([part[own] for part in parts], op)

    def all_reduce_slices(self, slices: Sequence[Any], op: Operation) -> None:
        """``all_reduce_parts``, given the slices of them that this rank combines."""
        op.reduce_to_all(slices, slices)
        self.barrier()

    def reduce_scatter(self, array: Any, out: Any, op: Operation) -> None:
        parts = None if self.is_small(array) else self.counterparts(array)
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

    def combine_block(
        self, array: Any, blocks: Sequence[slice], op: Operation, use: Callable[[list[Any]], None]
    ) -> None:
        own = blocks[self.rank]
        dtype = np.float32 if is_half(array.dtype) else array.dtype
        total = np.empty(own.stop - own.start, dtype)
        for columns in self._columns(array.reshape(1, -1)):
            slots = self.publish(array[columns])
            start, stop = max(own.start, columns.start), min(own.stop, columns.stop)
            if start < stop:
                seen = slice(start - columns.start, stop - columns.start)
                into = slice(start - own.start, stop - own.start)
                op.accumulate([slot[seen] for slot in slots], total[into])
        use([total])

    def combine_block_parts(
        self, parts: Sequence[Any], blocks: Sequence[slice], use: Callable[[list[Any]], None]
    ) -> None:
        """``combine_block`` of ``parts``, the arrays of all ranks, which are ready to be read."""
        use([part[blocks[self.rank]] for part in parts])
        self.barrier()

    def gather_blocks(self, array: Any, blocks: Sequence[slice]) -> None:
        width = max(1, self.slot_bytes // array.itemsize)
        for start in range(0, max(block.stop - block.start for block in blocks), width):
            places = [
                slice(
                    min(block.start + start, block.stop),
                    min(block.start + start + width, block.stop),
                )
                for block in blocks
            ]
            slots = self.slots(width, array.dtype)
            own = places[self.rank]
            slots[self.rank][: own.stop - own.start] = array[own]
            self.barrier()
            for rank, place in enumerate(places):
                if rank != self.rank:
                    array[place] = slots[rank][: place.stop - place.start]

    def gather_blocks_parts(self, parts: Sequence[Any], blocks: Sequence[slice]) -> None:
        """``gather_blocks`` of ``parts``, the arrays of all ranks, whose blocks may be read."""
        array = parts[self.rank]
        for rank, block in enumerate(blocks):
            if rank != self.rank:
                array[block] = parts[rank][block]
        self.barrier()

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

    def spot(self, array: Any) -> int:
        """Where ``array`` lies in node-shared memory; nowhere if it is small: its bytes travel."""
        return NOWHERE if self.is_small(array) else self._memory.spot(array)

    def counterparts(self, array: Any) -> list[Any] | None:
        """All ranks' arrays, ready to be read, if they lie at the same spot of shared memory."""
        spot = self.spot(array)
        notes = self._board.exchange(0, spot).notes
        if spot == NOWHERE or any(note[2] != spot for note in notes):
            return None
        return self._memory.counterparts(array, spot)

    def publish(self, block: Any, only: int | None = None) -> list[Any]:
        """Show ``block`` to the other ranks; returns every rank's, 1-D, when they have come."""
        slots = self.show(block, only)
        self.barrier()
        return slots

    def show(self, block: Any, only: int | None = None) -> list[Any]:
        """Put ``block`` where the others see it after the next exchange; returns every rank's."""
        slots = self.slots(block.size, block.dtype)
        if only is None or only == self.rank:
            slots[self.rank].reshape(block.shape)[...] = block
        return slots

    def slots(self, count: int, dtype: Any) -> list[Any]:
        """Every rank's place for what it shows in the next exchange: 1-D, ``count`` elements."""
        nbytes = count * np.dtype(dtype).itemsize
        return [payload[:nbytes].view(dtype) for payload in self._board.next.payloads]

    @property
    def slot_bytes(self) -> int:
        """How much can be shown at a time."""
        return self._board.payload_bytes

    def _columns(self, rows: Any) -> Iterator[slice]:
        """Column ranges of ``rows`` that fit a slot."""
        width = max(1, self.slot_bytes // (rows.shape[0] * rows.itemsize))
        for start in range(0, rows.shape[1], width):
            yield slice(start, min(start + width, rows.shape[1]))

    def barrier(self) -> None:
        """Wait for the node's ranks; what each has stored before, all see after."""
        self._board.exchange()
