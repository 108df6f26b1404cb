"""Arrays and operations for tests of collectives, and what numpy makes of them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

FLOATS = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.longdouble)
INTEGERS = tuple(np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8))
DTYPES = tuple(np.dtype(d) for d in (*FLOATS, *INTEGERS, np.complex64, np.complex128, np.bool_))
OPERATIONS = ("sum", "mean", "max", "min", "product")


def allowed(op: str, dtype: Any) -> bool:
    """Is ``op`` defined for arrays of ``dtype``?"""
    dtype = np.dtype(dtype)
    if dtype == np.bool_:
        return op in ("max", "min")
    if dtype.kind == "c":
        return op not in ("max", "min")
    return not (op == "mean" and dtype.kind in "iu")


reductions = st.tuples(st.sampled_from(OPERATIONS), st.sampled_from(DTYPES)).filter(
    lambda pair: allowed(*pair)
)
shapes = st.one_of(
    st.just(()),
    st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple),
    st.integers(0, 3000).map(lambda n: (n,)),
)


def values(rank: int, shape: tuple[int, ...], dtype: Any, seed: int) -> np.ndarray:
    """Numbers of moderate size, other ones on each rank."""
    rng = np.random.default_rng((seed, rank))
    dtype = np.dtype(dtype)
    if dtype == np.bool_:
        return np.asarray(rng.integers(0, 2, shape)).astype(bool)
    if dtype.kind in "iu":
        low = 0 if dtype.kind == "u" else -5
        return np.asarray(rng.integers(low, 6, shape)).astype(dtype)
    real = np.asarray(rng.normal(size=shape))
    if dtype.kind == "c":
        return np.asarray(real + 1j * rng.normal(size=shape)).astype(dtype)
    return np.asarray(real).astype(np.float32).astype(dtype)


def reduced(everyone: list[np.ndarray], op: str) -> np.ndarray:
    """What the reduction should give, from all ranks' arrays."""
    dtype = everyone[0].dtype
    half = dtype in (np.float16, ml_dtypes.bfloat16)
    stack = np.stack([e.astype(np.float64) if half else e for e in everyone])
    with np.errstate(all="ignore"):
        if op == "mean":
            return (stack.sum(axis=0) / len(everyone)).astype(dtype)
        functions = {"sum": np.add, "product": np.multiply, "max": np.maximum, "min": np.minimum}
        return functions[op].reduce(stack, axis=0, dtype=stack.dtype).astype(dtype)


def assert_close(got: np.ndarray, everyone: list[np.ndarray], op: str) -> None:
    """Equal, up to the rounding of n numbers combined in another order."""
    expected = reduced(everyone, op)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    if got.dtype.kind in "iub" or op in ("max", "min"):
        np.testing.assert_array_equal(got.astype(np.float64), expected.astype(np.float64))
        return
    # 16-bit floats are summed in float32 and rounded once: one unit, where the exact value lies
    # on the edge. The others: n roundings of the largest partial result.
    half = {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(got.dtype.name)
    unit = half or np.finfo(got.dtype).eps * 2 * len(everyone)
    wide = np.complex128 if got.dtype.kind == "c" else np.float64
    magnitude = np.sum([np.abs(e.astype(wide)) for e in everyone], axis=0)
    if op == "product":
        magnitude = np.abs(expected.astype(wide)) * 4
    error = np.abs(got.astype(wide) - expected.astype(wide))
    assert np.all(error <= unit * magnitude + 1e-7 * bool(half)), (error.max(), op, got.dtype)
