"""torch's conversions of 16-bit floats, registered with the core.

They are faster than numpy's: ``benchmarks/half_conversions.py`` measures both.
"""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np
import torch

from mpizero.reduction import half
from mpizero.reduction.half import Conversion


def _tensor(array: Any) -> torch.Tensor:
    """An array that is only read, as a tensor of the same memory, even if it may not be written to.

    torch has no such tensors, and warns; JAX's arrays are of that kind.
    """
    if not array.flags.writeable and array.flags.c_contiguous:
        memory = (ctypes.c_byte * array.nbytes).from_address(array.ctypes.data)
        array = np.frombuffer(memory, array.dtype).reshape(array.shape)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _conversion(dtype: torch.dtype) -> Conversion:
    def widen(array: Any) -> Any:
        return _tensor(array.view(np.int16)).view(dtype).float().numpy()

    def narrow(wide: Any, out: Any) -> None:
        torch.from_numpy(out.view(np.int16)).view(dtype).copy_(_tensor(wide))

    return Conversion(widen, narrow)


TORCH = {
    np.dtype(ml_dtypes.bfloat16): _conversion(torch.bfloat16),
    np.dtype(np.float16): _conversion(torch.float16),
}


def register() -> None:
    """Let the core convert with torch from now on."""
    for dtype, conversion in TORCH.items():
        half.register(dtype, conversion)
