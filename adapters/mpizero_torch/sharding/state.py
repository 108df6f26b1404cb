"""``ShardedState``: a model's parameters, gradients and optimizer state, spread over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from mpizero.engine import (
    FLAT,
    SHARDED,
    Filling,
    GradientSharder,
    Lane,
    ParameterMemory,
    ParameterSpec,
    ShardGroup,
    Space,
    balanced_owners,
    cut_by_parameter,
    cut_flat,
)
from mpizero_torch import building, slices, tensors
from mpizero_torch.sharding.offload import StateOnDisk, pinned_zeros
from mpizero_torch.sharding.runs import Run, parameter_runs, slice_runs
from mpizero_torch.sharding.units import Unit, WholeSpace

Fill = Callable[[tuple[int, int], Sequence[Filling]], Sequence[int]]

FROZEN = -1  # the group of parameters that are in none of the optimizer's, or can't be trained


@dataclass(frozen=True)
class Sharding:
    """How a model's state is spread; see ``mz.zero``."""

    stage: int
    how: str  # of ParameterMemory
    segment_bytes: int
    precision: torch.dtype | None = None
    in_float32: Collection[int] = ()  # the ids of parameters that keep their dtype
    accumulate_in_float32: bool = False
    offload: str | None = None


@dataclass(frozen=True)
class _Elements:
    """A parameter's values, read when they are asked for, as ParameterMemory wants them."""

    read: Callable[[slice], torch.Tensor]
    dtype: torch.dtype

    def __getitem__(self, elements: slice) -> Any:
        return tensors.as_array(self.read(elements).to(self.dtype))


@dataclass(frozen=True)
class OwnSpace:
    """A space, its number in the parameter memory, and the optimizer's group of its parameters."""

    space: Space
    number: int
    group: int


