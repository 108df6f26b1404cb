"""torch's conversions of 16-bit floats, registered with the core.

They are faster than numpy's: ``benchmarks/half_conversions.py`` measures both.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

from mpizero.reduction import half
from mpizero.reduction.half import Conversion


def _conversion(dtype: torch.dtype) -> Conversion:
    def widen(array: Any) -> Any:
        return torch.from_numpy(array.view(np.int16)).view(dtype).float().numpy()

    def narrow(wide: Any, out: Any) -> None:
        torch.from_numpy(out.view(np.int16)).view(dtype).copy_(torch.from_numpy(wide))

    return Conversion(widen, narrow)


TORCH = {
    np.dtype(ml_dtypes.bfloat16): _conversion(torch.bfloat16),
    np.dtype(np.float16): _conversion(torch.float16),
}


def register() -> None:
    """Let the core convert with torch from now on."""
    for dtype, conversion in TORCH.items():
        half.register(dtype, conversion)
