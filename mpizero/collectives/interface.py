"""What every collective algorithm offers.

Arrays are contiguous and 1-D, of one dtype, already checked to agree between the ranks. "Block r"
of an array is the r-th of its ``size`` slices, which is what belongs to rank r.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence
from typing import Any

from mpizero.collectives.transport import cut_evenly
from mpizero.memory.dtypes import is_half
from mpizero.reduction import Operation
from mpizero.reduction.half import widen


class Algorithm(ABC):
    """One way to run collectives. What an algorithm does not override, it does not offer."""

    name: str
    rank: int
    size: int

    def all_reduce(self, array: Any, op: Operation) -> None:
        """Combine ``array`` over all ranks, in place: every rank gets the same bits."""
        raise NotImplementedError

    def reduce_scatter(self, array: Any, out: Any, op: Operation) -> None:
        """Combine ``array`` (size * k) over all ranks; rank r gets block r in ``out`` (k).

        ``array`` is left as it was.
        """
        raise NotImplementedError

    def all_gather(self, block: Any, out: Any) -> None:
        """Put every rank's ``block`` (k) into ``out`` (size * k), in rank order."""
        raise NotImplementedError

    def broadcast(self, array: Any, root: int) -> None:
        """Give every rank the root's ``array``."""
        raise NotImplementedError

    def all_to_all(self, array: Any, out: Any) -> None:
        """Send block r of ``array`` (size * k) to rank r; block s of ``out`` comes from rank s."""
        raise NotImplementedError

    def combine_block(
        self, array: Any, blocks: Sequence[slice], op: Operation, use: Callable[[list[Any]], None]
    ) -> None:
        """Combine ``array`` over all ranks; rank r is given what makes up ``array[blocks[r]]``.

        ``use(rows)``: equally long rows that remain to be combined (one, or one from each rank, of
        the array's dtype or float32), valid during the call only. Neither finished nor rounded.
        """
        raise NotImplementedError

    def gather_blocks(self, array: Any, blocks: Sequence[slice]) -> None:
        """Fill ``array``, of which each rank r holds ``array[blocks[r]]``."""
        raise NotImplementedError

    @classmethod
    def knows(cls, collective: str) -> bool:
        """True if this algorithm has a method of its own for ``collective``."""
        return getattr(cls, collective) is not getattr(Algorithm, collective)

    def offers(self, collective: str) -> bool:
        """True if it can run ``collective`` here: on these ranks, on these nodes."""
        return self.knows(collective)


class TwoPhase(Algorithm):
    """All-reduce as reduce-scatter followed by all-gather, both on the blocks of one array.

    Each block is combined to the end on one rank, in one order, finished there (divided for a
    mean, rounded once if it is 16 bits wide) and handed to all: hence the same bits everywhere.
    Partial sums of 16-bit floats travel as float32 (Rabenseifner's structure: Thakur,
    Rabenseifner, Gropp 2005, section 4.5).
    """

    def scatter_blocks(self, work: Any, blocks: Sequence[slice], op: Operation) -> None:
        """Combine ``work`` over the ranks so that rank r's ``work[blocks[r]]`` is complete."""
        raise NotImplementedError

    def combine_block(
        self, array: Any, blocks: Sequence[slice], op: Operation, use: Callable[[list[Any]], None]
    ) -> None:
        work = op.accumulator(array)
        self.scatter_blocks(work, blocks, op)
        use([work[blocks[self.rank]]])

    def all_reduce(self, array: Any, op: Operation) -> None:
        blocks = cut_evenly(array.size, self.size)
        work = widen(array) if is_half(array.dtype) else array
        self.scatter_blocks(work, blocks, op)
        own = blocks[self.rank]
        op.finish_into(work[own], array[own])
        self.gather_blocks(array, blocks)

    def reduce_scatter(self, array: Any, out: Any, op: Operation) -> None:
        blocks = cut_evenly(array.size, self.size)
        work = op.accumulator(array)
        self.scatter_blocks(work, blocks, op)
        op.finish_into(work[blocks[self.rank]], out)

    def all_gather(self, block: Any, out: Any) -> None:
        blocks = cut_evenly(out.size, self.size)
        out[blocks[self.rank]] = block
        self.gather_blocks(out, blocks)
