"""Where parameters lie under sharding, and how an update reaches the ranks that did not make it.

Three ways, by who holds how much (ZeRO, arXiv 1910.02054, section 5):

common    all ranks of a node have one copy between them, in node-shared memory: an update in place
          is seen by all after a barrier, nothing is gathered inside the node;
whole     every rank has a copy: after an update each gathers the others' blocks;
sharded   every rank has its blocks only (stage 3): spaces are gathered when they are needed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from mpizero.engine.buckets import Allocate
from mpizero.engine.partition import Space
from mpizero.engine.shard_group import ShardGroup
from mpizero.memory.arrays import StreamOf, assign, empty_like, on_device, to_host
from mpizero.memory.dtypes import is_half
from mpizero.memory.order import NOTHING, on_stream
from mpizero.progress import Handle
from mpizero.reduction.half import narrow, widen

COMMON, WHOLE, SHARDED = "common", "whole", "sharded"


class ParameterMemory:
    """The parameters' memory, and copies of this rank's blocks (masters) where these are wanted.

    ``how``: COMMON, WHOLE or SHARDED. Where a node has no room for COMMON memory, a space lies in
    every rank's own. ``allocate(count, dtype)`` gives zeroed memory that ranks of a node can reach.
    Spaces that are not ``trained`` are never updated. ``stream()``: the raw CUDA stream on which
    device memory is used.
    """

    def __init__(
        self,
        group: ShardGroup,
        how: str,
        allocate: Allocate,
        allocate_private: Allocate,
        stream: StreamOf = lambda: None,
    ) -> None:
        self._group, self.how, self._stream = group, how, stream
        self._allocate, self._allocate_private = allocate, allocate_private
        self._spaces: list[Space] = []
        self._flats: list[Any] = []
        self._is_common: list[bool] = []
        self._trained: list[int] = []
        self.masters: list[Any] = []
        self._sends: bool | None = None
        self.changes = 0  # how often values have been stored or updated

    def add(self, space: Space, *, trained: bool = True, master: Any = None) -> int:
        """Make memory for a space; returns its number. Collective.

        ``master``: the dtype of copies of this rank's blocks that the optimizer is to update.
        """
        flat, dtype = None, space.layout.dtype
        if self.how == COMMON:
            flat = self._group.inner.allocate_common(space.size, dtype)
        self._is_common.append(flat is not None)
        if flat is None:
            size = space.size
            if self.how == SHARDED:
                size = max(space.shard_size(part) for part in range(self._group.parts))
            flat = self._allocate(size, dtype)
        wide = None
        if master is not None:
            wide = self._allocate_private(space.shard_size(self._group.part), master)
        number = len(self._spaces)
        self._sends = None
        self._spaces.append(space)
        self._flats.append(flat)
        self.masters.append(wide)
        if trained:
            self._trained.append(number)
        return number

    def view(self, space: int, index: int) -> Any:
        """A parameter in its shape (not where they are sharded)."""
        return self._spaces[space].layout.view(self._flats[space], str(index))

    def blocks(self, space: int) -> list[Any]:
        """This rank's block of each segment of a space, in the parameters' dtype."""
        flat, cut, part = self._flats[space], self._spaces[space], self._group.part
        if self.how == SHARDED:
            return [flat[place] for place in cut.shard_places(part)]
        return [flat[segment.block(part)] for segment in cut.segments]

    def updated(self, space: int) -> list[Any]:
        """What the optimizer is to update: the float32 copies, or the blocks themselves."""
        master = self.masters[space]
        if master is None:
            return self.blocks(space)
        return [master[place] for place in self._spaces[space].shard_places(self._group.part)]

    def updated_parameter(self, space: int, index: int) -> Any:
        """The same for a parameter that is this rank's as a whole (1-D)."""
        cut, master = self._spaces[space], self.masters[space]
        own = cut.owned_place(index, self._group.part)
        if master is not None:
            return master[own]
        return self._flats[space][own if self.how == SHARDED else cut.place(index)]

    def store(self, space: int, index: int, values: Any) -> None:
        """Put a parameter where this rank keeps it, or its part: ``values[slice]`` of all, 1-D.

        The same on all ranks. float32 values reach the masters unrounded. To be followed by
        ``settle``.
        """
        self.changes += 1
        with self._using():
            self._store(self._spaces[space], space, index, values)

    def _store(self, cut: Space, space: int, index: int, values: Any) -> None:
        for block, place in self._stored_here(space):
            found = cut.layout.overlap(str(index), place)
            if found is not None:
                _round_into(values[found[0]], block[found[1]])
        master = self.masters[space]
        if master is not None:
            for segment, place in zip(
                cut.segments, cut.shard_places(self._group.part), strict=True
            ):
                found = cut.layout.overlap(str(index), segment.block(self._group.part))
                if found is not None:
                    _widen_into(values[found[0]], master[place][found[1]])

    def settle(self) -> None:
        """All ranks have stored: from here on everyone may read. Collective."""
        self._group.inner.submit(
            "storing parameters", lambda run, parts: run.barrier(), NOTHING
        ).wait()

    def publish(self, spaces: Collection[int] | None = None) -> None:
        """After an update of what ``updated`` gives: let every rank have the new parameters.

        ``spaces``: which have been updated, the same on all ranks; by default, all. Sharded ones
        are rounded from their masters, and travel when next gathered. Collective.
        """
        self.changes += 1
        updated = [at for at in self._trained if spaces is None or at in spaces]
        with self._using():
            for at in updated:
                if self.masters[at] is not None:
                    for wide, block in zip(self.updated(at), self.blocks(at), strict=True):
                        _round_into(wide, block)
        if self.how == SHARDED:
            self.settle()
            return
        for at in updated:
            flat, where = self._flats[at], _places(self._spaces[at])
            if self._is_common[at]:
                self._group.publish("updated parameters", flat, where).wait()
            else:
                self._group.gather("updated parameters", flat, where, self._stream).wait()

    def collect(self, space: int, index: int, root: int | None = None) -> Any:
        """A parameter (1-D, whole) as the optimizer keeps it: float32 where there are masters.

        On every rank, or on ``root`` only (None elsewhere). Collective over the world; travels
        block by block.
        """
        with self._using():
            return self._collect(space, index, root)

    def _collect(self, space: int, index: int, root: int | None) -> Any:
        cut, world = self._spaces[space], self._group.world
        memory = self.updated(space)
        whole = None
        for at, segment in enumerate(cut.segments):
            for part in range(self._group.parts) if index in segment.members else ():
                found = cut.layout.overlap(str(index), segment.block(part))
                if found is None:
                    continue
                elements, place = found
                holder = self._group.holders[part]
                if world.rank == holder:
                    piece = memory[at][place].copy()
                else:
                    piece = empty_like(memory[at], (elements.stop - elements.start,))
                world.broadcast(piece, holder)
                if root is None or root == world.rank:
                    if whole is None:
                        whole = empty_like(piece, (cut.layout.entries[str(index)].count,))
                    whole[elements] = piece
        if whole is None and root in (None, world.rank):
            master = self.masters[space]
            whole = empty_like(self._flats[space] if master is None else master, (0,))
        return whole

    def gather(self, space: int, whole: Any, what: str) -> Handle | None:
        """Sharded: fill ``whole``, memory for all of a space, with every rank's blocks.

        ``what`` is told to the other ranks, and to the user if they do something else.

        Where this rank can address all shards it copies them, at once and by itself: None, they
        are there, and ranks need not do the same. Else collective, and a handle to wait for.
        """
        cut, group = self._spaces[space], self._group
        shards = self._reachable(space)
        with self._using():
            if shards is not None:
                for part, shard in enumerate(shards):
                    for segment, place in zip(cut.segments, cut.shard_places(part), strict=True):
                        whole[segment.block(part)] = shard[place]
                return None
            for segment, block in zip(cut.segments, self.blocks(space), strict=True):
                whole[segment.block(group.part)] = block
        return group.inner.submit(
            what,
            lambda run, parts: group.gather_now(run, whole, _places(cut), what=what, sure=False),
            on_stream(self._stream, whole, counterpart=False),
            sure=False,
        )

    def _using(self) -> AbstractContextManager[None]:
        """Inside, the kernels on device memory run on the stream on which it is used."""
        return self._group.world.device.using(self._stream())

    @property
    def sends_to_gather(self) -> bool:
        """Sharded: does any ``gather`` need the other ranks? Nobody may gather alone then."""
        if self._sends is None:
            spaces = range(len(self._spaces))
            self._sends = any(self._reachable(space) is None for space in spaces)
        return self._sends

    @property
    def common_bytes(self) -> int:
        """Bytes of parameters that the inside ranks have once between them."""
        pairs = zip(self._flats, self._is_common, strict=True)
        return sum(int(flat.nbytes) for flat, is_common in pairs if is_common)

    @property
    def own_bytes(self) -> int:
        """Bytes of parameters that this rank has for itself."""
        return sum(int(flat.nbytes) for flat in self._flats) - self.common_bytes

    @property
    def master_bytes(self) -> int:
        return sum(int(master.nbytes) for master in self.masters if master is not None)

    def _reachable(self, space: int) -> list[Any] | None:
        """All parts' shards of a space, if they lie in memory that this rank can address."""
        if self._group.parts == 1:
            return [self._flats[space]]
        if self._group.parts != self._group.inner.size:
            return None
        return self._group.inner.counterparts(self._flats[space])

    def _stored_here(self, space: int) -> list[tuple[Any, slice]]:
        """The memory that this rank fills, with the elements of the space that belong there."""
        flat, cut, group = self._flats[space], self._spaces[space], self._group
        if self.how == WHOLE or (self.how == COMMON and not self._is_common[space]):
            return [(flat, slice(0, cut.size))]
        if self.how == SHARDED:
            return [
                (block, segment.block(group.part))
                for block, segment in zip(self.blocks(space), cut.segments, strict=True)
            ]
        found = []
        for segment in cut.segments:
            region = group.own_region(segment.blocks)
            place = slice(segment.start + region.start, segment.start + region.stop)
            found.append((flat[place], place))
        return found


def _places(space: Space) -> list[tuple[slice, Sequence[slice]]]:
    return [(slice(each.start, each.stop), each.blocks) for each in space.segments]


def _round_into(values: Any, out: Any) -> None:
    if on_device(out) and not on_device(values):  # kept on the host
        rounded = np.empty(out.shape, out.dtype)
        _round_into(values, rounded)
        assign(out, rounded)
    elif is_half(out.dtype) and values.dtype == np.float32:
        narrow(to_host(values) if not on_device(out) else values, out)
    else:
        assign(out, values)


def _widen_into(values: Any, out: Any) -> None:
    assign(out, widen(values) if is_half(values.dtype) else values)
