"""``memory_report``: what a model's training holds, beside what theory and the kernel say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mpizero import ArgumentError, World
from mpizero.plan import State, part_of_rank
from mpizero_torch import slices
from mpizero_torch.ddp import DistributedDataParallel
from mpizero_torch.runtime import init
from mpizero_torch.sharding.module import ShardedModule
from mpizero_torch.sharding.optimizer import ShardedOptimizer
from mpizero_torch.wrapper import DistributedModule


@dataclass(frozen=True)
class Held:
    """Bytes by kind."""

    parameters: int
    gradients: int
    optimizer_state: int  # float32 copies of the parameters included
    buffers: int  # in which gradients are put together and parameters gathered; module buffers

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class MemoryReport:
    """What ``memory_report`` found, in bytes; the same on every rank.

    ``rank``: of the rank with most, where memory that its node shares counts as its part of it;
    ``node``: of the node with most. ``shared``: how much of ``node`` is in memory that its ranks
    can all address. ``formula``: what the ZeRO paper's formula gives for parameters, gradients and
    optimizer state of a rank, with this optimizer's state for each element (None where no
    optimizer was given or it has no state yet). ``kernel``: the proportional set size of all ranks
    of the node with most, everything included (None where the kernel does not tell).
    """

    strategy: str
    elements: int
    rank: Held
    node: Held
    shared: int
    formula: float | None
    kernel: int | None

    def __str__(self) -> str:
        small = self.node.total < 10 << 20  # tenths of MiB would say nothing
        unit, scale = ("KiB", 2**10) if small else ("MiB", 2**20)
        lines = [
            f"memory of {self.strategy}, {self.elements:,} parameters ({unit})",
            f"  {'':<18}{'a rank':>10}{'a node':>10}",
        ]
        for field in (*fields(Held), None):
            name = "total" if field is None else field.name
            pair = [getattr(held, name) / scale for held in (self.rank, self.node)]
            lines.append(f"  {name.replace('_', ' '):<18}{pair[0]:>10.1f}{pair[1]:>10.1f}")
        if self.formula is not None:
            lines.append(f"  {'by the formula':<18}{self.formula / scale:>10.1f}")
        lines.append(f"  of the node's, {self.shared / scale:.1f} in memory that its ranks share")
        if self.kernel is not None:
            lines.append(
                f"  the kernel counts {self.kernel / scale:.0f} for the node's processes, "
                "libraries and activations included"
            )
        return "\n".join(lines)


def memory_report(model: nn.Module, optimizer: Any = None) -> MemoryReport:
    """Count the bytes that training holds, on this rank and its node. Collective.

    ``model``: sharded, replicated or plain; ``optimizer``: its optimizer, or a list of several (a
    sharded model knows its own). Activations are not counted: they come and go with the batch.
    The formula (ZeRO, arXiv 1910.02054, sections 3 and 5): of parameters, gradients and optimizer
    state, those that the stage shards are divided by the number of ranks that share them;
    parameters in node-shared memory by the ranks of the node. Of a mesh all ranks take part:
    ``elements`` are the whole model's, and a rank's bytes those of its slices and its stage. Raises
    ArgumentError for an optimizer of another model.
    """
    if isinstance(model, ShardedModule):
        own_ones = {id(each) for each in model.optimizers}
        if not {id(each) for each in _listed(optimizer)} <= own_ones:
            raise ArgumentError("memory_report()", "optimizer", "another's", "this model's")
        own, common, whole_buffers, strategy = _of_sharded(model)
        world, formula = model.world, _formula_sharded(model)
        sharers = model.state.group.inner
    else:
        own, whole_buffers, strategy = _of_replica(model, optimizer)
        common, world = 0, model.world if isinstance(model, DistributedDataParallel) else init()
        sharers = world
        state = own.optimizer_state
        whole = State(own.parameters, own.parameters, 0, state)
        formula = part_of_rank(whole, stage=0, parts=1).total if state else None
    elements = _elements(model, world)
    return _combine(world, strategy, elements, own, common, sharers, whole_buffers, formula)


def _elements(model: nn.Module, world: World) -> int:
    """Of the whole model, whatever axes of a mesh have cut it up."""
    if not isinstance(model, DistributedModule) or world.mesh is None:
        return sum(parameter.numel() for parameter in model.parameters())
    own = [slices.box(parameter).count for _, parameter in model.named]
    spoken_for = sum(n for n, counted in zip(own, model.counts, strict=True) if counted)
    return int(world.mesh.model.allreduce(spoken_for))


def _combine(
    world: World,
    strategy: str,
    elements: int,
    own: Held,
    common: int,
    sharers: World,
    reachable: int,
    formula: float | None,
) -> MemoryReport:
    """``common``: bytes that ``sharers`` have once; ``reachable``: that others can read too."""
    everyone = world if world.mesh is None else world.mesh.world
    part = common // sharers.size
    rank = Held(own.parameters + part, own.gradients, own.optimizer_state, own.buffers)
    once = common if sharers.rank == 0 else 0
    sums = np.array([*(getattr(own, f.name) for f in fields(Held)), reachable + once, _pss() or 0])
    sums[0] += once
    totals = everyone.node.allreduce(sums.astype(np.int64))
    node = Held(*(int(each) for each in totals[:4]))
    largest = everyone.allreduce(
        np.array([*(getattr(h, f.name) for h in (rank, node) for f in fields(Held)),
                  int(totals[4]), int(totals[5])], np.int64), "max",
    )  # fmt: skip
    kernel = int(largest[9])
    most = everyone.allreduce(np.float64(-1.0 if formula is None else formula), "max")
    return MemoryReport(
        strategy,
        elements,
        Held(*map(int, largest[:4])),
        Held(*map(int, largest[4:8])),
        int(largest[8]),
        None if most < 0 else float(most),
        kernel or None,
    )


def _of_sharded(model: ShardedModule) -> tuple[Held, int, int, str]:
    state, sharder = model.state, model.sharder
    parameters, common, masters = state.parameter_bytes
    gradients = sharder.nbytes
    optimizer = masters + _state_bytes(model.optimizers)
    held = Held(
        parameters,
        gradients["gradients"] + model.held_bytes,
        optimizer,
        gradients["buffers"] + model.gathered_bytes + _buffer_bytes(model),
    )
    reachable = gradients["buffers"]
    if state.sharding.stage == 1:
        reachable += gradients["gradients"]
    return held, common, reachable, f"ZeRO stage {state.sharding.stage}"


def _of_replica(model: nn.Module, optimizer: Any) -> tuple[Held, int, str]:
    parameters = sum(slices.local(p).nbytes for p in model.parameters())
    gradients = sum(slices.local(p.grad).nbytes for p in model.parameters() if p.grad is not None)
    strategy, reachable = "one process", 0
    if isinstance(model, DistributedDataParallel):
        strategy = "replicas"
        gradients = max(gradients, model.bucket_bytes)
        reachable = model.bucket_bytes
    state = _state_bytes(_listed(optimizer))
    return Held(parameters, gradients, state, _buffer_bytes(model)), reachable, strategy


def _formula_sharded(model: ShardedModule) -> float | None:
    """Of a rank. Optimizer state is what this rank has, as if all had as much."""
    state, stage = model.state, model.state.sharding.stage
    per_shard = _state_bytes(model.optimizers)
    if not per_shard:
        return None
    parts = state.group.parts
    parameters = gradients = masters = 0.0
    for own in state.trained:
        count, itemsize = own.space.layout.size, own.space.layout.dtype.itemsize
        parameters += count * itemsize
        gradients += count * state.gradient_dtype(own.space).itemsize
        if state.memory.masters[own.number] is not None:
            masters += count * state.memory.masters[own.number].itemsize
    parameters += sum(
        own.space.layout.size * own.space.layout.dtype.itemsize
        for own in state.spaces
        if own not in state.trained
    )
    whole = State(parameters, gradients, masters, per_shard * parts)
    sharers = state.group.inner.size if state.memory.common_bytes else None
    return part_of_rank(whole, stage, parts, sharers).total


def _listed(optimizer: Any) -> list[Any]:
    if optimizer is None:
        return []
    return list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]


def _state_bytes(optimizers: Sequence[Any]) -> int:
    inner = [each.inner if isinstance(each, ShardedOptimizer) else each for each in optimizers]
    return sum(
        slices.local(value).nbytes
        for optimizer in inner
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor)
    )


def _buffer_bytes(model: nn.Module) -> int:
    return sum(slices.local(buffer).nbytes for buffer in model.buffers())


def _pss() -> int | None:
    """This process's proportional set size: a page that k processes map counts as 1/k of it."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("Pss:")]
    return found[0] << 10 if found else None
