"""Tensors as the core's arrays, and the other way round, without a copy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.utils.dlpack

from mpizero import World
from mpizero.memory.arrays import register_bridge
from mpizero.world.device import as_device_array

_NUMPY_OF = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.int16: np.int16,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
    torch.uint16: np.uint16,
    torch.uint32: np.uint32,
    torch.uint64: np.uint64,
    torch.bool: np.bool_,
    torch.complex64: np.complex64,
    torch.complex128: np.complex128,
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.float8_e5m2: ml_dtypes.float8_e5m2,
}
# What numpy itself has no name for goes by way of integers of the same width.
_INTEGERS = {
    torch.bfloat16: (torch.int16, np.int16),
    torch.float8_e4m3fn: (torch.int8, np.int8),
    torch.float8_e5m2: (torch.int8, np.int8),
}
_TORCH_OF = {np.dtype(theirs): ours for ours, theirs in _NUMPY_OF.items()}


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """The numpy dtype of a torch dtype; TypeError for those that have none (quantised ones)."""
    if dtype not in _NUMPY_OF:
        raise TypeError(f"tensors of {dtype} cannot be reduced; allowed: {list(_NUMPY_OF)}")
    found: np.dtype[Any] = np.dtype(_NUMPY_OF[dtype])
    return found


def has_numpy_dtype(dtype: torch.dtype) -> bool:
    """May tensors of it be reduced?"""
    return dtype in _NUMPY_OF


def torch_dtype(dtype: Any) -> torch.dtype:
    """The torch dtype of a numpy dtype."""
    return _TORCH_OF[np.dtype(dtype)]


def can_have_gradient(tensor: torch.Tensor) -> bool:
    """False for integers and booleans, which torch cannot differentiate by."""
    return tensor.is_floating_point() or tensor.is_complex()


def as_array(tensor: torch.Tensor) -> Any:
    """The tensor's memory as a numpy array (CPU) or a CuPy array (CUDA), any strides."""
    tensor = tensor.detach()
    if tensor.dtype in _INTEGERS:
        return as_array(tensor.view(_INTEGERS[tensor.dtype][0])).view(_NUMPY_OF[tensor.dtype])
    return tensor.numpy() if tensor.device.type == "cpu" else as_device_array(tensor)


def as_tensor(array: Any) -> torch.Tensor:
    """The memory of a numpy or CuPy array as a tensor."""
    dtype = _TORCH_OF.get(array.dtype)
    if dtype in _INTEGERS:
        return as_tensor(array.view(_INTEGERS[dtype][1])).view(dtype)
    if isinstance(array, np.ndarray):
        return torch.from_numpy(array)
    return torch.utils.dlpack.from_dlpack(array)


def zeros(world: World, count: int, dtype: Any, device: torch.device) -> Any:
    """Flat zeroed memory for communication on the tensors' device, as an array of the core."""
    if device.type == "cpu":
        return world.allocate(count, dtype)
    return as_array(torch.zeros(count, dtype=_TORCH_OF[np.dtype(dtype)], device=device))


def current_stream(device: torch.device) -> int | None:
    """torch's current CUDA stream on ``device``, raw; None on the CPU."""
    if device.type == "cpu":
        return None
    return int(torch.cuda.current_stream(device).cuda_stream)


def _stream_on(gpu: int) -> int:
    return int(torch.cuda.current_stream(gpu).cuda_stream)


register_bridge(lambda x: isinstance(x, torch.Tensor), as_array, _stream_on)
