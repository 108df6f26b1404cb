"""``broadcast``: one rank's tensor, on every rank."""

from __future__ import annotations

from typing import Any

import torch

from mpizero import World
from mpizero_torch.horovod.negotiation import Handle
from mpizero_torch.horovod.operations import Average, checked_tensors, forms
from mpizero_torch.horovod.process_set import ProcessSet, global_process_set
from mpizero_torch.horovod.reduce import Reduction, submit_allreduce

BROADCAST = "broadcast"


def broadcast(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """The tensor of ``root_rank``, as a new tensor.

    ``root_rank`` counts all ranks, also in a process set, which it must be one of. Shape and dtype
    must be the same on all ranks. A gradient flows back to the root: the average over the ranks.
    """
    needs_gradient = isinstance(tensor, torch.Tensor) and tensor.requires_grad
    if torch.is_grad_enabled() and needs_gradient:
        result: torch.Tensor = _Broadcast.apply(tensor, root_rank, name, process_set)  # type: ignore[no-untyped-call]
    else:
        result = _submit(tensor, root_rank, name, process_set, False).wait()
    return result


def broadcast_(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """``broadcast`` in place; returns ``tensor``."""
    result: torch.Tensor = _submit(tensor, root_rank, name, process_set, True).wait()
    return result


def broadcast_async(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Submit a ``broadcast``; ``synchronize(handle)`` returns its result. (No gradient.)"""
    return _submit(tensor, root_rank, name, process_set, False)


def broadcast_async_(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Submit a ``broadcast_``; ``synchronize(handle)`` returns ``tensor``."""
    return _submit(tensor, root_rank, name, process_set, True)


def _submit(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None,
    process_set: ProcessSet,
    in_place: bool,
) -> Handle:
    negotiation = process_set.negotiation
    with negotiation.refusing(BROADCAST, name):
        checked_tensors("hvd.broadcast()", "tensor", [tensor])
        root = process_set.local(root_rank, "hvd.broadcast()")
        result = tensor.detach() if in_place else tensor.detach().clone()

    def work(world: World) -> torch.Tensor:
        world.broadcast(result, root)
        return tensor if in_place else result

    words = f"{forms([tensor])}; root_rank {root_rank}"
    return negotiation.submit(Handle(BROADCAST, negotiation.name(BROADCAST, name), words, work))


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, root_rank: int, name: str | None, process_set: ProcessSet
    ) -> torch.Tensor:
        ctx.how = None if name is None else f"{name}.gradient", process_set
        result: torch.Tensor = _submit(tensor, root_rank, name, process_set, False).wait()
        ctx.is_root = process_set.rank() == process_set.local(root_rank, "hvd.broadcast()")
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        name, process_set = ctx.how
        handle = submit_allreduce(
            [gradient.contiguous()], Reduction(Average), name, process_set, False
        )
        [result] = handle.wait()
        return result if ctx.is_root else torch.zeros_like(result), None, None, None
