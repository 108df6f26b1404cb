"""``allreduce``: combine tensors over the ranks; every rank gets the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mpizero import ArgumentError
from mpizero_torch.horovod.compression import Compression, Compressor
from mpizero_torch.horovod.negotiation import Handle
from mpizero_torch.horovod.operations import ReduceOp, checked_tensors, chosen
from mpizero_torch.horovod.process_set import ProcessSet, global_process_set
from mpizero_torch.horovod.reduce import ALLREDUCE, DIFFERENTIABLE, Reduction, submit_allreduce


def allreduce(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """The tensor combined over all ranks, element by element, as a new tensor.

    ``op``: Average (the default; of integers it is cut towards zero), Sum, Min, Max, Product or
    Adasum. ``average`` is its older form. ``prescale_factor`` multiplies the tensor before, and
    ``postscale_factor`` after. ``compression`` is what it travels as. ``name`` is what the ranks
    find it by if they call their operations in different orders.

    A gradient flows back through Average and Sum: it is reduced in the same way. Raises
    MismatchError, on all ranks, where dtype, shape or op differ, or where the ranks wait for
    different operations.
    """
    [result] = grouped_allreduce(
        [tensor], average, name, compression, op, prescale_factor, postscale_factor, process_set
    )
    return result


def allreduce_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """``allreduce`` in place; returns ``tensor``."""
    done: torch.Tensor = allreduce_async_(
        tensor, average, name, op, prescale_factor, postscale_factor, process_set
    ).wait()
    return done


def allreduce_async(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Submit an ``allreduce``; ``synchronize(handle)`` returns its result. (No gradient.)"""
    factors = prescale_factor, postscale_factor
    return _alone(_submit([tensor], average, name, op, *factors, process_set, False))


def allreduce_async_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Submit an ``allreduce_``; ``synchronize(handle)`` returns ``tensor``."""
    factors = prescale_factor, postscale_factor
    return _alone(_submit([tensor], average, name, op, *factors, process_set, True))


def grouped_allreduce(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[torch.Tensor]:
    """``allreduce`` of several tensors as one operation; small ones travel together."""
    with process_set.negotiation.refusing(ALLREDUCE, name):
        listed = checked_tensors("hvd.allreduce()", "tensor", tensors)
        reduction = Reduction(
            chosen("hvd.allreduce()", op, average), float(prescale_factor), float(postscale_factor)
        )
        pairs = [compression.compress(each) for each in listed]
    small = [each for each, _ in pairs]
    if torch.is_grad_enabled() and any(each.requires_grad for each in small):
        results = _AllReduce.apply(name, reduction, process_set, *small)  # type: ignore[no-untyped-call]
    else:
        results = submit_allreduce(small, reduction, name, process_set, False).wait()
    return [compression.decompress(r, ctx) for r, (_, ctx) in zip(results, pairs, strict=True)]


def grouped_allreduce_(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[torch.Tensor]:
    """``grouped_allreduce`` in place; returns ``tensors`` as a list."""
    factors = prescale_factor, postscale_factor
    done: list[torch.Tensor] = _submit(
        tensors, average, name, op, *factors, process_set, True
    ).wait()
    return done


def grouped_allreduce_async(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Submit a ``grouped_allreduce``; ``synchronize(handle)`` returns the list of results."""
    factors = prescale_factor, postscale_factor
    return _submit(tensors, average, name, op, *factors, process_set, False)


def grouped_allreduce_async_(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Submit a ``grouped_allreduce_``; ``synchronize(handle)`` returns the tensors."""
    factors = prescale_factor, postscale_factor
    return _submit(tensors, average, name, op, *factors, process_set, True)


def _submit(
    tensors: Sequence[torch.Tensor],
    average: bool | None,
    name: str | None,
    op: ReduceOp | None,
    prescale: float,
    postscale: float,
    process_set: ProcessSet,
    in_place: bool,
) -> Handle:
    with process_set.negotiation.refusing(ALLREDUCE, name):
        listed = checked_tensors("hvd.allreduce()", "tensor", tensors)
        reduction = Reduction(
            chosen("hvd.allreduce()", op, average), float(prescale), float(postscale)
        )
    return submit_allreduce(listed, reduction, name, process_set, in_place)


def _alone(handle: Handle) -> Handle:
    """The handle of a group of one, whose result is not a list."""
    return handle.then(lambda results: results[0])


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        name: str | None,
        reduction: Reduction,
        process_set: ProcessSet,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.how = None if name is None else f"{name}.gradient", reduction, process_set
        return tuple(submit_allreduce(tensors, reduction, name, process_set, False).wait())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        name, reduction, process_set = ctx.how
        if reduction.op not in DIFFERENTIABLE:
            raise ArgumentError(
                "hvd.allreduce()", "op", f"{reduction.op} for a tensor that requires a gradient",
                "Average or Sum; or tensor.detach()",
            )  # fmt: skip
        whole = [each.contiguous() for each in gradients]
        results = submit_allreduce(whole, reduction, name, process_set, False).wait()
        return None, None, None, *results
