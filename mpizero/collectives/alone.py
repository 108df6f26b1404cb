"""The collectives of a single rank: nothing travels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mpizero.collectives.interface import Algorithm
from mpizero.reduction import Operation


class Alone(Algorithm):
    name = "alone"
    rank, size = 0, 1

    def all_reduce(self, array: Any, op: Operation) -> None:
        if op.divisor is not None and op.divisor() != 1.0:
            op.finish_into(op.accumulator(array), array)

    def reduce_scatter(self, array: Any, out: Any, op: Operation) -> None:
        op.finish_into(op.accumulator(array), out)

    def all_gather(self, block: Any, out: Any) -> None:
        out[...] = block

    def broadcast(self, array: Any, root: int) -> None:
        pass

    def all_to_all(self, array: Any, out: Any) -> None:
        out[...] = array

    def combine_block(
        self, array: Any, blocks: Sequence[slice], op: Operation, use: Callable[[list[Any]], None]
    ) -> None:
        use([array[blocks[0]]])

    def gather_blocks(self, array: Any, blocks: Sequence[slice]) -> None:
        pass
