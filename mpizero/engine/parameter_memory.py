"""Where parameters lie under sharding, and how an update reaches the ranks that did not make it.

Three ways, by who holds how much (ZeRO, arXiv 1910.02054, section 5):

common    all ranks of a node have one copy between them, in node-shared memory: an update in place
          is seen by all after a barrier, nothing is gathered inside the node;
whole     every rank has a copy: after an update each gathers the others' blocks;
sharded   every rank has its blocks only (stage 3): spaces are gathered when they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpizero.collectives.dispatch import Dispatch, Parts
from mpizero.engine.buckets import Allocate
from mpizero.engine.partition import Space
from mpizero.engine.shard_group import ShardGroup
from mpizero.memory.dtypes import is_half
from mpizero.progress import Handle
from mpizero.reduction.half import narrow, widen

COMMON, WHOLE, SHARDED = "common", "whole", "sharded"


class ParameterMemory:
    """The parameters of ``spaces``; for those with ``masters`` also float32 copies of its blocks.

    Spaces that are not ``trained`` are never updated. ``how``: COMMON, WHOLE or SHARDED; COMMON
    becomes WHOLE where there is no room for it. ``allocate(count, dtype)`` gives zeroed memory that
    ranks of a node can reach. Collective.
    """

    def __init__(
        self,
        group: ShardGroup,
        spaces: Sequence[Space],
        how: str,
        allocate: Allocate,
        allocate_private: Allocate,
        masters: Sequence[bool],
        trained: Sequence[bool],
    ) -> None:
        self._group, self._spaces = group, spaces
        self._trained = [at for at, is_trained in enumerate(trained) if is_trained]
        flats: list[Any] = []
        if how == COMMON:
            for space in spaces:
                flats.append(group.inner.allocate_common(space.size, space.layout.dtype))
            if any(flat is None for flat in flats):
                flats, how = [], WHOLE
        if how == WHOLE:
            flats = [allocate(space.size, space.layout.dtype) for space in spaces]
        elif how == SHARDED:
            flats = [
                allocate(
                    max(space.shard_size(part) for part in range(group.parts)), space.layout.dtype
                )
                for space in spaces
            ]
        self.how = how
        self._flats = flats
        self.masters = [
            allocate_private(space.shard_size(group.part), np.float32) if wanted else None
            for space, wanted in zip(spaces, masters, strict=True)
        ]

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

    def store(self, space: int, index: int, values: Any) -> None:
        """Put a parameter where this rank keeps it, or its part: ``values`` are all of it, 1-D.

        The same on all ranks. float32 values reach the masters unrounded. To be followed by
        ``settle``.
        """
        cut = self._spaces[space]
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
        self._group.inner.submit("storing parameters", lambda run, parts: run.barrier()).wait()

    def publish(self) -> None:
        """After an update of what ``updated`` gives: let every rank have the new parameters.

        Collective. Sharded ones are rounded from their masters, and travel when next gathered.
        """
        for at in self._trained:
            if self.masters[at] is not None:
                for wide, block in zip(self.updated(at), self.blocks(at), strict=True):
                    _round_into(wide, block)
        if self.how == SHARDED:
            self.settle()
            return
        send = self._group.publish if self.how == COMMON else self._group.gather
        for at in self._trained:
            send("updated parameters", self._flats[at], _places(self._spaces[at])).wait()

    def gather(self, space: int, whole: Callable[[], Any]) -> Handle:
        """Sharded: fill ``whole()``, memory for the space, with every rank's blocks."""
        cut, flat, group = self._spaces[space], self._flats[space], self._group
        places = [cut.shard_places(part) for part in range(group.parts)]

        def work(run: Dispatch, parts: Parts) -> None:
            full = whole()
            reachable = parts is not None and group.parts == len(parts)
            for at, segment in enumerate(cut.segments):
                for part in range(group.parts) if reachable else [group.part]:
                    shard = parts[part] if parts is not None and reachable else flat
                    full[segment.block(part)] = shard[places[part][at]]
            if reachable:
                run.barrier()
            else:
                group.gather_now(run, full, _places(cut))

        return group.inner.submit("gathering parameters", work, (flat,))

    @property
    def nbytes(self) -> int:
        """Bytes of parameters that this rank addresses (common ones are its node's)."""
        return sum(int(flat.nbytes) for flat in self._flats)

    def _stored_here(self, space: int) -> list[tuple[Any, slice]]:
        """The memory that this rank fills, with the elements of the space that belong there."""
        flat, cut, group = self._flats[space], self._spaces[space], self._group
        if self.how == WHOLE:
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
    if is_half(out.dtype) and values.dtype == np.float32:
        narrow(values, out)
    else:
        out[...] = values


def _widen_into(values: Any, out: Any) -> None:
    out[...] = widen(values) if is_half(values.dtype) else values
