"""Summing blocks: 16-bit floats bit by bit, and the operations."""

from __future__ import annotations

import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mpizero.errors import ArgumentError
from mpizero.reduction import half, operation, quietly
from mpizero.reduction.half import Conversion
from mpizero.reduction.operation import BLOCK, mean_over
from mpizero_torch import half_kernels

CONVERSIONS = [
    *((dtype, conversion) for dtype, conversion in half.BUILT_IN.items()),
    *((dtype, conversion) for dtype, conversion in half_kernels.TORCH.items()),
]
conversions = pytest.mark.parametrize(
    ("dtype", "conversion"),
    CONVERSIONS,
    ids=["numpy-float16", "numpy-bfloat16", "torch-bfloat16", "torch-float16"],
)

pytestmark = pytest.mark.once

HALVES = [np.float16, ml_dtypes.bfloat16]


def _every_value(dtype: Any) -> np.ndarray:
    return np.arange(65536, dtype=np.uint16).view(dtype)


@conversions
def test_widening_is_exact_for_every_value(dtype: Any, conversion: Conversion) -> None:
    every = _every_value(dtype)
    np.testing.assert_array_equal(conversion.widen(every), every.astype(np.float32))


@conversions
def test_narrowing_gives_every_value_back(dtype: Any, conversion: Conversion) -> None:
    every = _every_value(dtype)
    out = np.empty_like(every)
    conversion.narrow(conversion.widen(every), out)
    numbers = ~np.isnan(every.astype(np.float32))
    assert (out.view(np.uint16) == every.view(np.uint16))[numbers].all()
    assert np.isnan(out.astype(np.float32))[~numbers].all()


@conversions
def test_narrowing_rounds_to_nearest_even(dtype: Any, conversion: Conversion) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 300_000, dtype=np.uint64).astype(np.uint32)
    ties = np.arange(65536, dtype=np.uint32) << 16 | 0x8000  # halfway between two bfloat16s
    special = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 3.4e38, 65519.9, 65520, 1e-45], "f4")
    wide = np.concatenate([bits.view(np.float32), ties.view(np.float32), special])
    out = np.empty(wide.size, dtype)
    conversion.narrow(wide, out)
    with np.errstate(all="ignore"):
        expected = wide.astype(dtype)  # ml_dtypes and numpy, one number at a time
    np.testing.assert_array_equal(out.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("dtype", [*HALVES, np.float32, np.float64, np.int32])
@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 3])
def test_reduce_rows_in_place_and_out(dtype: Any, count: int) -> None:
    rows = [((np.arange(count) * k) % 11 - 4).astype(dtype) for k in (1, 2, 3)]
    expected = sum(row.astype(np.float64) for row in rows)
    out = np.empty(count, dtype)
    operation("sum", dtype, 3, "test").reduce_rows(rows, out)
    assert (out.astype(np.float64) == expected).all()
    operation("sum", dtype, 3, "test").reduce_rows(rows, rows[1])  # into one of them
    assert (rows[1].astype(np.float64) == expected).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_sixteen_bit_sums_keep_what_each_addition_would_lose(dtype: Any) -> None:
    big, small = np.array([256.0], dtype), np.array([0.5], dtype)
    rows = [big, *[small] * 64]  # bfloat16 256 + 0.5 is 256; in float32, 64 of them make 32
    out = np.empty(1, dtype)
    operation("sum", dtype, 65, "test").reduce_rows(rows, out)
    assert float(out[0]) == 288.0


def test_the_divisor_is_asked_for_when_the_sum_is_there() -> None:
    divisor: list[float] = []
    op = mean_over(lambda: divisor[0])
    divisor.append(4.0)
    out = np.empty(3, np.float32)
    op.reduce_rows([np.full(3, 6.0, np.float32), np.full(3, 2.0, np.float32)], out)
    assert (out == 2).all()


@pytest.mark.parametrize(
    ("name", "dtype", "given"),
    [
        ("median", np.float32, "op"),
        ("mean", np.int32, "op"),
        ("max", np.complex64, "op"),
        ("sum", np.bool_, "op"),
        ("sum", np.dtype("U3"), "op"),
    ],
)
def test_what_cannot_be_reduced_is_refused(name: str, dtype: Any, given: str) -> None:
    with pytest.raises(ArgumentError, match=given):
        operation(name, np.dtype(dtype), 2, "allreduce()")


@pytest.mark.parametrize("version", ["1.26.4", "2.0.0"])
def test_overflow_is_no_warning_with_any_numpy(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np, "__version__", version)
    largest = np.full(3, np.finfo(np.float32).max)
    total = np.empty_like(largest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quietly()(np.add, largest, largest, out=total)
    assert np.isinf(total).all()
