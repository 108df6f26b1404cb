"""Do the ranks hold the same, bit for bit? And which gradient was the first to go wrong?"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from mpizero import ArgumentError, MismatchError, MpizeroError, World
from mpizero.diagnostics.views import name
from mpizero.engine import SHARDED
from mpizero_torch import names, slices
from mpizero_torch.runtime import init
from mpizero_torch.sharding import ShardedModule, ShardedOptimizer
from mpizero_torch.torch_members import TorchMembers
from mpizero_torch.wrapper import DistributedModule


def assert_in_sync(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    *,
    world: World | None = None,
) -> None:
    """Raise MismatchError unless all ranks hold the same parameters and optimizer state, bitwise.

    Compares a hash (BLAKE2, 64 bits) of each parameter and buffer, and with ``optimizer`` of its
    state and settings (learning rates, ...). The error names the first that differs, which ranks
    hold what, and by how much. Of a sharded model what is sharded is nobody else's and is left out:
    the parameters under stage 3 without shared memory, and the optimizer's state. What ranks along
    a mesh's tensor axis hold whole is compared over them too. Collective; reads everything once,
    so about a second for each GB.

    ``model`` may be wrapped or not; ``world``: the ranks, by default the wrapped model's.
    """
    model = names.uncompiled(model)
    if world is None:
        world = model.world if isinstance(model, DistributedModule) else init()
    with world.telling():
        found = {key: _own(value) for key, value in _replicated(model, optimizer)}
    _compare(world, found)
    mesh = world.mesh
    if mesh is not None and world is mesh.replicas:
        # What tensor parallelism has not cut up is computed by each rank along its axis by itself.
        whole = {key: each for key, each in _replicated(model, None) if not slices.is_slice(each)}
        _compare(mesh.tp, whole)


def _compare(world: World, found: dict[str, Any]) -> None:
    if world.size == 1:
        return
    world.agree([f"{key}: {_form(value)}" for key, value in found.items()], "what is to be in sync")
    own = np.array([_hash(value) for value in found.values()], np.uint64)
    everyones = world.allgather(own.reshape(1, -1))
    differing = np.flatnonzero((everyones != everyones[0]).any(axis=0))
    if differing.size:
        first = int(differing[0])
        key = list(found)[first]
        _explain(world, key, found[key], everyones[:, first], differing.size, len(found))


@contextmanager
def detect_nonfinite(model: nn.Module) -> Iterator[None]:
    """In this context a backward pass stops where a gradient first is not finite.

    Raises MpizeroError from ``backward()``, on the rank where it happened and before it is averaged
    with the others', naming the parameter. For finding the cause: it reads every gradient once
    more. Not with a loss scale (``precision="fp16"``, GradScaler), under which gradients overflow
    now and then and the step is left out: ArgumentError.
    """
    model = names.uncompiled(model)
    if isinstance(model, ShardedModule) and model.scaling is not None:
        raise ArgumentError(
            "detect_nonfinite()", "model", "one with precision='fp16'", "fp32 or bf16",
            "Its loss scale leaves out steps whose gradients overflow.",
        )  # fmt: skip
    rank = model.world.rank if isinstance(model, DistributedModule) else init().rank
    inner = model.module if isinstance(model, DistributedModule) else model
    handles = [
        parameter.register_hook(_Check(key, rank))
        for key, parameter in names.named_parameters(inner)
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Check:
    def __init__(self, key: str, rank: int) -> None:
        self._key, self._rank = key, rank

    def __call__(self, gradient: torch.Tensor) -> None:
        wrong = ~torch.isfinite(gradient)
        if bool(wrong.any()):
            kind = "NaN" if bool(torch.isnan(gradient).any()) else "infinity"
            raise MpizeroError(
                f"the gradient of '{self._key}' has {kind} in {int(wrong.sum())} of "
                f"{gradient.numel()} elements on rank {self._rank}: the first of this backward "
                "pass there. What follows it in the forward pass has made it, or its loss."
            )


def _replicated(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, Any]]:
    """What every rank should have the same of, by name."""
    inner = model.module if isinstance(model, DistributedModule) else model
    is_cut = isinstance(model, ShardedModule) and model.state.memory.how == SHARDED
    apart = model.parameters_to_ignore if isinstance(model, TorchMembers) else set()
    if not is_cut:
        yield from (each for each in names.named_parameters(inner) if each[0] not in apart)
    yield from (each for each in names.named_buffers(inner) if each[0] not in apart)
    several = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    for one in several:
        yield from _of_optimizer(one, inner, apart)


def _of_optimizer(
    optimizer: Any, inner: nn.Module, apart: Collection[str]
) -> Iterator[tuple[str, Any]]:
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentError(
            "assert_in_sync()", "optimizer", f"a {type(optimizer).__qualname__}",
            "a torch.optim.Optimizer",
        )  # fmt: skip
    for at, group in enumerate(optimizer.param_groups):
        settings = {key: value for key, value in group.items() if key != "params"}
        yield f"the optimizer's group {at}", repr(sorted(settings.items()))
    if isinstance(optimizer, ShardedOptimizer):
        return
    known = {id(parameter): key for key, parameter in names.named_parameters(inner)}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            key = known.get(id(parameter), "a parameter that is not the model's")
            if key in apart:
                continue
            for what, value in sorted(optimizer.state.get(parameter, {}).items()):
                yield f"the optimizer's {what} of {key}", value


def _own(value: Any) -> Any:
    return slices.local(value) if isinstance(value, torch.Tensor) else value


def _form(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}, shape {tuple(value.shape)}"
    return type(value).__name__


def _hash(value: Any) -> int:
    is_tensor = isinstance(value, torch.Tensor)
    data: Any = _octets(value) if is_tensor else repr(value).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _octets(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()


def _explain(
    world: World, key: str, value: Any, hashes: np.ndarray[Any, Any], differing: int, count: int
) -> None:
    """Raise, on every rank, the error that says who holds what."""
    holders: dict[int, list[int]] = {}
    for rank, number in enumerate(hashes.tolist()):
        holders.setdefault(number, []).append(rank)
    theirs = world.gather_objects(_against_root(world, value))
    lines = []
    for ranks in holders.values():
        lines.append(f"  {name(ranks)}: {theirs[ranks[0]]}")
    raise MismatchError(
        f"assert_in_sync(): the ranks differ in '{key}', the first of {differing} of {count} "
        "compared:\n" + "\n".join(lines)
    ).told_by(world.rank == 0)


def _against_root(world: World, value: Any) -> str:
    """How this rank's value differs from rank 0's."""
    if not isinstance(value, torch.Tensor):
        return str(value)
    octets = _octets(value)
    theirs = octets.copy()
    world.broadcast(theirs)
    if world.rank == 0:
        return "its own"
    where = np.flatnonzero(theirs != octets)
    if not where.size:
        return "as rank 0's"
    mine = value.detach().cpu().contiguous().reshape(-1)
    other = torch.from_numpy(theirs).view(mine.dtype)
    at = int(where[0]) // max(1, mine.element_size())
    return (
        f"{int((mine != other).sum())} of {mine.numel()} elements differ from rank 0's, first at "
        f"{at}: {mine[at].item()} instead of {other[at].item()}"
    )
