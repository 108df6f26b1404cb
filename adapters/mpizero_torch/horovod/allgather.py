"""``allgather``: the ranks' tensors behind one another, on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mpizero import World
from mpizero_torch.horovod.negotiation import Handle
from mpizero_torch.horovod.operations import Average, checked_tensors, forms
from mpizero_torch.horovod.process_set import ProcessSet, global_process_set
from mpizero_torch.horovod.reduce import Reduction, submit_allreduce
from mpizero_torch.tensors import as_tensor

ALLGATHER = "allgather"


def allgather(
    tensor: torch.Tensor, name: str | None = None, process_set: ProcessSet = global_process_set
) -> torch.Tensor:
    """The ranks' tensors put behind one another along the first dimension, on every rank.

    ``tensor``: shape (k, ...), k differing between the ranks; one number counts as one row. A
    gradient flows back: the average over the ranks of what belongs to this rank's rows.
    """
    [result] = grouped_allgather([tensor], name, process_set)
    return result


def allgather_async(
    tensor: torch.Tensor, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle:
    """Submit an ``allgather``; ``synchronize(handle)`` returns its result. (No gradient.)"""
    return grouped_allgather_async([tensor], name, process_set).then(lambda results: results[0])


def grouped_allgather(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> list[torch.Tensor]:
    """``allgather`` of several tensors as one operation."""
    with process_set.negotiation.refusing(ALLGATHER, name):
        listed = checked_tensors("hvd.allgather()", "tensor", tensors)
    if torch.is_grad_enabled() and any(each.requires_grad for each in listed):
        return list(_AllGather.apply(name, process_set, *listed))  # type: ignore[no-untyped-call]
    results, _ = submit_allgather(listed, name, process_set).wait()
    return list(results)


def grouped_allgather_async(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Submit a ``grouped_allgather``; ``synchronize(handle)`` returns the list of results."""
    with process_set.negotiation.refusing(ALLGATHER, name):
        listed = checked_tensors("hvd.allgather()", "tensor", tensors)
    return submit_allgather(listed, name, process_set).then(lambda pair: pair[0])


def submit_allgather(
    tensors: Sequence[torch.Tensor], name: str | None, process_set: ProcessSet
) -> Handle:
    """Submit the gathering of these tensors.

    What is waited for are the results, and in which row of each this rank's own ones begin.
    """
    negotiation = process_set.negotiation
    rows = [_as_rows(each.detach()) for each in tensors]
    told = [(each.dtype, tuple(each.shape[1:]), each.device.type) for each in rows]
    return negotiation.submit(
        Handle(
            ALLGATHER,
            negotiation.name(ALLGATHER, name),
            forms(rows, rows=True),
            lambda world: _gather(world, rows),
            told,
        )
    )


def _gather(world: World, rows: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Sequence[int]]:
    counts = torch.tensor([[len(each) for each in rows]])
    every = torch.as_tensor(world.allgather(counts))
    return [gather_rows(world, each) for each in rows], every[: world.rank].sum(0).tolist()


def gather_rows(world: World, tensor: torch.Tensor) -> torch.Tensor:
    """All ranks' rows, of which each may have another number. Collective."""
    if world.size == 1:
        return tensor.clone()
    return as_tensor(world.allgather_uneven(tensor))


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(1) if tensor.ndim == 0 else tensor


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str | None, process_set: ProcessSet, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.how = None if name is None else f"{name}.gradient", process_set
        ctx.shapes = [each.shape for each in tensors]
        results, ctx.starts = submit_allgather(tensors, name, process_set).wait()
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        name, process_set = ctx.how
        whole = [each.contiguous() for each in gradients]
        reduced = submit_allreduce(whole, Reduction(Average), name, process_set, False).wait()
        mine = [
            each[start : start + shape[0]] if shape else each[start].reshape(())
            for each, start, shape in zip(reduced, ctx.starts, ctx.shapes, strict=True)
        ]
        return None, None, *mine
