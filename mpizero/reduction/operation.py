"""The operations of a reduction: how two blocks combine, and what becomes of the sum.

Algorithms know nothing of means or of 16-bit floats. They widen what they reduce, combine
blocks, and ``finish`` each block once, where it is complete.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mpizero.errors import ArgumentError
from mpizero.memory.arrays import empty_like, overlap
from mpizero.memory.dtypes import is_half, kind_of
from mpizero.reduction.half import narrow, widen

Divisor = Callable[[], float]

# Elements combined at a time: two float32 blocks of this size fill a 512 KiB L2 cache. (Measured on
# 1 MB and 128 MB at 2 and 4 ranks: half of it is 5 to 20 % slower, twice of it as fast.)
BLOCK = 64 * 1024


def quietly() -> Callable[..., Any]:
    """``quietly()(f, *arguments)`` calls f without numpy's warnings.

    NaN and overflow are the user's to see in the result. Since numpy 2 its error state is a context
    variable: a context that ignores errors is entered in a fifth of the time of np.errstate.
    """
    if np.lib.NumpyVersion(np.__version__) < "2.0.0":
        return np.errstate(all="ignore")(
            lambda function, *given, **named: function(*given, **named)
        )
    context = contextvars.copy_context()
    context.run(np.seterr, all="ignore")
    return context.run


class _Quiet(threading.local):
    """A context can be entered by one thread at a time."""

    def __init__(self) -> None:
        self.run = quietly()


_quiet = _Quiet()


@dataclass(frozen=True)
class Operation:
    """One reduction: its name, the element-wise function, and the divisor of a mean (or None).

    The divisor is asked for when a block is complete, not before: for a weighted mean it is the
    sum of all ranks' weights, which is itself still travelling when the reduction is submitted.
    """

    name: str
    function: Any
    divisor: Divisor | None = None

    def combine(self, into: Any, other: Any) -> None:
        """``into = into (op) other``, element by element, in place."""
        # NaN or overflow in the user's numbers is the user's to see in the result, not a warning
        # from inside a collective.
        _quiet.run(self.function, into, other, out=into)  # CuPy arrays answer numpy's functions

    def finish(self, total: Any) -> None:
        """Make the complete ``total`` the result: divide for a mean."""
        if self.divisor is not None:
            divisor = self.divisor()
            if divisor != 1.0:
                _quiet.run(np.divide, total, divisor, out=total)

    def reduce_rows(self, rows: Sequence[Any], out: Any) -> None:
        """Combine equally long 1-D ``rows``, in their order, and finish into ``out``.

        16-bit rows are combined in float32 and rounded once. ``out`` may be one of the rows.
        """
        self.reduce_to_all(rows, [out])

    def accumulate(self, rows: Sequence[Any], total: Any) -> None:
        """Combine ``rows`` into ``total`` (float32 for 16-bit rows), without finishing."""
        Operation(self.name, self.function).reduce_rows(rows, total)

    def reduce_to_all(self, rows: Sequence[Any], outs: Sequence[Any]) -> None:
        """``reduce_rows`` into each of ``outs``, which may be the rows themselves.

        Works block by block, so that the running total stays in cache.
        """
        first, *others = outs
        if first.size == 0:
            return
        half = is_half(rows[0].dtype)
        # Totals are kept in the first output, unless a row that is still to be read lies there.
        direct = not half and not _any_overlap(first, rows[2:])
        room = None if half or direct else empty_like(rows[0], (min(BLOCK, rows[0].size),))
        for start in range(0, first.size, BLOCK):
            part = slice(start, start + BLOCK)
            blocks, result = [row[part] for row in rows], first[part]
            if half:
                total = self._widened_total(blocks)
            else:
                total = self._total(blocks, result if room is None else room[: result.size])
            self.finish_into(total, result)
            for out in others:
                out[part] = result

    def _total(self, blocks: Sequence[Any], total: Any) -> Any:
        if len(blocks) == 1:
            total[...] = blocks[0]
        else:
            _quiet.run(self.function, blocks[0], blocks[1], out=total)
        for block in blocks[2:]:
            _quiet.run(self.function, total, block, out=total)
        return total

    def _widened_total(self, blocks: Sequence[Any]) -> Any:
        total = widen(blocks[0])
        for block in blocks[1:]:
            _quiet.run(self.function, total, widen(block), out=total)
        return total

    def accumulator(self, block: Any) -> Any:
        """A copy of ``block`` that sums may be kept in: float32 for the 16-bit floats."""
        return widen(block) if is_half(block.dtype) else block.copy()

    def finish_into(self, total: Any, out: Any) -> None:
        """Finish an accumulator and round it into ``out``; ``total`` may be changed."""
        self.finish(total)
        if is_half(out.dtype):
            narrow(total, out)
        elif total is not out:
            out[...] = total


def _any_overlap(out: Any, rows: Sequence[Any]) -> bool:
    return any(overlap(out, row) for row in rows)


_FUNCTIONS = {
    "sum": np.add,
    "mean": np.add,
    "product": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "band": np.bitwise_and,
    "bor": np.bitwise_or,
    "bxor": np.bitwise_xor,
}

_ALLOWED_KINDS = {
    "sum": ("float", "integer", "complex"),
    "mean": ("float", "complex"),
    "product": ("float", "integer", "complex"),
    "max": ("float", "integer", "bool"),
    "min": ("float", "integer", "bool"),
    "band": ("integer", "bool"),
    "bor": ("integer", "bool"),
    "bxor": ("integer", "bool"),
}


@lru_cache(maxsize=256)
def operation(name: str, dtype: Any, ranks: int, function: str) -> Operation:
    """The operation ``name`` for arrays of ``dtype`` over ``ranks`` ranks.

    Raises ArgumentError for an unknown name, and for a dtype that the operation cannot keep (the
    mean of integers, the largest of complex numbers). max and min pass NaN on, as numpy's do.
    """
    if name not in _FUNCTIONS:
        raise ArgumentError(function, "op", repr(name), ", ".join(_FUNCTIONS))
    if not np.dtype(dtype).isnative:
        raise ArgumentError(
            function, "x", f"an array of {dtype}", "numbers in this machine's byte order",
            "x.astype(x.dtype.newbyteorder('='))",
        )  # fmt: skip
    if kind_of(dtype) not in _ALLOWED_KINDS[name]:
        raise ArgumentError(
            function,
            "op",
            f"{name!r} for an array of {dtype}",
            f"{name!r} of {', '.join(_ALLOWED_KINDS[name])} arrays",
            _hint(name, kind_of(dtype)),
        )
    divisor = (lambda: float(ranks)) if name == "mean" else None
    return Operation(name, _FUNCTIONS[name], divisor)


SUM = Operation("sum", np.add)


def mean_over(divisor: Divisor) -> Operation:
    """The sum divided by what ``divisor()`` says when the sum is complete: a weighted mean."""
    return Operation("mean", np.add, divisor)


def _hint(name: str, kind: str) -> str:
    if kind == "bool":
        return "Use 'max' for logical or, 'min' for logical and, or convert to integers."
    if name == "mean" and kind == "integer":
        return "Convert to a floating dtype first, or use 'sum'."
    return ""
