"""All-reduce of private memory within a node: chunk by chunk through stages that all ranks map.

Every rank has a stage. There it puts what the others combine of its chunk, and they put the results
into the same place. So each number passes from core to core twice, there and back, and all that is
in use at a time (the chunk, its stage, what is read of the others') stays in the cores' own caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mpizero.collectives.transport import cut_evenly
from mpizero.memory.board import Board
from mpizero.reduction import Operation

_MOST_PLACES = 1024


@dataclass(frozen=True)
class Place:
    """Where a chunk of some size and dtype is staged, and who combines what of it.

    ``rows``: the stages' parts that this rank combines, in rank order; its own is not in use.
    ``before``, ``own``, ``after``: what of the chunk others, this rank, and others combine.
    """

    staged: Any
    rows: tuple[Any, ...]
    before: slice
    own: slice
    after: slice


class Stages:
    """The stages of a node's ranks. Belongs to one thread at a time, like its ``board``.

    Nobody needs to wait before staging anew: what is in a rank's stage only that rank reads once
    all have combined it.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self._rank = board.rank
        self._bytes = len(board.stages[board.rank])
        self._places: dict[Any, Place] = {}

    def stage(self, array: Any) -> None:
        """Put the first chunk of ``array`` where the others find it after the next exchange."""
        self._put(array[: self._width(array)])

    def all_reduce(self, array: Any, op: Operation) -> None:
        """Combine contiguous 1-D arrays in place, whose first chunks have been staged.

        An exchange must have taken place since.
        """
        width = self._width(array)
        for start in range(0, array.size, width):
            chunk = array[start : start + width]
            if start:
                self._put(chunk)
                self._board.exchange()
            place = self._place(chunk)
            rows = [*place.rows]
            rows[self._rank] = chunk[place.own]
            op.reduce_to_all(rows, rows)
            self._board.exchange()
            chunk[place.before] = place.staged[place.before]
            chunk[place.after] = place.staged[place.after]

    def _put(self, chunk: Any) -> None:
        place = self._place(chunk)
        place.staged[place.before] = chunk[place.before]
        place.staged[place.after] = chunk[place.after]

    def _width(self, array: Any) -> int:
        return self._bytes // int(array.itemsize)

    def _place(self, chunk: Any) -> Place:
        known = self._places.get((chunk.size, chunk.dtype))
        if known is None:
            if len(self._places) >= _MOST_PLACES:  # a program without habits: start over
                self._places.clear()
            stages = [stage[: chunk.nbytes].view(chunk.dtype) for stage in self._board.stages]
            own = cut_evenly(chunk.size, len(stages))[self._rank]
            known = self._places[chunk.size, chunk.dtype] = Place(
                stages[self._rank], tuple(stage[own] for stage in stages),
                slice(0, own.start), own, slice(own.stop, chunk.size),
            )  # fmt: skip
        return known
