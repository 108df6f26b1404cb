"""All-reduce and reduce-scatter of tensors, alone and in groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpizero import ArgumentError, World
from mpizero_torch.horovod.adasum import adasum_
from mpizero_torch.horovod.negotiation import Handle, stand_in
from mpizero_torch.horovod.operations import (
    Adasum,
    Average,
    Max,
    Min,
    Product,
    ReduceOp,
    Sum,
    forms,
)
from mpizero_torch.horovod.process_set import ProcessSet
from mpizero_torch.replicate import packs

ALLREDUCE, REDUCESCATTER = "allreduce", "reducescatter"


@dataclass(frozen=True)
class Reduction:
    """An operation, and by what the tensors are multiplied before it and after."""

    op: ReduceOp
    prescale: float = 1.0
    postscale: float = 1.0

    def __str__(self) -> str:
        return f"{self.op}, prescale {self.prescale:g}, postscale {self.postscale:g}"


def submit_allreduce(
    tensors: Sequence[torch.Tensor],
    reduction: Reduction,
    name: str | None,
    process_set: ProcessSet,
    in_place: bool,
) -> Handle:
    """Submit the reduction of these tensors; what is waited for is the list of results."""
    negotiation = process_set.negotiation
    results = [each.detach() if in_place else each.detach().clone() for each in tensors]
    originals = list(tensors) if in_place else results

    def work(world: World) -> list[torch.Tensor]:
        reduce_(world, results, reduction)
        return originals

    told = reduction, [(each.dtype, tuple(each.shape), each.device.type) for each in results]
    words = f"{forms(results)}; {reduction}"
    return negotiation.submit(
        Handle(ALLREDUCE, negotiation.name(ALLREDUCE, name), words, work, told)
    )


@torch.no_grad()
def reduce_(world: World, tensors: Sequence[torch.Tensor], reduction: Reduction) -> None:
    """Combine each tensor over the ranks, in place. Collective."""
    for each in tensors:
        scale_(each, reduction.prescale)
    if reduction.op is Adasum:
        adasum_(world, tensors)
    else:
        for pack in packs(tensors):
            _reduce_pack(world, pack, _carried_out(reduction, pack[0]))
    for each in tensors:
        scale_(each, _factor(reduction, each, world))


def _carried_out(reduction: Reduction, tensor: torch.Tensor) -> str:
    """The core's operation; the average of integers is their sum, scaled afterwards."""
    is_sum = reduction.op is Average and _is_exact(tensor)
    return Sum.value if is_sum else reduction.op.value


def _factor(reduction: Reduction, tensor: torch.Tensor, world: World) -> float:
    """By what the result of ``_carried_out`` is multiplied: as Horovod does it, all at once."""
    if reduction.op is Average and _is_exact(tensor):
        return reduction.postscale / world.size
    return reduction.postscale


def _is_exact(tensor: torch.Tensor) -> bool:
    return not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)


def scale_(tensor: torch.Tensor, factor: float) -> None:
    """Multiply, in place; integers in double precision, rounded towards zero."""
    if factor == 1.0:
        return
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.mul_(factor)
    else:
        tensor.copy_((tensor.double() * factor).to(tensor.dtype))


def _reduce_pack(world: World, pack: Sequence[torch.Tensor], op: str) -> None:
    if world.size == 1:
        return
    flat = pack[0] if len(pack) == 1 else torch.cat([each.reshape(-1) for each in pack])
    world.allreduce(flat, op)
    if len(pack) > 1:
        values = flat.split([each.numel() for each in pack])
        for each, value in zip(pack, values, strict=True):
            each.copy_(value.view_as(each))


def _stand_in(world: World, name: str, told: Any) -> None:
    """A rank that has joined brings what changes nothing."""
    reduction, shapes = told
    values = [_neutral(reduction.op, *each) for each in shapes]
    reduce_(world, values, Reduction(reduction.op))


stand_in(ALLREDUCE, _stand_in)


def _neutral(op: ReduceOp, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> torch.Tensor:
    value: Any = 0
    if op is Product:
        value = 1
    elif op in (Min, Max):
        if dtype.is_floating_point:
            value = float("inf") if op is Min else float("-inf")
        elif dtype is torch.bool:
            value = op is Min
        else:
            info = torch.iinfo(dtype)
            value = info.max if op is Min else info.min
    return torch.full(shape, value, dtype=dtype, device=device)


def submit_reducescatter(
    tensors: Sequence[torch.Tensor],
    reduction: Reduction,
    name: str | None,
    process_set: ProcessSet,
) -> Handle:
    """Submit the reduction of these tensors, of which each rank gets its part of the rows."""
    negotiation = process_set.negotiation
    for each in tensors:
        if each.ndim == 0:
            raise ArgumentError(
                "hvd.reducescatter()", "tensor", "a tensor without dimensions", "tensors with rows"
            )
    own = [each.detach().clone() for each in tensors]

    def work(world: World) -> list[torch.Tensor]:
        return [_reduce_scatter(world, each, reduction) for each in own]

    words = f"{forms(own)}; {reduction}"
    return negotiation.submit(
        Handle(REDUCESCATTER, negotiation.name(REDUCESCATTER, name), words, work)
    )


def rows_of(rank: int, rows: int, ranks: int) -> int:
    """How many of ``rows`` a rank gets: the first ones get one more where they do not divide."""
    return rows // ranks + (rank < rows % ranks)


@torch.no_grad()
def _reduce_scatter(world: World, tensor: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    """This rank's rows of the combined ``tensor``, which is changed."""
    rows = [rows_of(rank, len(tensor), world.size) for rank in range(world.size)]
    scale_(tensor, reduction.prescale)
    if world.size == 1:
        part = tensor
    elif reduction.op is Adasum:  # goes by whole gradients: how long they are, and how they lie
        adasum_(world, [tensor])
        part = tensor.split(rows)[world.rank].clone()
    else:
        most = rows[0]
        if rows[-1] != most:  # all parts as long as the first; what they lack does not matter
            padded = tensor.new_zeros((world.size, most, *tensor.shape[1:]))
            for place, piece in zip(padded, tensor.split(rows), strict=True):
                place[: len(piece)].copy_(piece)
            tensor = padded.flatten(0, 1)
        part = tensor.new_empty((most, *tensor.shape[1:]))
        world.reduce_scatter(tensor, _carried_out(reduction, tensor), out=part)
        part = part[: rows[world.rank]].clone() if rows[world.rank] < most else part
    scale_(part, _factor(reduction, part, world))
    return part


# What a gradient comes back through, where it can.
DIFFERENTIABLE = (Average, Sum)
