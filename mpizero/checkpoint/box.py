"""``Box``: the part of a whole tensor that one rank has, and where its elements are in the whole.

Tensor parallelism cuts a tensor along its axes; a checkpoint holds it whole. A rank's elements, in
the order in which it has them, are *strips* of the whole, each without a gap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from mpizero.checkpoint.readable import Readable
from mpizero.errors import ArgumentError


@dataclass(frozen=True)
class Box:
    """``sizes`` elements from ``offsets`` on, along each axis of a tensor of ``shape``."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        for whole, offset, size in zip(self.shape, self.offsets, self.sizes, strict=True):
            if not 0 <= offset <= offset + size <= whole:
                raise ArgumentError("Box()", "sizes", str(self), "a part of the whole")

    @classmethod
    def of_all(cls, shape: tuple[int, ...]) -> Box:
        """All of a tensor."""
        return cls(shape, (0,) * len(shape), shape)

    @property
    def is_whole(self) -> bool:
        return self.sizes == self.shape

    @property
    def count(self) -> int:
        """How many elements it has."""
        return prod(self.sizes)

    def strips(self, elements: slice) -> Iterator[tuple[int, slice]]:
        """Where the box's ``elements`` (C order) are: a first element in the whole, and which.

        In order; each strip is as long as can be.
        """
        width = self._width
        at = elements.start
        while at < elements.stop:
            strip, within = divmod(at, width)
            stop = min(elements.stop, (strip + 1) * width)
            yield self._start(strip) + within, slice(at, stop)
            at = stop

    def cover(self, elements: slice) -> slice:
        """The shortest range of the whole in which the box's ``elements`` all are."""
        if elements.start >= elements.stop:
            return slice(0, 0)
        width = self._width
        first, last = divmod(elements.start, width), divmod(elements.stop - 1, width)
        return slice(self._start(first[0]) + first[1], self._start(last[0]) + last[1] + 1)

    @cached_property
    def _axis(self) -> int:
        """The last axis that is cut: what is behind it is without gaps. 0 if none is."""
        cut = [a for a, (own, all_) in enumerate(zip(self.sizes, self.shape, strict=True))
               if own != all_]  # fmt: skip
        return cut[-1] if cut else 0

    @cached_property
    def _width(self) -> int:
        """Elements of a strip."""
        return max(1, self.count if self.is_whole else prod(self.sizes[self._axis :]))

    def _start(self, strip: int) -> int:
        """Where in the whole a strip begins."""
        if self.is_whole:
            return 0
        behind, start = prod(self.shape[self._axis + 1 :]), 0
        start = self.offsets[self._axis] * behind
        step = behind * self.shape[self._axis]
        for axis in range(self._axis - 1, -1, -1):
            strip, place = divmod(strip, self.sizes[axis])
            start += (self.offsets[axis] + place) * step
            step *= self.shape[axis]
        return start


def read_box(
    checkpoint: Readable, part: str, name: str, box: Box, elements: slice | None = None
) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """A box's ``elements`` of a stored tensor, 1-D in C order; all of them by default.

    Reads the range of the whole that they are in, once. Memory that is not the caller's, as
    ``borrow``'s: to be copied at once.
    """
    wanted = slice(0, box.count) if elements is None else elements
    cover = box.cover(wanted)
    found = checkpoint.borrow(part, name, cover)
    if cover.stop - cover.start == wanted.stop - wanted.start:
        return found  # type: ignore[no-any-return]
    own = np.empty(wanted.stop - wanted.start, found.dtype)
    for start, which in box.strips(wanted):
        here = slice(which.start - wanted.start, which.stop - wanted.start)
        own[here] = found[start - cover.start : start - cover.start + which.stop - which.start]
    return own
