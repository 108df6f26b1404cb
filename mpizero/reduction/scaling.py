"""Multiplying memory by a number, in place: 16-bit floats in float32, and rounded once."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpizero.memory.dtypes import is_half
from mpizero.reduction.half import narrow, widen
from mpizero.reduction.operation import BLOCK


def scale(flat: Any, factor: float) -> None:
    """``flat *= factor`` for a 1-D array (numpy or CuPy); by zero also where there is NaN."""
    if factor == 0.0:
        flat[...] = 0
        return
    if not is_half(flat.dtype):
        with np.errstate(all="ignore"):
            flat *= flat.dtype.type(factor)
        return
    for start in range(0, flat.size, BLOCK):
        block = flat[start : start + BLOCK]
        wide = widen(block)
        with np.errstate(all="ignore"):
            wide *= np.float32(factor)
        narrow(wide, block)
