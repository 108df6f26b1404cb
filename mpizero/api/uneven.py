"""Collectives to which every rank may bring another number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import numpy as np

from mpizero.api.call import Call
from mpizero.api.calls import Calls
from mpizero.api.describe import check_form, describe_rows
from mpizero.collectives.dispatch import Dispatch, Parts
from mpizero.errors import ArgumentError, MismatchError
from mpizero.memory.arrays import OpenArray
from mpizero.memory.order import opened


class UnevenCalls(Calls):
    """``allgather_uneven`` and ``all_to_all_uneven``."""

    def allgather_uneven(self, x: Any, *, out: Any = None, asynchronous: bool = False) -> Any:
        """Put the ranks' arrays behind one another along the first axis, of any length on each.

        ``x``: shape (k, ...), any dtype, k differing between the ranks. Returns a new array, or
        ``out``, with as many rows as all ranks have together.
        """

        def prepare() -> Call:
            source = self._open_rows(x, "allgather_uneven()")

            def work(run: Dispatch, parts: Parts) -> Any:
                rows = run.comm.allgather(source.shape[0])
                shape = (sum(rows), *source.shape[1:])
                with run.together("allgather_uneven(): there is room for the rows of all ranks"):
                    target = run.room(
                        lambda: self._target("allgather_uneven()", source, out, shape)
                    )
                places = _places(rows, shape)
                target.flat[places[self.rank]] = source.flat
                run.gather_blocks(target.flat, places, None)
                return target.commit()

            return Call(describe_rows("allgather_uneven", source), work, opened(source))

        return self._caller.perform(prepare, asynchronous)

    def all_to_all_uneven(
        self,
        x: Any,
        counts: Sequence[int],
        *,
        out: Any = None,
        out_counts: Sequence[int] | None = None,
        asynchronous: bool = False,
    ) -> Any:
        """Send rank r the next ``counts[r]`` rows of ``x``, for all r in turn.

        ``x``: shape (sum of counts, ...), any dtype. Returns a new array, or ``out``, with the rows
        that came from rank 0, 1, ...: ``out_counts`` says how many are expected from each; where
        others come, MismatchError on every rank.
        """
        function = "all_to_all_uneven()"

        def prepare() -> Call:
            source = self._open_rows(x, function)
            sent = self._checked(counts, "counts", source.shape[0])
            target = None
            if out is not None:
                target = self._open(out, function, "out", writable=True)
                rows = target.shape[0] if target.shape else -1
                check_form(function, target, (rows, *source.shape[1:]), source.dtype, source)
            expected = None
            if out_counts is not None:
                expected = self._checked(
                    out_counts, "out_counts", target.shape[0] if target else None
                )

            def work(run: Dispatch, parts: Parts) -> Any:
                received = self._exchange_counts(run, sent)
                shape = (sum(received), *source.shape[1:])
                with run.together("all_to_all_uneven(): there is room for what comes"):
                    self._check_received(received, expected, target)
                    into = target or run.room(lambda: self._target(function, source, None, shape))
                run.all_to_all_blocks(
                    source.flat, _places(sent, source.shape), into.flat, _places(received, shape)
                )
                return into.commit()

            what = describe_rows("all_to_all_uneven", source)
            return Call(what, work, opened(source, target))

        return self._caller.perform(prepare, asynchronous)

    def _open_rows(self, x: Any, function: str) -> OpenArray:
        source = self._open(x, function, "x", writable=False)
        if not source.shape:
            raise ArgumentError(function, "x", "a zero-dimensional array", "one with rows")
        return source

    def _checked(self, counts: Sequence[int], argument: str, rows: int | None) -> list[int]:
        listed = [int(count) for count in counts]
        fits = len(listed) == self.size and min(listed) >= 0
        if not fits or (rows is not None and sum(listed) != rows):
            allowed = f"{self.size} numbers >= 0"
            if rows is not None:
                allowed += (
                    f" whose sum is the {rows} rows of {'x' if argument == 'counts' else 'out'}"
                )
            raise ArgumentError("all_to_all_uneven()", argument, str(listed), allowed)
        return listed

    def _exchange_counts(self, run: Dispatch, sent: list[int]) -> list[int]:
        """How many rows come from each rank."""
        numbers = np.empty(self.size, np.int64)
        run.comm.Alltoall(np.array(sent, np.int64), numbers)
        return [int(number) for number in numbers]

    def _check_received(
        self, received: list[int], expected: list[int] | None, target: OpenArray | None
    ) -> None:
        room = sum(received) if target is None else target.shape[0]
        if received != (expected or received) or room != sum(received):
            raise MismatchError(
                f"all_to_all_uneven(): {received} rows come from the ranks to rank {self.rank}; "
                f"expected were {expected or 'any counts'}, with room for {room} rows."
            )


def _places(rows: Sequence[int], shape: Sequence[int]) -> list[slice]:
    """Where each rank's rows lie in the flat array of this shape."""
    width = prod(shape[1:])
    return [slice(a * width, b * width) for a, b in pairwise([0, *accumulate(rows)])]
