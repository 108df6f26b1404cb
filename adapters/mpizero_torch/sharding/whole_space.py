"""Memory for all of a space of sharded parameters, which is there only while it is needed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from mpizero_torch import slices, tensors

# By which tensors of the same memory know each other, whether it is there or not.
storage_address: Callable[[torch.Tensor], int] = vars(torch._C)["_storage_address"]

# May what autograd saves be seen? Not within the transforms of torch.func.
hooks_are_allowed: Callable[[], bool] = vars(torch._C._autograd)["_saved_tensors_hooks_is_enabled"]


class WholeSpace:
    """Memory in which parameters lie, which they keep as their own while it comes and goes.

    It may go only while nobody else holds it (``is_held``): views of a parameter, what autograd
    has kept of them, and numpy arrays all count as holders of the storage.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.flat = torch.empty(size, dtype=dtype, device=device)
        self._nbytes = self.flat.untyped_storage().nbytes()
        self._tenants: list[tuple[nn.Parameter, slice, tuple[int, ...]]] = []
        self.drop()

    @property
    def address(self) -> int:
        """What tells this memory from others, whether it is there or not."""
        return storage_address(self.flat)

    @property
    def is_held(self) -> bool:
        """Does anybody hold this memory beside the parameters that lie in it?"""
        storage = self.flat.untyped_storage()
        # Two: ``flat``, and the storage as it was just asked for.
        return bool(torch._C._storage_Use_Count(storage._cdata) > 2 + len(self._tenants))

    @property
    def nbytes(self) -> int:
        """How much memory is there now."""
        return int(self.flat.untyped_storage().nbytes())

    def drop(self) -> None:
        """Give the memory back, which nobody else holds any more."""
        if not self.flat.untyped_storage().resizable():
            # Somebody had taken it as a numpy array, for which it has to keep its size.
            self.flat = torch.empty_like(self.flat)
            for tenant in self._tenants:
                self._place(*tenant)
        self.flat.untyped_storage().resize_(0)

    def settle(self, parameter: nn.Parameter, place: slice, shape: tuple[int, ...]) -> None:
        """Let a parameter lie in it, and see the memory come and go."""
        self._tenants.append((parameter, place, shape))
        self.flat.untyped_storage().resize_(self._nbytes)
        self._place(parameter, place, shape)
        self.drop()

    def leave(self, parameter: nn.Parameter) -> bool:
        """A parameter moves out; returns whether nobody is left."""
        self._tenants = [tenant for tenant in self._tenants if tenant[0] is not parameter]
        return not self._tenants

    def _place(self, parameter: nn.Parameter, place: slice, shape: tuple[int, ...]) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            slices.move(parameter, self.flat[place].view(shape))

    def make(self) -> Any:
        """Take memory, where it is not there; returns it as an array of the core."""
        if self.nbytes != self._nbytes:
            self.flat.untyped_storage().resize_(self._nbytes)
        if self.flat.device.type != "cpu":
            return tensors.as_array(self.flat)
        # Not flat.numpy(): that would pin the storage to its size for good.
        memory = (ctypes.c_byte * self._nbytes).from_address(self.flat.data_ptr())
        return np.ctypeslib.as_array(memory).view(tensors.numpy_dtype(self.flat.dtype))

    def view(self, offset: int, size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of its memory, in the form that one had before."""
        if dtype == self.flat.dtype:
            return self.flat.as_strided(size, stride, offset)
        found = torch.empty(0, dtype=dtype, device=self.flat.device)
        return found.set_(self.flat.untyped_storage(), offset, size, stride)
