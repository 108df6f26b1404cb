"""float16 and bfloat16 to float32 and back, vectorised, rounding to nearest even.

numpy converts float16 in hardware where there is any, but ml_dtypes converts bfloat16 one number
at a time; as integers, a bfloat16 is the upper half of a float32, which numpy shifts at memory
speed. An adapter whose framework converts faster registers its functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpizero.memory.dtypes import bfloat16, float16


@dataclass(frozen=True)
class Conversion:
    """How one 16-bit dtype is converted, on 1-D numpy arrays.

    ``widen(half)`` gives a float32 copy, exact. ``narrow(wide, out)`` rounds the float32 ``wide``
    to the nearest into ``out``: NaN stays NaN, overflow gives inf.
    """

    widen: Callable[[Any], Any]
    narrow: Callable[[Any, Any], None]


def widen(half: Any) -> Any:
    """A float32 copy of a 1-D float16 or bfloat16 array (numpy or CuPy); exact."""
    return _conversion(half).widen(half)


def narrow(wide: Any, out: Any) -> None:
    """Round the 1-D float32 ``wide`` into the 16-bit ``out``; NaN stays NaN, overflow gives inf."""
    _conversion(out).narrow(wide, out)


def register(dtype: Any, conversion: Conversion) -> None:
    """Convert host arrays of ``dtype`` this way from now on (a framework's faster kernels)."""
    _registered[np.dtype(dtype)] = conversion


def _conversion(half: Any) -> Conversion:
    known = _registered if isinstance(half, np.ndarray) else BUILT_IN
    return known[np.dtype(half.dtype)]


def _widen_float16(half: Any) -> Any:
    return half.astype(np.float32)


def _narrow_float16(wide: Any, out: Any) -> None:
    with np.errstate(all="ignore"):
        out[...] = wide


def _widen_bfloat16(half: Any) -> Any:
    bits = half.view(np.uint16).astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def _narrow_bfloat16(wide: Any, out: Any) -> None:
    bits = wide.view(np.uint32)
    # Nearest even: add one half of the last kept place, less one unless that place is odd.
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    not_a_number = np.isnan(wide)  # rounding could carry a NaN over into infinity
    if not isinstance(wide, np.ndarray):  # to ask whether there is any, the host would have to wait
        rounded *= np.logical_not(not_a_number)
        rounded += not_a_number * np.uint32(0x7FC0)
        out.view(np.uint16)[...] = rounded
        return
    out.view(np.uint16)[...] = rounded
    if not_a_number.any():
        out.view(np.uint16)[not_a_number] = 0x7FC0


BUILT_IN = {
    float16: Conversion(_widen_float16, _narrow_float16),
    bfloat16: Conversion(_widen_bfloat16, _narrow_bfloat16),
}
_registered = dict(BUILT_IN)
