"""``alltoall``: from every rank to every rank another part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mpizero import ArgumentError, World
from mpizero_torch.horovod.negotiation import Handle
from mpizero_torch.horovod.operations import checked_tensors, forms
from mpizero_torch.horovod.process_set import ProcessSet, global_process_set

ALLTOALL = "alltoall"

Splits = torch.Tensor | Sequence[int] | None


def alltoall(
    tensor: torch.Tensor,
    splits: Splits = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Send the r-th part of the tensor's rows to rank r, for all r.

    ``splits``: how many rows go to each rank, in their order; by default equally many. Returns the
    rows that came from rank 0, 1, ...; with ``splits`` also a tensor that says how many came from
    each. A gradient goes back to where its row came from.
    """
    with process_set.negotiation.refusing(ALLTOALL, name):
        counts = _counts(tensor, splits, process_set)
    if torch.is_grad_enabled() and tensor.requires_grad:
        pair = _AllToAll.apply(tensor, counts, name, process_set)  # type: ignore[no-untyped-call]
    else:
        pair = _submit(tensor, counts, name, process_set).wait()
    return _answer(pair, splits)


def alltoall_async(
    tensor: torch.Tensor,
    splits: Splits = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Submit an ``alltoall``; ``synchronize(handle)`` returns its result. (No gradient.)"""
    with process_set.negotiation.refusing(ALLTOALL, name):
        counts = _counts(tensor, splits, process_set)
    return _submit(tensor, counts, name, process_set).then(lambda pair: _answer(pair, splits))


def _answer(pair: tuple[torch.Tensor, torch.Tensor], splits: Splits) -> Any:
    result, received = pair
    if splits is None:
        return result
    dtype = splits.dtype if isinstance(splits, torch.Tensor) else torch.int32
    return result, received.to(dtype)


def _counts(tensor: torch.Tensor, splits: Splits, process_set: ProcessSet) -> list[int]:
    function = "hvd.alltoall()"
    checked_tensors(function, "tensor", [tensor])
    size = process_set.size()
    rows = len(tensor) if tensor.ndim else 0
    if splits is None:
        if tensor.ndim == 0 or rows % size:
            raise ArgumentError(
                function, "tensor", f"of shape {tuple(tensor.shape)}, without splits",
                f"one whose first dimension is a multiple of the {size} ranks",
            )  # fmt: skip
        return [rows // size] * size
    counts = [int(each) for each in splits]
    if len(counts) != size or sum(counts) != rows or min(counts) < 0:
        raise ArgumentError(
            function, "splits", str(counts), f"{size} numbers >= 0 whose sum is the {rows} rows"
        )
    return counts


def _submit(
    tensor: torch.Tensor, counts: list[int], name: str | None, process_set: ProcessSet
) -> Handle:
    negotiation = process_set.negotiation
    own = tensor.detach()

    def work(world: World) -> tuple[torch.Tensor, torch.Tensor]:
        sent = torch.tensor(counts)
        received = torch.empty_like(sent)
        world.all_to_all(sent, out=received)
        with world.telling():
            result = own.new_empty((int(received.sum()), *own.shape[1:]))
        world.all_to_all_uneven(own, counts, out=result, out_counts=received.tolist())
        return result, received

    words = forms([own], rows=True)
    return negotiation.submit(Handle(ALLTOALL, negotiation.name(ALLTOALL, name), words, work))


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tensor: torch.Tensor,
        counts: list[int],
        name: str | None,
        process_set: ProcessSet,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result, received = _submit(tensor, counts, name, process_set).wait()
        ctx.how = received.tolist(), None if name is None else f"{name}.gradient", process_set
        ctx.mark_non_differentiable(received)
        return result, received

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        result, _back = _submit(gradient.contiguous(), *ctx.how).wait()
        return result, None, None, None
