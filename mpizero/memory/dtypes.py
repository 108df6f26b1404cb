"""Which dtypes travel and which are summed, and how wide the sums are kept."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

bfloat16 = np.dtype(ml_dtypes.bfloat16)
float16 = np.dtype(np.float16)


def is_half(dtype: DTypeLike) -> bool:
    """True for the 16-bit floats, whose sums are kept in float32 and rounded once."""
    return np.dtype(dtype) in (bfloat16, float16)


def kind_of(dtype: DTypeLike) -> str:
    """ "float", "integer", "complex", "bool", or "other" (moved, never reduced)."""
    dtype = np.dtype(dtype)
    if is_half(dtype):
        return "float"
    return {"f": "float", "i": "integer", "u": "integer", "c": "complex", "b": "bool"}.get(
        dtype.kind, "other"
    )


def as_bytes(flat: Any) -> Any:
    """The same contiguous 1-D memory as uint8 (numpy or CuPy)."""
    return flat.view(np.uint8)
