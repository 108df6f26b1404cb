"""``GradientSharder``: each gradient's mean goes to the rank that keeps it (ZeRO stages 1 to 3).

Backward fills one segment of a space after the other; a full one is summed over the ranks, block
by block to those who own the blocks. Stage 1 keeps memory for all gradients; from stage 2 on a few
segments' worth is used again and again, so that no rank ever holds all gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import numpy as np

from mpizero.engine.buckets import Allocate
from mpizero.engine.lanes import Lane
from mpizero.engine.opening import MARKS, News, Opening
from mpizero.engine.partition import Segment, Space
from mpizero.engine.passes import Piece, ReducedPasses
from mpizero.engine.shard_group import ShardGroup
from mpizero.engine.specs import ParameterSpec
from mpizero.engine.weights import Merge, Weight
from mpizero.errors import MpizeroError
from mpizero.memory.arrays import empty_like
from mpizero.memory.order import on_host
from mpizero.reduction.operation import SUM
from mpizero.reduction.shards import mean_into_shard, sum_of_squares

# While one segment is summed the next is filled.
BUFFERS = 2


@dataclass(frozen=True)
class Filling:
    """A part of a parameter's gradient, and the memory of a segment where it is to be put.

    ``elements`` of the gradient (C order) go to the 1-D ``memory``; ``None``: all of it.
    """

    index: int
    elements: slice | None
    memory: Any
    shape: tuple[int, ...]


@dataclass(kw_only=True)
class SegmentPiece(Piece):
    """One segment in flight."""

    space: int
    segment: Segment
    shard_place: slice  # this rank's block in its shard of the space
    gaps: Sequence[slice] = field(repr=False)  # elements that belong to no parameter
    trained: int  # of its members; a segment of none is left out


class GradientSharder(ReducedPasses):
    """Reduces the gradients of ``specs``, laid out in ``spaces``, to this rank's shards.

    ``shards[s]``: this rank's gradient of space s, 1-D, of ``dtypes[s]`` (the parameters' own, or
    float32); ``on_the_way``: the dtypes in which they travel, by default the same (and always with
    ``whole``). ``fill(key, fillings)`` copies gradients into a segment's memory, and returns the
    numbers of those in the list that this rank has no gradient for (or has filled in before),
    which become zero. ``key``: the segment's number, and which memory it is; equal keys come with
    equal fillings. ``left()``: the parameters that still have a gradient when backward
    is over and all segments are sent. ``has()``: for each parameter, does this rank have a gradient
    at the end of backward? By default those that were ``ready``. ``whole``: keep memory for all
    gradients (stage 1). ``unscale()`` is what the gradients are divided by beside their weights:
    the factor of a scaled loss.
    """

    def __init__(
        self,
        lane: Lane,
        group: ShardGroup,
        specs: Sequence[ParameterSpec],
        spaces: Sequence[Space],
        dtypes: Sequence[Any],
        allocate: Allocate,
        *,
        whole: bool,
        on_the_way: Sequence[Any] | None = None,
        stream: Callable[[], int | None] = lambda: None,
        fill: Callable[[tuple[int, int], Sequence[Filling]], Sequence[int]],
        left: Callable[[], Sequence[int]] = lambda: (),
        has: Callable[[], Sequence[bool]] | None = None,
        unscale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        super().__init__(lane, specs, stream, apart=True)
        self._group, self._spaces = group, spaces
        self._fill, self._left, self._unscale = fill, left, unscale
        self._has = has or (lambda: [times > 0 for times in self._came])
        self._whole = whole
        # What came more often than expected is summed in a second round, so nothing need be known
        # beforehand, and the first pass needs no more memory than the others.
        self._expected = [1] * len(specs)
        self._arrivals = []
        self._only_last = True  # may full segments be told by the last of their gradients?
        pieces = [
            _piece(at, space, segment, place)
            for at, space in enumerate(spaces)
            for segment, place in zip(space.segments, space.shard_places(group.part), strict=True)
        ]
        # Backward comes to the last parameters first.
        self._segments = sorted(pieces, key=lambda piece: -min(piece.members, default=0))
        self._segments_of: list[tuple[SegmentPiece, ...]] = _pieces_of(self._segments, len(specs))
        numbers = {id(piece): number for number, piece in enumerate(self._segments)}
        # A segment may hold no more of a parameter than the gap behind it: nothing is put there.
        self._numbers_of = [
            [numbers[id(piece)] for piece in pieces if self._has_part(piece, index)]
            for index, pieces in enumerate(self._segments_of)
        ]
        self._waiting = list(self._segments_of)
        self._dtypes = [np.dtype(dtype) for dtype in dtypes]
        travelling = dtypes if whole or on_the_way is None else on_the_way
        self._on_the_way = [np.dtype(dtype) for dtype in travelling]
        self._make_memory(allocate)
        self.keeps = False  # are there gradients in the shards, to which the next pass adds?
        # A number for what was done to them since the last pass, which all ranks have to have done,
        # and words for it.
        self.marks, self.described = 0, ""
        self._kept: list[Any] = []
        self._squares = [0.0] * len(self._segments)
        self.overflowed = False  # is a gradient of any rank not finite?

    @property
    def pieces(self) -> Sequence[SegmentPiece]:
        return self._segments

    def shard(self, space: int) -> list[Any]:
        """This rank's gradient of a space: the memory of its block of each segment."""
        return [self._own(piece) for piece in self._segments if piece.space == space]

    def shard_of_parameter(self, space: int, index: int) -> Any:
        """This rank's gradient of a parameter that is its own as a whole (1-D)."""
        cut, part, memory = self._spaces[space], self._group.part, self._memory[space]
        return memory[cut.place(index) if self._whole else cut.owned_place(index, part)]

    def segments_of(self, index: int) -> Sequence[int]:
        """The numbers of the segments that a parameter is part of, as ``fill`` is given them."""
        return self._numbers_of[index]

    def _has_part(self, piece: SegmentPiece, index: int) -> bool:
        place = slice(piece.segment.start, piece.segment.stop)
        return self._spaces[piece.space].layout.overlap(str(index), place) is not None

    def view(self, index: int, space: int) -> Any:
        """Stage 1: where all of a parameter's gradient lies."""
        return self._spaces[space].layout.view(self._memory[space], str(index))

    def set_trained(self, trained: Sequence[bool]) -> None:
        """Leave out the segments in which no parameter is trained. The same on all ranks."""
        for piece in self._segments:
            piece.trained = sum(trained[index] for index in piece.members)
        self._wait_for_all()

    @property
    def awaited(self) -> list[int]:
        """The parameters whose gradients must be announced; the others come before one of them."""
        return [index for index, pieces in enumerate(self._waiting) if pieces]

    @property
    def own_squares(self) -> float:
        """The sum of squares of this rank's shards."""
        return sum(
            squares
            for piece, squares in zip(self._segments, self._squares, strict=True)
            if piece.trained
        )

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of this rank's gradient memory, by use."""
        held = sum(int(each.nbytes) for each in self._memory)
        buffers = sum(int(each.nbytes) for known in self._buffers.values() for each in known)
        return {"gradients": held, "buffers": buffers}

    def plan(self, weight: Weight, kept: bool) -> Merge:
        return self._ledger.plan(weight, kept, self.keeps)

    def accumulate(self, merge: Merge) -> None:
        self._put_mean_aside()
        super().accumulate(merge)

    def open(self, merge: Merge, *, changed: bool = False) -> None:
        self._put_mean_aside()
        super().open(merge, changed=changed)

    def open_kept(self, *, changed: bool = False) -> None:
        self.open(self._ledger.plan_kept(self.keeps), changed=changed)

    def announce_update(self) -> None:
        """Tell the ranks that have run out of data that an update follows. Collective."""
        Opening(self._world, News(updates=1.0)).wait()

    def _put_mean_aside(self) -> None:
        if not self.keeps:
            self._kept = []
        elif self._whole and not self._kept:
            # The place of the mean is about to be filled with this rank's next gradients.
            with self._using():
                self._kept = [self._own(piece).copy() for piece in self._segments]

    @property
    def mean_is_aside(self) -> bool:
        """Has the mean made place for gradients of this rank, which are kept there?"""
        return bool(self._kept)

    def zero_kept(self, members: Collection[int]) -> None:
        """The mean that was put aside, while its place is used, becomes zero for ``members``.

        All of the parameters of a space, or none of them, are among these.
        """
        own = set(members)
        with self._using():
            for piece, each in zip(self._segments, self._kept, strict=False):
                if own.issuperset(piece.segment.members):
                    each[...] = 0

    def _own_news(self) -> dict[str, float]:
        marks = float(self.marks % MARKS)
        return {"keeps": float(self.keeps), "marks": marks, "squared_marks": marks**2}

    def _follow(self, told: News) -> None:
        self.keeps = bool(told.keeps)  # have the others' gradients been forgotten since?
        if self.keeps and told.marks != told.active * (self.marks % MARKS):
            raise MpizeroError(
                "join(): other ranks have changed some of the gradients that they add to, which "
                "this rank, at the end of its data, cannot have done. Change gradients after the "
                "last backward() before a step."
            )
        self._put_mean_aside()

    def _count_in(self) -> None:
        for piece in self._segments:
            piece.missing = piece.trained if self._arrivals is not None else min(1, piece.trained)

    def _came_again(self, index: int) -> None:
        pass  # it will be found left

    def _learn(self) -> None:
        """After the first pass: which gradient of each segment comes last. Calls cost time."""
        super()._learn()
        if self._arrivals is None or not self._only_last or not self._arrivals:
            return
        position = {index: at for at, index in enumerate(self._arrivals)}
        self._arrivals = None
        waiting: list[list[Piece]] = [[] for _ in self._specs]
        for piece in self._segments:
            came = [index for index in piece.members if index in position]
            if came:
                waiting[max(came, key=position.__getitem__)].append(piece)
        self._waiting = [tuple(each) for each in waiting]

    def _wait_for_all(self) -> None:
        """Count all gradients in, and learn anew."""
        self._arrivals = []
        self._waiting = list(self._segments_of)

    def _launch(self, piece: Piece) -> None:
        own = self._segments[self._launched - 1]
        if own.trained:
            self._reduce(own, self._launched - 1, again=False)

    def _reduce(self, piece: SegmentPiece, number: int, again: bool) -> None:
        out = self._own(piece)
        memory, buffer = self._segment_memory(piece, number)
        fillings = self._fillings(number, buffer, memory)
        with self._using():
            kept = self._kept_of(piece, number, again)
            for at in self._fill((number, buffer), fillings):
                fillings[at].memory[...] = 0
            for gap in piece.gaps:
                memory[gap] = 0
        opening = self._opening
        if opening is None:
            raise RuntimeError("a segment is reduced outside of a pass")
        unscale, of_mean = self._unscale(), self._ledger.mean_weight

        def use(rows: list[Any]) -> None:
            told, share = opening.wait(), 1.0
            if told.stated and not again:
                share = of_mean / told.weight if told.weight else 0.0
            squares = mean_into_shard(rows, out, opening.divisor * unscale, kept, share)
            self._squares[number] = squares if isfinite(squares) else _exact_squares(out)

        name = self._specs[piece.members[0]].name
        piece.handle = self._group.combine(
            f"the gradients from '{name}' on",
            memory,
            piece.segment.blocks,
            use,
            self._stream,
            (out,) if kept is None else (out, kept),
            self._scaled(memory),
        )

    def _kept_of(self, piece: SegmentPiece, number: int, again: bool) -> Any:
        """What a segment's mean is added to; None: nothing."""
        if again:
            return self._own(piece).copy() if self._whole else self._own(piece)
        if not self.keeps:
            return None
        return self._kept[number] if self._whole else self._own(piece)

    def _collect(self) -> list[bool]:
        anywhere, late = self._finish()
        while any(late):  # some rank got gradients after their segment had been sent
            for number, piece in enumerate(self._segments):
                if any(late[index] for index in piece.members) and piece.trained:
                    self._reduce(piece, number, again=True)
            anywhere, late = self._finish()
        return anywhere

    def _finish(self) -> tuple[list[bool], list[bool]]:
        """Wait; which parameters have a gradient, and one that is left, on any rank?"""
        if self._opening is not None:
            told = self._opening.check()
            if told.marks_differ:
                said = [self.described, hex(self.marks)]
                self._world.agree(said, "the gradients to which a backward pass adds")
        for piece in self._segments:
            self._wait_segment(piece)
        left = list(self._left())
        if left:
            self._only_last = False
            self._wait_for_all()
        found = self._close_together(self._has(), left)
        self.overflowed = bool(found[0])
        self._kept = []
        has, late = found[1:].reshape(2, -1) > 0
        return has.tolist(), late.tolist()

    def _close_together(self, has_gradient: Sequence[bool], left: Sequence[int]) -> Any:
        """Sum what the ranks tell each other when a pass ends."""
        mine = self.own_squares
        overflow = not isfinite(mine)
        count = len(self._specs)
        closing = np.zeros(1 + 2 * count)
        closing[0] = overflow
        closing[1 : 1 + count] = has_gradient
        closing[[1 + count + index for index in left]] = 1
        self._world.submit(
            "the closing of a backward pass",
            lambda run, parts: run.all_reduce(closing, SUM),
            on_host(closing),
        ).wait()
        return closing

    def _wait_segment(self, piece: SegmentPiece) -> None:
        if piece.handle is not None:
            piece.handle.wait()
            piece.handle = None

    def _make_memory(self, allocate: Allocate) -> None:
        self._buffers: dict[np.dtype[Any], list[Any]] = {}
        self._users: dict[tuple[np.dtype[Any], int], SegmentPiece] = {}
        self._known_fillings: dict[tuple[int, int], list[Filling]] = {}
        spaces = list(zip(self._spaces, self._dtypes, strict=True))
        if self._whole:
            self._memory = [allocate(space.size, dtype) for space, dtype in spaces]
            return
        for dtype in dict.fromkeys(self._on_the_way):
            sizes = [p.segment.size for p in self._segments if self._on_the_way[p.space] == dtype]
            self._buffers[dtype] = [
                allocate(max(sizes), dtype) for _ in range(min(BUFFERS, len(sizes)))
            ]
        self._memory = []
        for (space, dtype), travelling in zip(spaces, self._on_the_way, strict=True):
            with self._using():
                memory = empty_like(
                    self._buffers[travelling][0], (space.shard_size(self._group.part),), dtype
                )
                memory[...] = 0
            self._memory.append(memory)

    def _own(self, piece: SegmentPiece) -> Any:
        """This rank's gradients of a segment."""
        memory = self._memory[piece.space]
        if self._whole:
            return memory[piece.segment.block(self._group.part)]
        return memory[piece.shard_place]

    def _segment_memory(self, piece: SegmentPiece, number: int) -> tuple[Any, int]:
        """Where a segment is put together, and which of the buffers that is.

        Waits for the segment that used it before.
        """
        segment, dtype = piece.segment, self._on_the_way[piece.space]
        if self._whole:
            return self._memory[piece.space][segment.start : segment.stop], 0
        at = number % len(self._buffers[dtype])
        user = self._users.get((dtype, at))
        if user is not None:
            self._wait_segment(user)
        self._users[dtype, at] = piece
        return self._buffers[dtype][at][: segment.size], at

    def _fillings(self, number: int, buffer: int, memory: Any) -> list[Filling]:
        if (number, buffer) not in self._known_fillings:
            piece = self._segments[number]
            layout, segment = self._spaces[piece.space].layout, piece.segment
            found = self._known_fillings[number, buffer] = []
            for index in piece.members:
                overlap = layout.overlap(str(index), slice(segment.start, segment.stop))
                if overlap is not None:
                    elements, place = overlap
                    entry = layout.entries[str(index)]
                    is_whole = elements.stop - elements.start == entry.count
                    found.append(
                        Filling(index, None if is_whole else elements, memory[place], entry.shape)
                    )
        return self._known_fillings[number, buffer]


def _piece(at: int, space: Space, segment: Segment, place: slice) -> SegmentPiece:
    within = slice(segment.start, segment.stop)
    used = np.zeros(segment.size, bool)
    for index in segment.members:
        overlap = space.layout.overlap(str(index), within)
        if overlap is not None:
            used[overlap[1]] = True
    return SegmentPiece(
        members=segment.members,
        space=at,
        segment=segment,
        shard_place=place,
        gaps=_runs(~used),
        trained=len(segment.members),
    )


def _runs(mask: Any) -> list[slice]:
    """Where a mask is true: slices, which a device needs no list of indices for."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return [slice(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _pieces_of(pieces: Sequence[SegmentPiece], count: int) -> list[tuple[SegmentPiece, ...]]:
    of: list[list[SegmentPiece]] = [[] for _ in range(count)]
    for piece in pieces:
        for index in piece.members:
            of[index].append(piece)
    return [tuple(each) for each in of]


def _exact_squares(values: Any) -> float:
    """Of numbers whose squares are too large for their dtype; not finite if the numbers are not."""
    total = 0.0
    for start in range(0, values.size, 1 << 16):
        total += sum_of_squares(values[start : start + (1 << 16)].astype(np.float64))
    return total
