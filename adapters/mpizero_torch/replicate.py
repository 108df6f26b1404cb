"""Replicas that start and stay equal: broadcasting parameters and buffers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import nn

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
            continue
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in pack])
        world.broadcast(flat, root)
        if world.rank != root:
            values = flat.split([tensor.numel() for tensor in pack])
            for tensor, value in zip(pack, values, strict=True):
                tensor.copy_(value.view_as(tensor))


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


class Buffers:
    """A module's buffers (BatchNorm's statistics, for instance), kept as one rank's."""

    def __init__(self, module: nn.Module, ignored: Collection[str]) -> None:
        self._module = module
        self._ignored = set(ignored)
        self._look()
        self._seen = self._versions()

    def changed(self) -> bool:
        """Has any buffer been written to, or replaced, since they were last equal?"""
        return self._versions() != self._seen

    def broadcast(self, world: World, root: int) -> None:
        """Make them the root's. Collective."""
        broadcast_tensors(self._buffers(), world, root)
        self._seen = self._versions()

    def _look(self) -> None:
        """Find the parts that hold buffers.

        Walking the modules takes longer than all else that happens here, in every step. So where
        buffers are held is kept until a part gets, loses or replaces a child.
        """
        parts = list(self._module.named_modules())
        self._held = [(name, part._buffers) for name, part in parts]
        self._children = [part._modules for _, part in parts]
        self._children_then = [dict(children) for children in self._children]

    def _buffers(self) -> list[torch.Tensor]:
        if self._children != self._children_then:
            self._look()
        found: dict[int, torch.Tensor] = {}
        for module, held in self._held:
            for name, buffer in held.items():
                if (
                    buffer is not None
                    and ".".join(filter(None, (module, name))) not in self._ignored
                ):
                    found.setdefault(id(buffer), buffer)
        return list(found.values())

    def _versions(self) -> list[tuple[int, int]]:
        return [(id(b), -1 if b.is_inference() else b._version) for b in self._buffers()]
