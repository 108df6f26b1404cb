"""What of a parameter lies on this rank, where tensor parallelism has cut it up (torch's DTensor).

torch cuts the parameter along the mesh's tensor axis and computes with the slices; what is
replicated or sharded over the data axis is then this rank's slice: a plain tensor,
``local(parameter)``. Only this file knows how a DTensor holds it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mpizero import ArgumentError, World
from mpizero.checkpoint import Box


def is_slice(tensor: Any) -> bool:
    """Is it a DTensor? (Not imported for this: where it is not, there are none.)"""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_slice_type(kind: type) -> bool:
    """Are its objects DTensors?"""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and issubclass(kind, module.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of it that is on this rank: the tensor itself, or a DTensor's own part."""
    if not is_slice(tensor):
        return tensor
    found: Any = tensor
    own: torch.Tensor = found._local_tensor
    return own


def box(tensor: torch.Tensor) -> Box:
    """Where in the whole tensor this rank's part is."""
    if not is_slice(tensor):
        return Box.of_all(tuple(tensor.shape))
    found: Any = tensor
    offsets, sizes = [0] * tensor.dim(), list(tensor.shape)
    coordinates = found.device_mesh.get_coordinate()
    for axis, (placement, at) in enumerate(zip(found.placements, coordinates, strict=True)):
        if placement.is_shard():
            # As torch.chunk deals out: equal parts, the last ones smaller or empty.
            dim, ranks = placement.dim, found.device_mesh.size(axis)
            part = -(-sizes[dim] // ranks)
            start = min(at * part, sizes[dim])
            offsets[dim] += start
            sizes[dim] = min(part, sizes[dim] - start)
    return Box(tuple(tensor.shape), tuple(offsets), tuple(sizes))


def copy_number(tensor: torch.Tensor, world: World) -> int:
    """Of the ranks of ``world``'s mesh that see the same data: how many before this one hold it?

    0 for exactly one of those that hold the same part of the tensor.
    """
    mesh = world.mesh
    if not is_slice(tensor):
        return 0 if mesh is None else mesh.tp.rank
    found: Any = tensor
    number = 0
    coordinates = found.device_mesh.get_coordinate()
    for axis, (placement, at) in enumerate(zip(found.placements, coordinates, strict=True)):
        if not placement.is_shard():
            number = number * found.device_mesh.size(axis) + at
    return number


def wrap(own: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor as such a one: a DTensor cut as ``like`` is, if it is one."""
    return put_together(own, cut_of(like))


def cut_of(tensor: torch.Tensor) -> Any:
    """How a DTensor is cut, without its memory; None for other tensors."""
    if not is_slice(tensor):
        return None
    found: Any = tensor
    return found.device_mesh, found.placements, found.shape, found.stride()


def put_together(own: torch.Tensor, cut: Any) -> torch.Tensor:
    """This rank's part, and how all of it is cut, as a DTensor; without a cut the tensor itself."""
    if cut is None:
        return own
    mesh, placements, shape, stride = cut
    kind = sys.modules["torch.distributed.tensor"].DTensor
    found: torch.Tensor = kind.from_local(
        own, mesh, placements, run_check=False, shape=shape, stride=stride
    )
    return found


def move(parameter: nn.Parameter, memory: torch.Tensor) -> None:
    """Let this rank's part of the parameter lie in ``memory``, of the same shape."""
    if not is_slice(parameter):
        parameter.data = memory
        return
    slot: Any = parameter
    if memory.dtype == parameter.dtype:
        slot._local_tensor = memory
    else:
        made = nn.Parameter(wrap(memory, parameter), parameter.requires_grad)
        # In place: optimizers and tied modules go on with the parameter they know.
        torch.utils.swap_tensors(parameter, made)


def local_gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    """This rank's part of the gradient, for its part of the parameter.

    A gradient may be cut in another way than its parameter, or be a sum of which each rank has a
    term (of a replicated parameter that saw a part of a sequence): then the ranks along the tensor
    axis exchange it. Collective over them in that case.
    """
    gradient = parameter.grad
    if gradient is None or not is_slice(gradient):
        return gradient
    found: Any = gradient
    form: Any = parameter
    if found.placements != form.placements:
        found = found.redistribute(placements=form.placements)
    own: torch.Tensor = found._local_tensor
    return own


def check(function: str, named: Sequence[tuple[str, torch.Tensor]], world: World) -> None:
    """Refuse what cannot be right: slices that are to be averaged with other slices.

    Raises ArgumentError for a world that is only a part of the replicas of a mesh, or has the ranks
    in it that hold other slices; for tensors without memory; for sums that are not finished.
    """
    mesh = world.mesh
    if mesh is not None and world is not mesh.replicas:
        raise ArgumentError(
            function, "world", f"ranks of {mesh!r} that are not all of those with the same part",
            "mesh.replicas, which is mesh.dp where sp is 1",
            "Gradients have to be averaged over all ranks that see other data.",
        )  # fmt: skip
    for name, tensor in named:
        if is_slice(tensor):
            _check_slice(function, name, tensor, world)


def _check_slice(function: str, name: str, tensor: Any, world: World) -> None:
    others = set(tensor.device_mesh.mesh.flatten().tolist()) - {world.job_ranks[world.rank]}
    mesh = world.mesh
    if others and (mesh is None or not others <= set(mesh.tp.job_ranks)):
        raise ArgumentError(
            function, "world", f"ranks among which others hold other slices of '{name}'",
            "the replicas of a mesh along whose tensor axis the model is distributed",
            "mesh = mz.mesh(tp=...); parallelize_module(model, mesh.device_mesh['tp'], ...); "
            "then world=mesh.replicas.",
        )  # fmt: skip
    if tensor.is_meta:
        raise ArgumentError(
            function, "model", f"one whose '{name}' is distributed and has no memory",
            "distributed parameters that have values",
            "mz.deferred() is for models without tensor parallelism.",
        )  # fmt: skip
    kinds = [type(each).__name__ for each in tensor.placements]
    wrong = [kind for kind in kinds if kind not in ("Shard", "Replicate")]
    if wrong:
        raise ArgumentError(
            function, "model", f"one whose '{name}' is placed as {wrong[0]}", "Shard or Replicate"
        )
