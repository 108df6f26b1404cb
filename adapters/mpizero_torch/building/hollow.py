"""Tensors that have a form and no memory of their own, and what they are until they have it.

To torch they are tensors on the CPU, which lie in one range of addresses that nothing stands
behind: it takes no memory, and to read or write there would crash the process. (On torch's meta
device they would be of another device than in ordinary building, and could not be given memory in
place.)
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

import numpy as np
import torch

from mpizero import MpizeroError

_NO_ACCESS = 0  # PROT_NONE


class Nothing:
    """A range of addresses without memory, which any number of tensors may claim."""

    def __init__(self) -> None:
        self._range: Any = None
        self._size = 0

    def storage(self, nbytes: int) -> torch.UntypedStorage:
        """A storage of this many bytes, and of none."""
        if nbytes > self._size:
            self._size = max(nbytes, 1 << 20)
            kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._range = mmap.mmap(-1, self._size, kind, _NO_ACCESS)
        address = np.frombuffer(self._range, np.uint8).ctypes.data
        octets = (ctypes.c_byte * max(1, nbytes)).from_address(address)
        octets.range = self._range  # type: ignore[attr-defined]  # which lives as long as they do
        return torch.frombuffer(octets, dtype=torch.uint8).untyped_storage()


class Hollow(torch.Tensor):
    """What a tensor without values is, outside of ``mz.deferred()``: it explains itself."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", str(function))
        reads = getattr(function, "__self__", None) is torch.Tensor.data and name == "__get__"
        if reads or name not in _OF_FORM:
            raise MpizeroError(
                f"{name}() on a tensor of shape {_shape_of(args)}, which was made in "
                "mz.deferred() and has no values yet: mz.zero() gives them to a model's "
                "parameters. Initialise and change a model inside `with mz.deferred():`, or "
                "after mz.zero() inside `with mz.gathered(model, modify=True):`."
            )
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"<deferred tensor of shape {tuple(self.shape)}, {self.dtype}>"

    def __deepcopy__(self, memo: Any) -> Any:
        return self.__torch_function__(torch.Tensor.__deepcopy__, (type(self),), (self,))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__torch_function__(torch.Tensor.__reduce_ex__, (type(self),), (self,))


# What may be asked of a tensor that has no values.
_OF_FORM = {
    "__get__", "__set__", "__delete__", "__hash__", "__len__", "size", "dim", "numel", "nelement",
    "element_size", "stride", "is_inference", "is_floating_point", "is_complex", "is_contiguous",
    "requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "empty_like",
    "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full",
    "storage_offset", "get_device", "is_conj", "is_neg", "is_shared", "ndimension",
}  # fmt: skip


def hide(tensor: torch.Tensor) -> None:
    """Let a tensor explain itself from here on."""
    kind = type(tensor)
    if not issubclass(kind, Hollow):
        tensor.__class__ = _hidden(kind)


def show(tensor: torch.Tensor) -> None:
    """Let it be of its own class again."""
    if issubclass(type(tensor), Hollow):
        tensor.__class__ = type(tensor).__mro__[2]


@cache
def _hidden(kind: type) -> type:
    """The class of a tensor of class ``kind`` while it has no values."""
    return type(f"Deferred{kind.__name__}", (Hollow, kind), {"__slots__": ()})


def _shape_of(args: Any) -> Any:
    leaves = torch.utils._pytree.tree_leaves(args)
    return next((tuple(each.shape) for each in leaves if isinstance(each, Hollow)), "unknown")
