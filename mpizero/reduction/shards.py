"""The last step of a sharded reduction: rows of gradients become the shard that is kept."""

from __future__ import annotations

from collections.abc import Sequence
from math import frexp
from typing import Any

import numpy as np

from mpizero.memory.arrays import empty_like, overlap
from mpizero.memory.dtypes import is_half
from mpizero.reduction.half import narrow, widen
from mpizero.reduction.operation import BLOCK

# Squares are summed in rows of this length before their sums go on in float64: float32 keeps six
# digits of them.
_SQUARES = 1024


def mean_into_shard(
    rows: Sequence[Any], out: Any, divisor: float, kept: Any = None, share: float = 1.0
) -> float:
    """``out = sum(rows) / divisor (+ share * kept)``; returns the sum of the squares of ``out``.

    All 1-D and equally long; ``out`` may be one of the rows. 16-bit rows are summed in float32 and
    rounded once, if ``out`` is 16 bits wide. Block by block: what is summed, divided and squared
    stays in cache.
    """
    squares = 0.0
    count = out.size
    if count == 0:
        return squares
    half = is_half(rows[0].dtype)
    # Totals are kept where they belong, unless something that is still to be read lies there.
    later = [*rows[2:], *([] if kept is None else [kept])]
    direct = out.dtype == rows[0].dtype and not half and not _any_overlap(out, later)
    room = empty_like(rows[0], (0 if half or direct else min(BLOCK, count),))
    with np.errstate(all="ignore"):
        for start in range(0, count, BLOCK):
            part = slice(start, min(start + BLOCK, count))
            blocks, result = [row[part] for row in rows], out[part]
            total = result if direct else room[: result.size]
            if half:
                total = widen(blocks[0])
            _sum_into(total, blocks)
            _divide(total, divisor)
            if kept is not None:
                before = widen(kept[part]) if is_half(kept.dtype) else kept[part]
                np.add(total, before if share == 1.0 else before * share, out=total)
            if is_half(out.dtype):
                narrow(total, result)
            elif not direct:
                result[...] = total
            squares += sum_of_squares(total)
    return squares


def sum_of_squares(values: Any) -> float:
    """Of a 1-D array: not finite if one of its numbers is not, or too large to be squared."""
    if values.dtype.kind == "c":
        values = values.view(values.real.dtype)
    whole = values.size - values.size % _SQUARES
    rows, rest = values[:whole].reshape(-1, _SQUARES), values[whole:]
    with np.errstate(all="ignore"):
        # A product for each row: one call of np.dot would start threads, which fight the other
        # ranks for their cores. (Measured: 7 us for 64K numbers in cache, np.einsum 17, np.dot
        # alone 6.)
        total = np.matmul(rows[:, None, :], rows[:, :, None]).sum(dtype=np.float64)
        return float(total) + float((rest * rest).sum(dtype=np.float64))


def _sum_into(total: Any, blocks: Sequence[Any]) -> None:
    """In the order of the ranks. A widened ``total`` holds the first block already."""
    if is_half(blocks[0].dtype):
        for block in blocks[1:]:
            np.add(total, widen(block), out=total)
        return
    if len(blocks) > 1:
        np.add(blocks[0], blocks[1], out=total)
    elif total is not blocks[0]:
        total[...] = blocks[0]
    for block in blocks[2:]:
        np.add(total, block, out=total)


def _divide(total: Any, divisor: float) -> None:
    if divisor == 1.0:
        return
    mantissa, _ = frexp(divisor)
    if mantissa == 0.5:  # a power of two: the product is the same number, and twice as fast
        np.multiply(total, 1.0 / divisor, out=total)
    else:
        np.divide(total, divisor, out=total)


def _any_overlap(out: Any, rows: Sequence[Any]) -> bool:
    return any(overlap(out, row) for row in rows)
