"""``ShardedState``: named arrays of which every rank keeps 1/n.

The arrays of one dtype lie behind one another in flat memory (``FlatLayout``), which is cut into as
many equal shards as there are ranks, wherever in an array a cut may fall (Rajbhandari et al. 2020,
arXiv 1910.02054, section 5). The layout knows nothing of ranks, so the same state can be cut anew
for another number of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from mpizero.api import World
from mpizero.errors import ArgumentError
from mpizero.layout import FlatLayout
from mpizero.memory.arrays import empty_like

# What travels at a time where a rank has no room for the whole: bounds the memory beside the shard.
_CHUNK_BYTES = 16 << 20

Layouts = dict[np.dtype[Any], FlatLayout]


class ShardedState:
    """Named arrays (numpy or CuPy; any shapes; dtypes may differ), sharded over ``world``.

    ``flats[dtype]`` is this rank's shard of all arrays of a dtype: 1-D, of the same length on every
    rank; changing it changes the state. Shards may be padding only, where ranks outnumber elements.
    """

    def __init__(self, world: World, layouts: Layouts, flats: dict[np.dtype[Any], Any]) -> None:
        self.world = world
        self.layouts = layouts
        self.flats = flats

    @classmethod
    def scatter(
        cls, arrays: Mapping[str, Any], world: World, root: int | None = None
    ) -> ShardedState:
        """Keep 1/n of ``arrays`` on every rank. Collective.

        All ranks pass arrays of the same names, shapes and dtypes, and the same values; with
        ``root``, only that rank's values count. Raises MismatchError, naming the first difference.
        """
        with world.together("ShardedState.scatter()"):
            return cls._scattered(arrays, world, root)

    @classmethod
    def _scattered(cls, arrays: Mapping[str, Any], world: World, root: int | None) -> ShardedState:
        world.agree(
            [f"{name}: {array.dtype}, shape {array.shape}" for name, array in arrays.items()],
            "the arrays to scatter",
        )
        if root is not None and not 0 <= root < world.size:
            raise ArgumentError("scatter()", "root", str(root), f"None, or 0 to {world.size - 1}")
        layouts = _lay_out({name: (array.shape, array.dtype) for name, array in arrays.items()})
        like = next(iter(arrays.values()), None)
        state = cls(world, layouts, _empty_shards(layouts, world.size, like))
        for name, given in arrays.items():
            array = given
            if root is not None and world.size > 1:
                array = world.broadcast(given.copy(), root)
            piece, elements = state.piece(name)
            piece[...] = array.reshape(-1)[elements]
        return state

    @classmethod
    def empty(cls, forms: Mapping[str, tuple[tuple[int, ...], Any]], world: World) -> ShardedState:
        """Of arrays that are all zeros, by name: their shapes and dtypes. In host memory."""
        layouts = _lay_out(forms)
        return cls(world, layouts, _empty_shards(layouts, world.size, np.empty(0)))

    @property
    def names(self) -> list[str]:
        """All arrays' names, by dtype, in the order in which they were given."""
        return [name for layout in self.layouts.values() for name in layout.entries]

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's shards, padding included."""
        return sum(int(flat.nbytes) for flat in self.flats.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a whole array. Raises ArgumentError for a name that there is not."""
        return self._layout_of(name).entries[name].shape

    def piece(self, name: str) -> tuple[Any, slice]:
        """This rank's part of an array: a view of its shard, and which elements (C order) it is.

        Empty if none of it lies here. Raises ArgumentError for a name that there is not.
        """
        layout = self._layout_of(name)
        found = layout.overlap(name, self.own_place(layout))
        if found is None:
            return self.flats[layout.dtype][:0], slice(0, 0)
        elements, place = found
        return self.flats[layout.dtype][place], elements

    def own_place(self, layout: FlatLayout) -> slice:
        """Which of a layout's flat elements are this rank's shard."""
        size = layout.shard_size(self.world.size)
        return slice(self.world.rank * size, (self.world.rank + 1) * size)

    def gather(self, root: int | None = None) -> dict[str, Any] | None:
        """The whole arrays: on every rank, or on ``root`` only (None elsewhere). Collective.

        Takes no memory beside the result and, for ``root``, a chunk of 16 MiB.
        """
        if root is not None:
            with self.world.together("ShardedState.gather()"):
                if not 0 <= root < self.world.size:
                    allowed = f"None, or 0 to {self.world.size - 1}"
                    raise ArgumentError("gather()", "root", str(root), allowed)
                here = self.world.rank == root
                found = self._collect(self.names, here)
                return found if here else None
        found = {}
        for dtype, layout in self.layouts.items():
            whole = self.world.allgather(self.flats[dtype])
            found |= {name: layout.view(whole, name) for name in layout.entries}
        return found

    def allgather(self, names: Iterable[str]) -> dict[str, Any]:
        """Some arrays, whole, on every rank: only these travel. Collective.

        Raises MismatchError if the ranks name different ones, ArgumentError for unknown ones.
        """
        with self.world.together("ShardedState.allgather()"):
            wanted = list(names)
            self.world.agree(wanted, "the names of the arrays to gather")
            return self._collect(wanted, True)

    def reshard(self, target: World | None) -> ShardedState | None:
        """The same state, cut for the ranks of ``target``. Collective over this state's world.

        ``target``: a world of some of this world's ranks (of ``world.split``, for instance: each
        part gets a whole state), or None on ranks that get nothing. Raises ArgumentError if it has
        ranks that hold no shard.
        """
        with self.world.together("ShardedState.reshard()"):
            return self._resharded(target)

    def _resharded(self, target: World | None) -> ShardedState | None:
        found = None
        if target is not None:
            if not self.world.holds(target):
                allowed = "a world of ranks that this state is sharded over"
                raise ArgumentError("reshard()", "target", repr(target), allowed)
            like = next(iter(self.flats.values()), None)
            found = ShardedState(
                target, self.layouts, _empty_shards(self.layouts, target.size, like)
            )
        for dtype, layout in self.layouts.items():
            for start, chunk in self._travel(layout, slice(0, layout.size)):
                if found is not None:
                    size = layout.shard_size(found.world.size)
                    _copy_overlap(chunk, start, found.flats[dtype], found.world.rank * size)
        return found

    def _collect(self, names: list[str], here: bool) -> dict[str, Any]:
        """Send the named arrays chunk by chunk; keep them where they are wanted."""
        layouts = [self._layout_of(name) for name in names]  # before anything travels
        found: dict[str, Any] = {}
        for name, layout in zip(names, layouts, strict=True):
            entry = layout.entries[name]
            flat = empty_like(self.flats[layout.dtype], (entry.count if here else 0,))
            for start, chunk in self._travel(layout, entry.place):
                _copy_overlap(chunk, start, flat, entry.offset)
            if here:
                found[name] = flat.reshape(entry.shape)
        return found

    def _travel(self, layout: FlatLayout, place: slice) -> Iterator[tuple[int, Any]]:
        """Every rank's part of a range of the flat elements, in chunks: (where it begins, data)."""
        flat, size = self.flats[layout.dtype], layout.shard_size(self.world.size)
        width = _CHUNK_BYTES // layout.dtype.itemsize
        start = place.start
        while start < place.stop:
            owner = start // size
            stop = min(place.stop, (owner + 1) * size, start + width)
            if owner == self.world.rank:
                chunk = flat[start - owner * size : stop - owner * size]
            else:
                chunk = empty_like(flat, (stop - start,))
            if self.world.size > 1:
                self.world.broadcast(chunk, owner)
            yield start, chunk
            start = stop

    def _layout_of(self, name: str) -> FlatLayout:
        for layout in self.layouts.values():
            if name in layout.entries:
                return layout
        raise ArgumentError("ShardedState", "name", repr(name), ", ".join(self.names) or "none")


def _lay_out(forms: Mapping[str, tuple[tuple[int, ...], Any]]) -> Layouts:
    by_dtype: dict[np.dtype[Any], list[tuple[str, tuple[int, ...]]]] = {}
    for name, (shape, dtype) in forms.items():
        by_dtype.setdefault(np.dtype(dtype), []).append((name, tuple(shape)))
    return {dtype: FlatLayout.of(group, dtype) for dtype, group in by_dtype.items()}


def _empty_shards(layouts: Layouts, ranks: int, like: Any) -> dict[np.dtype[Any], Any]:
    flats = {}
    for dtype, layout in layouts.items():
        flats[dtype] = empty_like(like, (layout.shard_size(ranks),), dtype)
        flats[dtype][...] = 0
    return flats


def _copy_overlap(source: Any, source_start: int, target: Any, target_start: int) -> None:
    """Copy what two ranges of one flat memory have in common."""
    start = max(source_start, target_start)
    stop = min(source_start + source.size, target_start + target.size)
    if start < stop:
        target[start - target_start : stop - target_start] = source[
            start - source_start : stop - source_start
        ]
