"""How flat memory is cut among the ranks that shard it.

Parameters of one kind lie one behind the other in a *space*. A space is reduced and gathered in
*segments*, large enough for bandwidth and small enough to be scratch; each segment is cut into one
*block* for each part of the state, in order. What a rank keeps is its block of every segment: so a
segment can be reduced as soon as backward has filled it, and each rank is left with its part.

Two ways to cut (ZeRO, arXiv 1910.02054, section 5, does the first):

flat        equal blocks, wherever parameters begin and end: for optimizers that treat every element
            on its own.
parameter   whole parameters, spread so that the ranks own about as many elements: for optimizers
            that look at a parameter's shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from mpizero.engine.specs import ParameterSpec
from mpizero.layout import ALIGNMENT_BYTES, FlatLayout

FLAT, PARAMETER = "flat", "parameter"

# Large enough for bandwidth, small enough to be scratch.
SEGMENT_BYTES = 8 << 20


@dataclass(frozen=True)
class Segment:
    """The elements ``start`` to ``stop`` of a space; ``blocks[p]`` of them are part p's."""

    start: int
    stop: int
    blocks: tuple[slice, ...]  # counted from the segment's start
    members: tuple[int, ...]  # the parameters that lie in it, wholly or with a part

    @property
    def size(self) -> int:
        return self.stop - self.start

    def block(self, part: int) -> slice:
        """The block of ``part``, in elements of the space."""
        block = self.blocks[part]
        return slice(self.start + block.start, self.start + block.stop)


@dataclass(frozen=True)
class Space:
    """Parameters laid out one behind the other; ``layout`` names them by their numbers."""

    layout: FlatLayout
    size: int
    segments: tuple[Segment, ...]
    members: tuple[int, ...]

    def place(self, index: int) -> slice:
        """Where parameter ``index`` lies."""
        return self.layout.entries[str(index)].place

    def shape(self, index: int) -> tuple[int, ...]:
        return self.layout.entries[str(index)].shape

    def shard_places(self, part: int) -> list[slice]:
        """Where the part's block of each segment lies in the memory of its own that holds them."""
        places, end = [], 0
        for segment in self.segments:
            block = segment.blocks[part]
            places.append(slice(end, end + block.stop - block.start))
            end = places[-1].stop
        return places

    def owned_place(self, index: int, part: int) -> slice | None:
        """Where a parameter lies in that memory, if it is the part's as a whole; else None."""
        own = self.place(index)
        for segment, place in zip(self.segments, self.shard_places(part), strict=True):
            block = segment.block(part)
            if block.start <= own.start < block.stop:
                start = place.start + own.start - block.start
                return slice(start, start + own.stop - own.start)
        return None

    def shard_size(self, part: int) -> int:
        """Elements of all the part's blocks."""
        return sum(each.blocks[part].stop - each.blocks[part].start for each in self.segments)


def cut_flat(
    specs: Sequence[ParameterSpec], members: Sequence[int], parts: int, segment_bytes: int
) -> Space:
    """Equal blocks for all parts. ``members``: the parameters, of one dtype, in their order."""
    layout = _lay_out(specs, members)
    # Every block begins on a cache line, so that two ranks never write to the same one.
    unit = parts * _step(layout)
    size = max(1, -(-layout.size // unit)) * unit
    length = max(1, segment_bytes // (layout.dtype.itemsize * unit)) * unit
    bounds = [*range(0, size, length), size]
    segments = []
    for start, stop in pairwise(bounds):
        block = (stop - start) // parts
        blocks = tuple(slice(part * block, (part + 1) * block) for part in range(parts))
        segments.append(Segment(start, stop, blocks, _inside(layout, members, start, stop)))
    return Space(layout, size, tuple(segments), tuple(members))


def cut_by_parameter(
    specs: Sequence[ParameterSpec],
    members: Sequence[int],
    owners: Sequence[int],
    parts: int,
    segment_bytes: int,
) -> Space:
    """Whole parameters: ``owners[i]`` is the part that updates parameter i.

    Neighbours share a segment, in it ordered by owner; a parameter larger than a segment has
    segments of its own, which are its owner's alone.
    """
    itemsize = specs[members[0]].dtype.itemsize
    bins: list[list[int]] = [[]]
    filled = 0
    some = [index for index in members if prod(specs[index].shape)]
    for index in some:
        if bins[-1] and filled + specs[index].nbytes > segment_bytes:
            bins.append([])
            filled = 0
        bins[-1].append(index)
        filled += specs[index].nbytes
    bins = [sorted(each, key=lambda index: owners[index]) for each in bins]
    # Parameters of no elements have a place, at the end, but lie in no segment.
    order = [index for each in bins for index in each]
    layout = _lay_out(specs, [*order, *(index for index in members if index not in order)])
    segments: list[Segment] = []
    ends = [layout.entries[str(each[0])].offset for each in bins[1:]] + [layout.size]
    start = 0
    for each, end in zip(bins, ends, strict=True):
        if len(each) == 1:
            segments += _chunks(
                each[0], owners[each[0]], parts, start, end, segment_bytes // itemsize
            )
        else:
            blocks = _blocks_by_owner(layout, each, owners, parts, start, end)
            segments.append(Segment(start, end, blocks, tuple(each)))
        start = end
    return Space(layout, layout.size, tuple(segments), tuple(members))


def balanced_owners(specs: Sequence[ParameterSpec], parts: int) -> list[int]:
    """A part for each parameter: the largest first, each to the part with the least so far.

    (Graham 1969's rule: no part gets more than 4/3 of the best possible.)
    """
    load = [0] * parts
    owners = [0] * len(specs)
    for index in sorted(range(len(specs)), key=lambda i: (-prod(specs[i].shape), i)):
        owners[index] = min(range(parts), key=lambda part: (load[part], part))
        load[owners[index]] += prod(specs[index].shape)
    return owners


def _lay_out(specs: Sequence[ParameterSpec], order: Sequence[int]) -> FlatLayout:
    return FlatLayout.of([(str(i), specs[i].shape) for i in order], specs[order[0]].dtype)


def _step(layout: FlatLayout) -> int:
    return max(1, ALIGNMENT_BYTES // layout.dtype.itemsize)


def _inside(layout: FlatLayout, members: Sequence[int], start: int, stop: int) -> tuple[int, ...]:
    within = slice(start, stop)
    return tuple(index for index in members if layout.overlap(str(index), within) is not None)


def _chunks(index: int, owner: int, parts: int, start: int, end: int, length: int) -> list[Segment]:
    """One parameter's segments: all of each is the owner's."""
    bounds = [*range(start, end, max(1, length)), end] if end > start else [start, end]
    found = []
    for begin, stop in pairwise(bounds):
        size = stop - begin
        before, own, after = slice(0, 0), slice(0, size), slice(size, size)
        blocks = (before,) * owner + (own,) + (after,) * (parts - owner - 1)
        found.append(Segment(begin, stop, blocks, (index,)))
    return found


def _blocks_by_owner(
    layout: FlatLayout,
    members: Sequence[int],
    owners: Sequence[int],
    parts: int,
    start: int,
    end: int,
) -> tuple[slice, ...]:
    firsts: list[int] = []
    for part in range(parts):
        of_part = [layout.entries[str(i)].offset for i in members if owners[i] >= part]
        firsts.append((min(of_part) if of_part else end) - start)
    return tuple(slice(a, b) for a, b in zip(firsts, [*firsts[1:], end - start], strict=True))
