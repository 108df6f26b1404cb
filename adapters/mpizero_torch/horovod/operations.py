"""What a reduction does, and the handles of operations under way."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch

from mpizero import ArgumentError
from mpizero_torch.horovod.negotiation import Handle


class ReduceOp(Enum):
    """How the ranks' tensors are combined, element by element."""

    Average = "mean"
    Sum = "sum"
    Adasum = "adasum"
    Min = "min"
    Max = "max"
    Product = "product"

    def __str__(self) -> str:
        return self.name


Average = ReduceOp.Average
Sum = ReduceOp.Sum
Adasum = ReduceOp.Adasum
Min = ReduceOp.Min
Max = ReduceOp.Max
Product = ReduceOp.Product


def chosen(function: str, op: ReduceOp | None, average: bool | None = None) -> ReduceOp:
    """The operation asked for: by ``op``, or as it once was, by ``average``."""
    if op is not None and average is not None:
        raise ArgumentError(
            function, "average", f"{average}, beside op={op}", "op alone, which came in its place"
        )
    if op is None:
        return Sum if average is False else Average
    if not isinstance(op, ReduceOp):
        raise ArgumentError(function, "op", repr(op), f"hvd.{', hvd.'.join(ReduceOp.__members__)}")
    return op


def poll(handle: Handle) -> bool:
    """True if ``synchronize(handle)`` would return at once.

    Where the operation has not been carried out the other ranks are waited for, until each of them
    waits, or polls, too.
    """
    return _checked(handle, "poll").poll()


def synchronize(handle: Handle) -> Any:
    """Wait for an asynchronous operation; returns its result, or raises what it raised."""
    return _checked(handle, "synchronize").wait()


def form(tensor: torch.Tensor, rows: bool = False) -> str:
    """A tensor in words; ``rows``: without the first dimension, which may differ."""
    shape: Any = tuple(tensor.shape)
    if rows:
        shape = f"(any{''.join(f', {extent}' for extent in shape[1:])})"
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {shape}" + ("" if tensor.device.type == "cpu" else f" on {tensor.device.type}")


def forms(tensors: Sequence[torch.Tensor], rows: bool = False) -> str:
    return "; ".join(form(each, rows) for each in tensors)


def checked_tensors(function: str, argument: str, tensors: Any) -> list[torch.Tensor]:
    """The list of tensors. ArgumentError for anything else, sparse ones among them."""
    listed = list(tensors)
    for each in listed:
        if not isinstance(each, torch.Tensor) or each.layout is not torch.strided:
            given = f"a {type(each).__name__}"
            if isinstance(each, torch.Tensor):
                given = f"a tensor of layout {each.layout}"
            raise ArgumentError(function, argument, given, "dense torch tensors")
    return listed


def _checked(handle: Any, function: str) -> Handle:
    if not isinstance(handle, Handle):
        raise ArgumentError(
            f"hvd.{function}()", "handle", repr(handle), "what an ..._async function returned"
        )
    return handle
