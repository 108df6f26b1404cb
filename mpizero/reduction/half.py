"""float16 and bfloat16 to float32 and back, vectorised, rounding to nearest even.

numpy converts float16 in hardware where there is any, but ml_dtypes converts bfloat16 one number
at a time; as integers, a bfloat16 is the upper half of a float32, which numpy shifts at memory
speed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpizero.memory.dtypes import bfloat16


def widen(half: Any) -> Any:
    """A float32 copy of a 1-D float16 or bfloat16 array (numpy or CuPy); exact."""
    if half.dtype != bfloat16:
        return half.astype(np.float32)
    bits = half.view(np.uint16).astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def narrow(wide: Any, out: Any) -> None:
    """Round the 1-D float32 ``wide`` into the 16-bit ``out``; NaN stays NaN, overflow gives inf."""
    if out.dtype != bfloat16:
        with np.errstate(all="ignore"):
            out[...] = wide
        return
    bits = wide.view(np.uint32)
    # Nearest even: add one half of the last kept place, less one unless that place is odd.
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    out.view(np.uint16)[...] = rounded
    not_a_number = np.isnan(wide)
    if not_a_number.any():  # rounding could carry a NaN over into infinity
        out.view(np.uint16)[not_a_number] = 0x7FC0
