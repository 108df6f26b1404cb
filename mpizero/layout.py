"""``FlatLayout``: where named arrays lie in one flat piece of memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

# Arrays begin at multiples of a cache line, so that kernels may use aligned loads and two ranks
# that write neighbouring arrays never share a line.
ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class Entry:
    """One array: ``count`` elements from element ``offset`` on."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def place(self) -> slice:
        return slice(self.offset, self.offset + self.count)


@dataclass(frozen=True)
class FlatLayout:
    """Named shapes of one dtype, in order, as aligned places in ``size`` elements.

    Knows nothing of ranks: the same layout can be cut for any number of them.
    """

    dtype: np.dtype[Any]
    entries: Mapping[str, Entry]
    size: int

    @classmethod
    def of(cls, shapes: Iterable[tuple[str, tuple[int, ...]]], dtype: Any) -> FlatLayout:
        """Lay the arrays out one behind the other, each aligned to a cache line."""
        dtype = np.dtype(dtype)
        step = max(1, ALIGNMENT_BYTES // dtype.itemsize)
        entries: dict[str, Entry] = {}
        end = 0
        for name, shape in shapes:
            entries[name] = Entry(name, tuple(shape), end)
            end += -(-prod(shape) // step) * step
        return cls(dtype, entries, end)

    def view(self, flat: Any, name: str) -> Any:
        """The array ``name`` in ``flat`` (1-D, ``size`` elements), as a view of its shape."""
        entry = self.entries[name]
        return flat[entry.place].reshape(entry.shape)

    def shard_size(self, ranks: int) -> int:
        """Elements of each of ``ranks`` equal shards, the padding of the last ones included."""
        step = max(1, ALIGNMENT_BYTES // self.dtype.itemsize)
        return -(-self.size // (ranks * step)) * step

    def overlap(self, name: str, place: slice) -> tuple[slice, slice] | None:
        """What of an array lies in ``place``, a range of the flat elements; None if nothing does.

        The range of the array's own elements (C order) that lies there, and where in ``place``.
        """
        entry = self.entries[name]
        start = max(entry.offset, place.start)
        stop = min(entry.place.stop, place.stop)
        if start >= stop:
            return None
        of_entry = slice(start - entry.offset, stop - entry.offset)
        return of_entry, slice(start - place.start, stop - place.start)
