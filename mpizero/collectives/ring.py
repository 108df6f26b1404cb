"""Ring algorithms: bandwidth-optimal for any number of ranks (Patarasuk and Yuan 2009).

Every rank talks to its two neighbours only; an all-reduce sends 2 (n-1)/n of the data from each
rank in 2 (n-1) steps. For large messages, and for networks that like neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpizero.collectives.interface import TwoPhase
from mpizero.collectives.transport import Transport, cut_evenly
from mpizero.memory.arrays import empty_like
from mpizero.reduction import Operation


class Ring(TwoPhase):
    name = "ring"

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.rank, self.size = transport.rank, transport.size
        self._next = (self.rank + 1) % self.size
        self._previous = (self.rank - 1) % self.size

    def scatter_blocks(self, work: Any, blocks: Sequence[slice], op: Operation) -> None:
        """Pass partial sums round the ring; after n-1 steps each block arrives, full, at home."""
        longest = max(block.stop - block.start for block in blocks)
        arrived = empty_like(work, (longest,))
        for step in range(1, self.size):
            leaving = blocks[(self.rank - step) % self.size]
            arriving = blocks[(self.rank - step - 1) % self.size]
            partial = arrived[: arriving.stop - arriving.start]
            self._transport.exchange(work[leaving], self._next, partial, self._previous)
            op.combine(work[arriving], partial)

    def gather_blocks(self, array: Any, blocks: Sequence[slice]) -> None:
        """Pass complete blocks round the ring: in each step, the one that came in the last."""
        for step in range(self.size - 1):
            leaving = blocks[(self.rank - step) % self.size]
            arriving = blocks[(self.rank - step - 1) % self.size]
            self._transport.exchange(array[leaving], self._next, array[arriving], self._previous)

    def broadcast(self, array: Any, root: int) -> None:
        """Pipeline the array down the ring from ``root``, block behind block."""
        distance = (self.rank - root) % self.size
        first, last = distance == 0, distance == self.size - 1
        blocks = cut_evenly(array.size, self.size)
        source = None if first else self._previous
        to = None if last else self._next
        # Receive block i while passing on block i - 1.
        for arriving, leaving in zip([*blocks, None], [None, *blocks], strict=True):
            self._transport.exchange(
                None if leaving is None else array[leaving],
                None if leaving is None else to,
                None if arriving is None else array[arriving],
                None if arriving is None else source,
            )

    def all_to_all(self, array: Any, out: Any) -> None:
        """Exchange with the partner at distance 1, then 2, ...: every block moves once."""
        blocks = cut_evenly(array.size, self.size)
        out[blocks[self.rank]] = array[blocks[self.rank]]
        for step in range(1, self.size):
            to, source = (self.rank + step) % self.size, (self.rank - step) % self.size
            self._transport.exchange(array[blocks[to]], to, out[blocks[source]], source)