class ShardedState:
    """The parameters ``named``, moved to sharded memory, and the memory of their gradients.

    ``groups``: for each of the optimizers' groups the numbers of its parameters, and
    ``partitions``: how they are cut. ``prepare`` is
    called with each parameter before its values are read. Collective.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        groups: Sequence[Sequence[int]],
        partitions: Sequence[str],
        group: ShardGroup,
        sharding: Sharding,
        units: Sequence[Unit],
        unit_of: Sequence[int],
        prepare: Callable[[nn.Parameter], None],
        aside: StateOnDisk | None,
    ) -> None:
        self.group, self.sharding, self.units = group, sharding, list(units)
        self.named = list(named)
        # Before anything else is made: parameters may have no memory yet.
        self.device = torch.device(group.world.device.name)
        for _, parameter in self.named:
            if not parameter.is_meta and not building.is_hollow(parameter):
                self.device = parameter.device
        self._prepare, self._aside = prepare, aside
        self._units = list(unit_of)
        self.memory = ParameterMemory(
            group,
            sharding.how,
            self._allocate,
            self._private,
            lambda: tensors.current_stream(self.device),
        )
        self.spaces: list[OwnSpace] = []
        self.space_of: dict[int, OwnSpace] = {}
        self._precision = sharding.precision
        self._partitions = {FROZEN: FLAT, **dict(enumerate(partitions))}
        for number, members in enumerate(groups):
            self.add(number, members)
        self.add(FROZEN, [i for i in range(len(self.named)) if i not in self.space_of])

    def add_group(self, members: Iterable[int], partition: str) -> tuple[int, list[OwnSpace]]:
        """Make a further group of an optimizer's; returns its number, too. Collective."""
        number = max(self._partitions) + 1
        self._partitions[number] = partition
        return number, self.add(number, members)

    def add(self, group: int, members: Iterable[int]) -> list[OwnSpace]:
        """Move the parameters ``members`` of a group to sharded memory. Collective.

        Those that can have no gradient (integers, as quantised models have them) are left out:
        whatever group they are in, they are kept like those that are in none.
        """
        if group != FROZEN:
            members = [i for i in members if tensors.can_have_gradient(self.named[i][1])]
        keys: dict[tuple[int, torch.dtype], list[int]] = {}
        for index in sorted(members, reverse=True):
            parameter = self.named[index][1]
            keys.setdefault((self._units[index], self._dtype(parameter)), []).append(index)
        added = [self._add_space(group, indices) for indices in keys.values()]
        self.memory.settle()
        return added

    def make_sharder(
        self,
        lane: Lane,
        fill: Fill,
        left: Callable[[], Sequence[int]],
        has: Callable[[], Sequence[bool]],
        unscale: Callable[[], float],
    ) -> GradientSharder:
        """Memory for the gradients of the parameters in groups, and their reduction."""
        trained = self.trained
        return GradientSharder(
            lane,
            self.group,
            self.specs(),
            [own.space for own in trained],
            [self.gradient_dtype(own.space) for own in trained],
            self._allocate,
            whole=self.sharding.stage == 1,
            on_the_way=[self._dtype_on_the_way(own.space) for own in trained],
            stream=lambda: tensors.current_stream(self.device),
            fill=fill,
            left=left,
            has=has,
            unscale=unscale,
        )

    def make_runs(
        self, sharder: GradientSharder, only: Sequence[OwnSpace] | None = None
    ) -> list[Run]:
        """This rank's shards, of all spaces or some, as a torch optimizer is to see them."""
        runs: list[Run] = []
        part, memory = self.group.part, self.memory
        for at, own in enumerate(self.trained):
            if only is not None and own not in only:
                continue
            if self._partitions[own.group] == FLAT:
                values, gradients = memory.updated(own.number), sharder.shard(at)
                runs += slice_runs(own.space, at, own.group, part, values, gradients)
            else:
                runs += parameter_runs(
                    own.space,
                    at,
                    own.group,
                    part,
                    partial(memory.updated_parameter, own.number),
                    partial(sharder.shard_of_parameter, at),
                )
        for run in runs:
            run.is_all = self.group.parts == 1
        return runs

    def rebase(self, runs: Sequence[Run], sharder: GradientSharder) -> None:
        """Let the runs' gradients, with what they hold, lie in another sharder's memory."""
        for run in runs:
            number, at, start = run.home
            if run.is_cut:
                memory = sharder.shard(number)[at][start : start + run.gradient.numel()]
            else:
                memory = sharder.shard_of_parameter(number, at)
            gradient = tensors.as_tensor(memory).view(run.gradient.shape)
            gradient.copy_(run.gradient)
            run.gradient = gradient
            if run.has_gradient:
                run.receive()

    @property
    def trained(self) -> list[OwnSpace]:
        """The spaces of parameters in the optimizer's groups."""
        return [own for own in self.spaces if own.group != FROZEN]

    def gradient_view(self, sharder: GradientSharder, index: int) -> torch.Tensor:
        """Stage 1: the memory for all of a parameter's gradient."""
        return tensors.as_tensor(sharder.view(index, self.trained.index(self.space_of[index])))

    @property
    def parameter_bytes(self) -> tuple[int, int, int]:
        """Bytes of parameters of this rank's own, of its node's, and of its float32 copies."""
        return self.memory.own_bytes, self.memory.common_bytes, self.memory.master_bytes

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of what this rank has of each: all of it, or its slice."""
        return [tuple(slices.local(parameter).shape) for _, parameter in self.named]

    def specs(self) -> list[ParameterSpec]:
        return [
            ParameterSpec(name, shape, tensors.numpy_dtype(self._dtype(p)))
            for (name, p), shape in zip(self.named, self.shapes, strict=True)
        ]

    def store(self, index: int, values: torch.Tensor) -> None:
        """Give a parameter these values, the same on all ranks; to be followed by ``settle``."""
        own = self.space_of[index]
        flat = slices.local(values).detach().reshape(-1)
        if own.group != FROZEN and self.memory.masters[own.number] is not None:
            flat = flat.float()
        else:
            flat = flat.to(self._dtype(self.named[index][1]))
        self.memory.store(own.number, index, tensors.as_array(flat))

    def trained_dtype(self, index: int) -> torch.dtype:
        """The dtype in which a parameter is trained: its master's where it has one."""
        own = self.space_of[index]
        master = self.memory.masters[own.number]
        if master is not None:
            return tensors.torch_dtype(master.dtype)
        return self._dtype(self.named[index][1])

    def pieces(self) -> Iterator[tuple[int, slice, Any]]:
        """This rank's part of all parameters as they are trained: number, elements, array."""
        part = self.group.part
        for own in self.spaces:
            blocks = self.memory.updated(own.number)
            for segment, block in zip(own.space.segments, blocks, strict=True):
                for index in segment.members:
                    if self.space_of[index] is not own:
                        continue  # it has moved to the space of a group that was added
                    found = own.space.layout.overlap(str(index), segment.block(part))
                    if found is not None:
                        yield index, found[0], block[found[1]]

    def fill(self, index: int, read: Callable[[slice], torch.Tensor]) -> None:
        """Give a parameter the values that ``read(elements)`` gives; to be followed by ``settle``.

        Asks for what this rank keeps.
        """
        self.memory.store(
            self.space_of[index].number, index, _Elements(read, self.trained_dtype(index))
        )

    def is_scattered(self, index: int) -> bool:
        """Is there no whole parameter on this rank that is the one being trained?"""
        own = self.space_of[index]
        return self.sharding.how == SHARDED or self.memory.masters[own.number] is not None

    def collect(self, index: int, root: int | None) -> torch.Tensor | None:
        """A parameter as it is trained, whole, on every rank or on ``root``. Collective."""
        found = self.memory.collect(self.space_of[index].number, index, root)
        return None if found is None else tensors.as_tensor(found).view(self.shapes[index])

    def _add_space(self, group: int, members: list[int]) -> OwnSpace:
        parts, segment_bytes = self.group.parts, self.sharding.segment_bytes
        specs = self.specs()
        if self._partitions[group] == FLAT:
            space = cut_flat(specs, members, parts, segment_bytes)
        else:
            owners = balanced_owners(specs, parts)
            space = cut_by_parameter(specs, members, owners, parts, segment_bytes)
        number = self.memory.add(
            space,
            trained=group != FROZEN,
            master=self._master_dtype(space) if group != FROZEN else None,
        )
        own = OwnSpace(space, number, group)
        self.spaces.append(own)
        for index in members:
            self.space_of[index] = own
            parameter = self.named[index][1]
            self._prepare(parameter)
            self.store(index, parameter)
            self._place(parameter, index, own)
        return own

    def _place(self, parameter: nn.Parameter, index: int, own: OwnSpace) -> None:
        """Let the parameter lie in the memory for it."""
        if self.sharding.how == SHARDED:
            unit = self.units[self._units[index]]
            unit.spaces = [each for each in unit.spaces if not each[1].leave(parameter)]
            if own.number not in (number for number, _ in unit.spaces):
                dtype = self._dtype(parameter)
                unit.spaces.append((own.number, WholeSpace(own.space.size, dtype, self.device)))
            whole = dict(unit.spaces)[own.number]
            whole.settle(parameter, own.space.place(index), own.space.shape(index))
            if index not in unit.members:
                unit.members.append(index)
        else:
            slices.move(parameter, tensors.as_tensor(self.memory.view(own.number, index)))
        if parameter.grad is not None:
            parameter.grad = None

    @torch.no_grad()
    def adopt(self, indices: Collection[int]) -> None:
        """Store what lies in these parameters, the same on all ranks; then ``settle``.

        Where a 16-bit number is what it was, its float32 copy keeps all its digits.
        """
        copies = [
            (self.form(index)[1], tensors.as_tensor(array))
            for index, _, array in self.pieces()
            if index in indices and self.trained_dtype(index) != self.named[index][1].dtype
        ]
        before = [copy.clone() for _, copy in copies]
        for index in indices:
            self.store(index, self.named[index][1])
        for (dtype, copy), old in zip(copies, before, strict=True):
            copy.copy_(torch.where(old.to(dtype) == copy.to(dtype), old, copy))

    def form(self, index: int) -> tuple[tuple[int, ...], torch.dtype]:
        """The shape and dtype of what this rank has of a parameter."""
        space = self.space_of[index].space
        return space.shape(index), tensors.torch_dtype(space.layout.dtype)

    def place_again(self, index: int) -> None:
        """Let a parameter lie in the memory for it, whose values it has (not a sharded one)."""
        memory = self.memory.view(self.space_of[index].number, index)
        slices.move(self.named[index][1], tensors.as_tensor(memory))

    def _dtype(self, parameter: torch.Tensor) -> torch.dtype:
        """The parameter's in training: what ``precision`` says, for floating point numbers."""
        precision = self.sharding.precision
        if precision is not None and parameter.is_floating_point():
            return parameter.dtype if id(parameter) in self.sharding.in_float32 else precision
        return parameter.dtype

    def _master_dtype(self, space: Space) -> Any:
        """Of the copies that the optimizer updates in the parameters' place; None: no copies."""
        if self.sharding.precision is not None and space.layout.dtype.itemsize == 2:
            return np.dtype(np.float32)
        return space.layout.dtype if self._on_host else None

    @property
    def _on_host(self) -> bool:
        """Does a GPU's optimizer work in host memory?"""
        return self.sharding.offload is not None and self.device.type == "cuda"

    def gradient_dtype(self, space: Space) -> Any:
        """In which the shards of a space's gradients are kept.

        float16 has no room for those that a loss scale was needed for, once it is divided out.
        """
        sharding = self.sharding
        wide = sharding.accumulate_in_float32 or sharding.precision == torch.float16
        if wide and space.layout.dtype.itemsize == 2:
            return np.dtype(np.float32)
        return space.layout.dtype

    def _dtype_on_the_way(self, space: Space) -> Any:
        """In which a space's gradients travel."""
        if self.sharding.accumulate_in_float32:
            return self.gradient_dtype(space)
        return space.layout.dtype

    def _allocate(self, count: int, dtype: Any) -> Any:
        return tensors.zeros(self.group.inner, count, dtype, self.device)

    def _private(self, count: int, dtype: Any) -> Any:
        """Memory for float32 copies, which this rank alone sees."""
        if self._aside is not None:
            return self._aside.zeros(count, dtype)
        if self._on_host:
            return pinned_zeros(count, dtype)
        if self.device.type == "cpu":
            return np.zeros(count, dtype)
        return self._allocate(count, dtype)
