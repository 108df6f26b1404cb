"""Replicas that start and stay equal: broadcasting parameters and buffers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from mpizero import World
from mpizero_torch import slices

# Small tensors travel together, up to this size; larger ones by themselves, without a copy.
_PACK_BYTES = 4 << 20


@torch.no_grad()
def broadcast_tensors(tensors: Sequence[torch.Tensor], world: World, root: int) -> None:
    """Give every rank the root's values, in place. Collective."""
    if world.size == 1:
        return
    for pack in packs(slices.local(tensor) for tensor in tensors):
        if len(pack) == 1:
            world.broadcast(pack[0].detach(), root)
            if world.rank != root and not pack[0].is_inference():
                torch.autograd.graph.increment_version(pack[0])
            continue
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in pack])
        world.broadcast(flat, root)
        if world.rank != root:
            values = flat.split([tensor.numel() for tensor in pack])
            for tensor, value in zip(pack, values, strict=True):
                tensor.copy_(value.view_as(tensor))


@torch.no_grad()
def broadcast_optimizer(optimizer: torch.optim.Optimizer, world: World, root: int) -> None:
    """Give every rank the state and settings of the root's optimizer. Collective."""
    state = optimizer.state_dict()
    told = tree_map(lambda each: _Form.of(each) if isinstance(each, torch.Tensor) else each, state)
    told = world.broadcast_object(told, root)
    if world.rank != root:
        state = tree_map(lambda each: each.empty() if isinstance(each, _Form) else each, told)
    tensors = [each for each in tree_leaves(state) if isinstance(each, torch.Tensor)]
    broadcast_tensors(tensors, world, root)
    if world.rank != root:
        optimizer.load_state_dict(state)


@dataclass(frozen=True)
class _Form:
    """What a tensor is like whose values follow."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    on_gpu: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Form:
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device.type == "cuda")

    def empty(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="cuda" if self.on_gpu else "cpu")


def start_alike(tensors: Sequence[torch.Tensor], world: World) -> None:
    """Give every replica rank 0's values, and what is not cut up to all of a mesh's tensor axis."""
    if world.mesh is not None:
        whole = [tensor for tensor in tensors if not slices.is_slice(tensor)]
        broadcast_tensors(whole, world.mesh.tp, root=0)
    broadcast_tensors(tensors, world, root=0)


def packs(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Tensors of one dtype and device, packed in order up to the size that one message takes."""
    packs: list[list[torch.Tensor]] = []
    open_packs: dict[tuple[torch.dtype, torch.device], tuple[list[torch.Tensor], int]] = {}
    for tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        key = (tensor.dtype, tensor.device)
        pack, filled = open_packs.get(key, ([], _PACK_BYTES))
        if filled + nbytes > _PACK_BYTES:
            pack, filled = [], 0
            packs.append(pack)
        pack.append(tensor)
        open_packs[key] = (pack, filled + nbytes)
    return packs


class Structure:
    """The parts of a module, and whether any has got, lost or replaced one, or a parameter.

    Walking a module takes longer than all else that happens in a step. So what was found is kept
    until something in it is another object.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._look()
        self._held_then = self._held()

    def buffers(self) -> list[tuple[str, dict[str, torch.Tensor | None]]]:
        """What the parts hold as buffers, with the parts' names."""
        if self._children != self._children_then:
            self._look()
        return [each for each in self._buffers if each[1]]

    def has_other_parameters(self) -> bool:
        """Has a parameter come, gone or been replaced since the last time?"""
        if self._children != self._children_then:
            self._look()
        before, self._held_then = self._held_then, self._held()
        return before != self._held_then

    def _look(self) -> None:
        parts = list(self._module.named_modules())
        self._children = [part._modules for _, part in parts]
        self._children_then = [dict(children) for children in self._children]
        self._parameters = [part._parameters for _, part in parts]
        self._buffers = [(name, part._buffers) for name, part in parts]

    def _held(self) -> list[int]:
        return list(map(id, chain.from_iterable(map(dict.values, self._parameters))))


class Buffers:
    """A module's buffers (BatchNorm's statistics, for instance), kept as one rank's.

    Whether they have changed is known by torch's count of writes, and where that says no, by their
    values: what is written through ``.data``, or by fused operations, is not counted. So a copy of
    them is kept, and compared with in each pass in which none was counted. On a GPU, whose answer
    the host would have to wait for, they are taken to have changed.
    """

    def __init__(self, structure: Structure, ignored: Collection[str]) -> None:
        self._structure = structure
        self._ignored = set(ignored)
        self._before: list[tuple[int, int]] = []
        self._counted: set[int] = set()  # whose writes in a forward since then were counted
        self._take_note()

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._buffers())

    def changed(self) -> bool:
        """Has any buffer been written to, or replaced, since they were last equal?"""
        buffers = self._buffers()
        if self._counts(buffers) != self._seen:
            return True
        if any(buffer.device.type != "cpu" for buffer in buffers):
            return True
        return not all(map(torch.equal, buffers, self._copies))

    def before_forward(self) -> None:
        """A forward begins, in which autograd may save them."""
        self._before = self._counts(self._buffers())

    def after_forward(self) -> None:
        """It has ended."""
        if self._before:
            now = self._counts(self._buffers())
            if now != self._before:
                before = set(self._before)
                self._counted.update(key for key, version in now if (key, version) not in before)

    def broadcast(self, world: World, root: int) -> None:
        """Make them the root's. Collective.

        Autograd may have saved them for a backward pass still to come. Where the forward's own
        writes are not counted as changes, this is not either. (What is written between forwards,
        by loading a state, say, is no matter of this.)
        """
        buffers = self._buffers()
        uncounted = [b for b in buffers if not b.is_inference() and id(b) not in self._counted]
        with torch.autograd.grad_mode._unsafe_preserve_version_counter(tuple(uncounted)):
            broadcast_tensors(buffers, world, root)
        self._take_note()

    def _take_note(self) -> None:
        buffers = self._buffers()
        self._counted.clear()
        self._seen = self._counts(buffers)
        self._copies = [b.detach().clone() for b in buffers if b.device.type == "cpu"]

    def _buffers(self) -> list[torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        for module, held in self._structure.buffers():
            for name, buffer in held.items():
                if (
                    buffer is not None
                    and ".".join(filter(None, (module, name))) not in self._ignored
                ):
                    found.setdefault(id(buffer), buffer)
        return list(found.values())

    @staticmethod
    def _counts(buffers: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
        return [(id(b), -1 if b.is_inference() else b._version) for b in buffers]
