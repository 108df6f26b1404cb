"""The last step of a sharded reduction: rows of gradients become the shard that is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mpizero.memory.arrays import empty_like
from mpizero.memory.dtypes import is_half
from mpizero.reduction.half import narrow, widen
from mpizero.reduction.operation import BLOCK

# Squares are summed in rows of this length before their sums go on in float64: float32 keeps six
# digits of them.
_SQUARES = 1024


def mean_into_shard(rows: Sequence[Any], out: Any, divisor: float, kept: Any = None) -> float:
    """``out = sum(rows) / divisor (+ kept)``; returns the sum of the squares of ``out``.

    All 1-D and equally long; ``out`` may be one of the rows. 16-bit rows are summed in float32 and
    rounded once, if ``out`` is 16 bits wide. Block by block: what is summed, divided and squared
    stays in cache.
    """
    squares = 0.0
    count = out.size
    if count == 0:
        return squares
    half = is_half(rows[0].dtype)
    room = empty_like(rows[0], (0 if half else min(BLOCK, count),))
    with np.errstate(all="ignore"):
        for start in range(0, count, BLOCK):
            part = slice(start, min(start + BLOCK, count))
            blocks = [row[part] for row in rows]
            total = _sum(blocks, widen(blocks[0]) if half else room[: part.stop - start])
            if divisor != 1.0:
                np.divide(total, divisor, out=total)
            if kept is not None:
                before = kept[part]
                np.add(total, widen(before) if is_half(before.dtype) else before, out=total)
            if is_half(out.dtype):
                narrow(total, out[part])
            else:
                out[part] = total
            squares += sum_of_squares(total)
    return squares


def sum_of_squares(values: Any) -> float:
    """Of a 1-D array: not finite if one of its numbers is not, or too large to be squared."""
    if values.dtype.kind == "c":
        values = values.view(values.real.dtype)
    whole = values.size - values.size % _SQUARES
    rows, rest = values[:whole].reshape(-1, _SQUARES), values[whole:]
    # Not np.dot: its BLAS starts threads, which fight the other ranks for their cores.
    total = np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64)
    return float(total) + float(np.einsum("i,i->", rest, rest))


def _sum(blocks: Sequence[Any], total: Any) -> Any:
    """In the order of the ranks. A widened ``total`` holds the first block already."""
    if is_half(blocks[0].dtype):
        for block in blocks[1:]:
            np.add(total, widen(block), out=total)
        return total
    if len(blocks) == 1:
        total[...] = blocks[0]
    else:
        np.add(blocks[0], blocks[1], out=total)
    for block in blocks[2:]:
        np.add(total, block, out=total)
    return total
