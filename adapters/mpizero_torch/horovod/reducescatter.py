"""``reducescatter``: combine tensors over the ranks; every rank gets its part of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mpizero import ArgumentError
from mpizero_torch.horovod.allgather import submit_allgather
from mpizero_torch.horovod.compression import Compression, Compressor
from mpizero_torch.horovod.negotiation import Handle
from mpizero_torch.horovod.operations import ReduceOp, Sum, checked_tensors, chosen
from mpizero_torch.horovod.process_set import ProcessSet, global_process_set
from mpizero_torch.horovod.reduce import (
    DIFFERENTIABLE,
    REDUCESCATTER,
    Reduction,
    scale_,
    submit_reducescatter,
)


def reducescatter(
    tensor: torch.Tensor,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: ReduceOp | None = None,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> torch.Tensor:
    """The part that is this rank's of the tensor combined over all ranks.

    ``tensor``: shape (k, ...), the same on all ranks. Rank r gets the r-th part of the k rows; the
    first ranks get one row more where k is no multiple of the number of ranks. ``op``: Average (the
    default), Sum, Min, Max, Product or Adasum; the rest as in ``allreduce``.

    A gradient flows back through Average and Sum: those of all ranks' parts, put together (for Sum
    times the number of ranks, as Horovod's is).
    """
    [result] = grouped_reducescatter(
        [tensor], name, compression, op, process_set, prescale_factor, postscale_factor
    )
    return result


def reducescatter_async(
    tensor: torch.Tensor,
    name: str | None = None,
    op: ReduceOp | None = None,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """Submit a ``reducescatter``; ``synchronize(handle)`` returns its result. (No gradient.)"""
    return grouped_reducescatter_async(
        [tensor], name, op, process_set, prescale_factor, postscale_factor
    ).then(lambda results: results[0])


def grouped_reducescatter(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: ReduceOp | None = None,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[torch.Tensor]:
    """``reducescatter`` of several tensors as one operation."""
    with process_set.negotiation.refusing(REDUCESCATTER, name):
        listed = checked_tensors("hvd.reducescatter()", "tensor", tensors)
        reduction = Reduction(
            chosen("hvd.reducescatter()", op), float(prescale_factor), float(postscale_factor)
        )
        pairs = [compression.compress(each) for each in listed]
    small = [each for each, _ in pairs]
    if torch.is_grad_enabled() and any(each.requires_grad for each in small):
        results = _ReduceScatter.apply(name, reduction, process_set, *small)  # type: ignore[no-untyped-call]
    else:
        results = submit_reducescatter(small, reduction, name, process_set).wait()
    return [compression.decompress(r, ctx) for r, (_, ctx) in zip(results, pairs, strict=True)]


def grouped_reducescatter_async(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    op: ReduceOp | None = None,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """Submit a ``grouped_reducescatter``; ``synchronize(handle)`` returns the list of results."""
    with process_set.negotiation.refusing(REDUCESCATTER, name):
        listed = checked_tensors("hvd.reducescatter()", "tensor", tensors)
        reduction = Reduction(
            chosen("hvd.reducescatter()", op), float(prescale_factor), float(postscale_factor)
        )
    return submit_reducescatter(listed, reduction, name, process_set)


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        name: str | None,
        reduction: Reduction,
        process_set: ProcessSet,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.how = None if name is None else f"{name}.gradient", reduction, process_set
        return tuple(submit_reducescatter(tensors, reduction, name, process_set).wait())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        name, reduction, process_set = ctx.how
        if reduction.op not in DIFFERENTIABLE:
            raise ArgumentError(
                "hvd.reducescatter()", "op",
                f"{reduction.op} for a tensor that requires a gradient",
                "Average or Sum; or tensor.detach()",
            )  # fmt: skip
        whole = submit_allgather([each.contiguous() for each in gradients], name, process_set)
        factor = reduction.prescale * reduction.postscale
        if reduction.op is Sum:
            factor *= process_set.size()
        results, _ = whole.wait()
        for each in results:
            scale_(each, factor)
        return None, None, None, *results
