"""The two halves of a sharded reduction, by every algorithm that has them, on blocks of any size;
and the last step, which turns rows into the shard that is kept."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import mpizero
from mpizero.collectives.interface import Algorithm
from mpizero.reduction.operation import SUM
from mpizero.reduction.shards import mean_into_shard

ranks = pytest.mark.parallel([2, 3, 4])
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]


def algorithms() -> list[Algorithm]:
    found = mpizero.init()._caller._blocking
    own = [a for a in found._algorithms.values() if a.knows("combine_block")]
    assert len(own) == 3
    return own


def uneven(count: int, size: int) -> list[slice]:
    """Blocks of which some are empty and one has what is left."""
    bounds = [0, *(min(count, 7 * r * (r - 1)) for r in range(1, size)), count]
    return [slice(a, b) for a, b in pairwise(bounds)]


def pattern(rank: int, count: int, dtype: Any) -> np.ndarray:
    return ((np.arange(count) * (rank + 3)) % 7 - 2).astype(dtype)


@ranks
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 1000, 700_001])
def test_combine_block(count: int, dtype: Any) -> None:
    world = mpizero.init()
    blocks = uneven(count, world.size)
    expected = sum(pattern(r, count, np.float64) for r in range(world.size))[blocks[world.rank]]
    for algorithm in algorithms():
        array, results = pattern(world.rank, count, dtype), []
        # Several calls give the block piece by piece where it does not fit scratch memory.
        algorithm.combine_block(
            array,
            blocks,
            SUM,
            lambda rows, to=results: to.append(sum(r.astype(np.float64) for r in rows)),
        )
        np.testing.assert_array_equal(np.concatenate(results), expected)
        np.testing.assert_array_equal(array, pattern(world.rank, count, dtype))


@ranks
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 1000, 700_001])
def test_gather_blocks(count: int, dtype: Any) -> None:
    world = mpizero.init()
    blocks = uneven(count, world.size)
    for algorithm in algorithms():
        array = np.full(count, 99, dtype)
        array[blocks[world.rank]] = pattern(5, count, dtype)[blocks[world.rank]]
        algorithm.gather_blocks(array, blocks)
        np.testing.assert_array_equal(array, pattern(5, count, dtype))


@pytest.mark.once
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("wide", "onto"), [(True, None), (False, None), (False, 0), (False, 1), (False, 2)]
)
@pytest.mark.parametrize("keeps", [False, True])
def test_mean_into_shard(dtype: Any, wide: bool, onto: int | None, keeps: bool) -> None:
    """``onto``: the row that the result overwrites."""
    rng = np.random.default_rng(1)
    count, divisor = 70_003, 3.0
    rows = [rng.normal(size=count).astype(np.float32).astype(dtype) for _ in range(3)]
    result = np.dtype(np.float32 if wide and np.dtype(dtype).itemsize == 2 else dtype)
    kept = rng.normal(size=count).astype(np.float32).astype(result) if keeps else None
    exact = sum(row.astype(np.float64) for row in rows) / divisor
    if kept is not None:
        exact += kept.astype(np.float64)
    out = np.empty(count, result) if onto is None else rows[onto]
    squares = mean_into_shard(rows, out, divisor, kept)
    # Sums in at least float32, of four numbers below 6; then one rounding.
    step = float(ml_dtypes.finfo(result).eps)
    bound = step / 2 * np.abs(exact) + 8 * np.finfo(np.float32).eps + 1e-7
    assert (np.abs(out.astype(np.float64) - exact) <= bound).all()
    assert squares == pytest.approx(float((exact**2).sum()), rel=1e-5)


@pytest.mark.once
def test_mean_onto_what_is_kept() -> None:
    rows = [np.full(10, 2.0), np.full(10, 4.0)]
    kept = np.arange(10.0)
    mean_into_shard(rows, kept, 2.0, kept)
    np.testing.assert_array_equal(kept, np.arange(10.0) + 3)
