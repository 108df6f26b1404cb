"""Recursive halving and doubling: as few messages as possible, for any number of ranks.

Rabenseifner's all-reduce (Thakur, Rabenseifner, Gropp 2005, section 4.5): a reduce-scatter by
recursive halving, an all-gather by recursive doubling, 2 ceil(log2 n) steps. Ranks that are no
power of two are halved unevenly rather than folded away first, so that a rank still sends only
(n-1)/n of the data in the reduce-scatter, whatever n.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mpizero.collectives.interface import TwoPhase
from mpizero.collectives.transport import Transport, cut_evenly
from mpizero.memory.arrays import empty_like
from mpizero.reduction import Operation


@dataclass(frozen=True)
class Halving:
    """One level of the recursion: the ranks first..stop-1 part in two at ``middle``.

    ``partner`` stands opposite this rank. If the lower half is longer by one, its last rank has
    nobody opposite; it talks to the last rank of the upper half, for which it is the ``extra``.
    """

    first: int
    middle: int
    stop: int
    partner: int
    unpaired: bool
    extra: int | None


def halvings(rank: int, size: int) -> Iterator[Halving]:
    """The levels that ``rank`` goes through, from all ranks down to itself."""
    first, stop = 0, size
    while stop - first > 1:
        middle = first + (stop - first + 1) // 2
        longer = (middle - first) > (stop - middle)
        unpaired = longer and rank == middle - 1
        extra = middle - 1 if longer and rank == stop - 1 else None
        if rank < middle:
            partner = stop - 1 if unpaired else rank - first + middle
            yield Halving(first, middle, stop, partner, unpaired, extra)
            stop = middle
        else:
            yield Halving(first, middle, stop, rank - middle + first, unpaired, extra)
            first = middle


class HalvingDoubling(TwoPhase):
    name = "halving_doubling"

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.rank, self.size = transport.rank, transport.size

    def scatter_blocks(self, work: Any, blocks: Sequence[slice], op: Operation) -> None:
        """At each level, give the other half its blocks and add what it gave for ours."""
        arrived = None
        for level in halvings(self.rank, self.size):
            lower, upper = _halves(blocks, level)
            kept, given = (lower, upper) if self.rank < level.middle else (upper, lower)
            if arrived is None:  # the first half is the longest
                arrived = empty_like(work, (kept.stop - kept.start,))
            partial = arrived[: kept.stop - kept.start]
            if level.unpaired:  # gives only: nobody has blocks for it
                self._transport.exchange(work[given], level.partner, None, None)
                continue
            self._transport.exchange(work[given], level.partner, partial, level.partner)
            op.combine(work[kept], partial)
            if level.extra is not None:
                self._transport.exchange(None, None, partial, level.extra)
                op.combine(work[kept], partial)

    def gather_blocks(self, array: Any, blocks: Sequence[slice]) -> None:
        """The way back: at each level, exchange the halves, which are complete on each side."""
        for level in reversed(list(halvings(self.rank, self.size))):
            lower, upper = _halves(blocks, level)
            own, missing = (lower, upper) if self.rank < level.middle else (upper, lower)
            if level.unpaired:  # receives only: its half is sent by the others
                self._transport.exchange(None, None, array[missing], level.partner)
                continue
            self._transport.exchange(array[own], level.partner, array[missing], level.partner)
            if level.extra is not None:
                self._transport.exchange(array[own], level.extra, None, None)

    def broadcast(self, array: Any, root: int) -> None:
        """Scatter down the halves from ``root``, then gather back up (van de Geijn)."""
        # Ranks are counted from the root, so that the root is always first in its half.
        shifted = HalvingDoubling(_Shifted(self._transport, root))
        blocks = cut_evenly(array.size, self.size)
        for level in halvings(shifted.rank, self.size):
            _, upper = _halves(blocks, level)
            if shifted.rank == level.first:
                shifted._transport.exchange(array[upper], level.middle, None, None)
            elif shifted.rank == level.middle:
                shifted._transport.exchange(None, None, array[upper], level.first)
        shifted.gather_blocks(array, blocks)


class _Shifted:
    """A transport whose ranks are counted from another one."""

    def __init__(self, transport: Transport, root: int) -> None:
        self._transport, self._root = transport, root
        self.size = transport.size
        self.rank = (transport.rank - root) % self.size

    def exchange(self, outgoing: Any, to: int | None, incoming: Any, source: int | None) -> None:
        self._transport.exchange(outgoing, self._real(to), incoming, self._real(source))

    def _real(self, rank: int | None) -> int | None:
        return None if rank is None else (rank + self._root) % self.size


def _halves(blocks: Sequence[slice], level: Halving) -> tuple[slice, slice]:
    """What the blocks of the lower and of the upper half of the ranks cover."""
    lower = slice(blocks[level.first].start, blocks[level.middle - 1].stop)
    upper = slice(blocks[level.middle].start, blocks[level.stop - 1].stop)
    return lower, upper
