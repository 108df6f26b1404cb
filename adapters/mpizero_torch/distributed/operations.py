"""torch's reduce operations as the core's."""

from __future__ import annotations

from typing import Any, NamedTuple

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
}
# For booleans a sum is a logical or, a product a logical and.
_OF_BOOLEANS = {"sum": "max", "product": "min"}


class Reduction(NamedTuple):
    """What the core calls an operation; by what a PREMUL_SUM multiplies first, None for others."""

    name: str
    factor: Any

    def source(self, tensor: torch.Tensor) -> torch.Tensor:
        """What is to be reduced: the tensor itself, unless it is to be multiplied first."""
        return tensor if self.factor is None else tensor.detach() * self.factor


# By number: torch's kinds are hashed and compared at ten times the cost.
_REDUCTIONS = {int(kind): Reduction(name, None) for kind, name in _NAMES.items()}
_PREMULTIPLIED = int(_Kind.PREMUL_SUM)


def reduction_of(opts: Any, tensor: torch.Tensor) -> Reduction:
    """What ``opts``, torch's options of a call or an operation, ask for on such a tensor."""
    op = getattr(opts, "reduceOp", opts)
    kind = int(op.op)
    found = Reduction("sum", op.factor) if kind == _PREMULTIPLIED else _REDUCTIONS[kind]
    if tensor.dtype is torch.bool:
        return found._replace(name=_OF_BOOLEANS.get(found.name, found.name))
    return found
