"""Tensors as the core's arrays, one behind another, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mpizero_torch.tensors import as_array

# What numpy has a name for: these need no detour.
_DIRECT = frozenset(
    (torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool)
)


def array_of(tensor: torch.Tensor) -> Any:
    """The tensor's memory as an array. On a device, CuPy's current stream follows torch's."""
    if tensor.is_cpu and tensor.dtype in _DIRECT and not tensor.requires_grad:
        return tensor.numpy()
    return as_array(tensor.resolve_conj().resolve_neg())


def flat_array_of(tensor: torch.Tensor) -> Any:
    """``array_of``, one-dimensional: a view of contiguous memory, else a copy."""
    return array_of(tensor).reshape(-1)


def one_behind_another(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The elements of all, as one new tensor."""
    with torch.no_grad():
        return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def dealt_out(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
    """What puts the elements of ``flat`` back into the tensors."""

    def deal() -> None:
        parts = flat.split([tensor.numel() for tensor in tensors])
        with torch.no_grad():
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.detach().copy_(part.view(tensor.shape))

    return deal


def room_for(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """An uninitialised flat tensor for the elements of all."""
    first = tensors[0]
    return torch.empty(
        sum(tensor.numel() for tensor in tensors), dtype=first.dtype, device=first.device
    )


def share_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Do two tensors on the host overlap, or two on a device have one storage?"""
    if first.device.type == "cpu" and second.device.type == "cpu":
        return bool(np.may_share_memory(array_of(first), array_of(second)))
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
