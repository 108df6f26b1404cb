"""torch's reduce operations as the core's."""

from __future__ import annotations

from typing import Any

import torch

from mpizero_torch.distributed.c10d import ReduceOp

_Kind = ReduceOp.RedOpType

_NAMES = {
    _Kind.SUM: "sum",
    _Kind.AVG: "mean",
    _Kind.PRODUCT: "product",
    _Kind.MIN: "min",
    _Kind.MAX: "max",
    _Kind.BAND: "band",
    _Kind.BOR: "bor",
    _Kind.BXOR: "bxor",
    _Kind.PREMUL_SUM: "sum",
}
_PREMULTIPLIED = int(_Kind.PREMUL_SUM)
# For booleans a sum is a logical or, a product a logical and.
_OF_BOOLEANS = {"sum": "max", "product": "min"}


def operation_name(op: Any, tensor: torch.Tensor) -> str:
    """What the core calls ``op`` for such a tensor."""
    name = _NAMES[op.op]
    if tensor.dtype is torch.bool:
        return _OF_BOOLEANS.get(name, name)
    return name


def premultiplied(op: Any, tensor: torch.Tensor) -> torch.Tensor | None:
    """What is to be summed instead of the tensor for PREMUL_SUM; None for other operations."""
    if int(op.op) != _PREMULTIPLIED:
        return None
    product: torch.Tensor = tensor.detach() * op.factor
    return product
