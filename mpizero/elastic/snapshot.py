"""``Snapshot``: a commit, read like a checkpoint by those who are left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpizero.api import World
from mpizero.checkpoint import TensorSpec
from mpizero.collectives.transport import MpiTransport
from mpizero.elastic.store import Index, Slot, data_start
from mpizero.errors import ArgumentError


class Place(NamedTuple):
    """Where elements of a tensor are: at so many bytes of the data of an old rank's slot."""

    first: int
    last: int
    rank: int
    at: int


Needed = Callable[[str, str], bool]  # of a part and a tensor in it: will anybody read it?

Range = tuple[str, str, int, int, Place]  # part, tensor, elements, and where they are


class Snapshot:
    """Tensors by part and name, put together from the pieces of ``indices``, by old rank.

    ``slots``: of the old ranks whose memory this rank can read. Where that is not all that it asks
    for, what it is given is zeros, and it is noted: after ``fetch`` it can be asked for again.
    """

    def __init__(
        self, indices: Mapping[int, Index], slots: Mapping[int, Slot], senders: Mapping[int, int]
    ) -> None:
        self.path = Path("the memory of the ranks")
        self._slots, self._senders = dict(slots), dict(senders)
        self._index = next(iter(indices.values()))
        self._starts = {
            rank: data_start(int(slot.memory[:64].view(np.int64)[1]))
            for rank, slot in slots.items()
        }
        self._places: dict[tuple[str, str], list[Place]] = {}
        for rank, index in sorted(indices.items()):
            for part, name, first, count, place in index.pieces:
                known = self._places.setdefault((part, name), [])
                known.append(Place(first, first + count, rank, place))
        for known in self._places.values():
            known.sort()
        self._wanted: list[Range] = []
        self._fetched: dict[Range, Any] = {}

    def is_whole(self, needed: Needed) -> bool:
        """Is every element of every tensor that is ``needed`` in somebody's memory?"""
        return all(
            _covers(self._places.get((part, name), ()), spec.count)
            for part, specs in self._index.specs.items()
            for name, spec in specs.items()
            if needed(part, name)
        )

    @property
    def is_scattered(self) -> bool:
        """May there be pieces that some ranks cannot read by themselves? The same on all."""
        return len(set(self._senders.values())) > 1

    @property
    def values(self) -> dict[str, Any]:
        """What was committed that is no tensor, by part."""
        return self._index.values

    def specs(self, part: str) -> Mapping[str, TensorSpec]:
        """The tensors of a part, by name; empty if there is no such part."""
        return self._index.specs.get(part, {})

    def metadata(self, part: str) -> dict[str, str]:
        """The strings that belong to a part."""
        return self._index.metadata.get(part, {})

    def read(self, part: str, name: str, elements: slice | None = None) -> Any:
        """The ``elements`` of a tensor, 1-D in C order, or all of it in its shape."""
        spec = self._spec(part, name)
        place = slice(0, spec.count) if elements is None else elements
        out = self.borrow(part, name, place)
        return out.reshape(spec.shape) if elements is None else out

    def borrow(self, part: str, name: str, elements: slice) -> Any:
        """The same, 1-D."""
        spec = self._spec(part, name)
        out = np.zeros(elements.stop - elements.start, spec.dtype)
        for low, high, place in self._tiles(part, name, elements):
            into = out[low - elements.start : high - elements.start]
            known = self._fetched.get((part, name, low, high, place))
            if known is not None:
                into[...] = known
            elif place.rank in self._slots:
                into[...] = self._here(place, spec.dtype, low, high)
            else:
                self._wanted.append((part, name, low, high, place))
        return out

    def want(self, part: str, prefix: str) -> None:
        """Ask for all tensors of a part whose names begin so, without looking at them yet."""
        for name, spec in self.specs(part).items():
            if name.startswith(prefix):
                self.borrow(part, name, slice(0, spec.count))

    def fetch(self, world: World) -> None:
        """Get what has been asked for in vain from the ranks that can read it. Collective."""
        wanted, self._wanted = list(dict.fromkeys(self._wanted)), []
        everyones: list[list[Range]] = world.gather_objects(wanted)
        outgoing = [
            self._gather(each for each in ranges if self._senders[each[-1].rank] == world.rank)
            for ranges in everyones
        ]
        senders = [self._senders[place.rank] for *_, place in wanted]
        nbytes = [self._nbytes(each) for each in wanted]
        total = [sum(n for n, by in zip(nbytes, senders, strict=True) if by == sender)
                 for sender in range(world.size)]  # fmt: skip
        incoming = [np.empty(each, np.uint8) for each in total]
        transport = MpiTransport(world.comm, world.device)
        for shift in range(1, world.size):
            to, source = (world.rank + shift) % world.size, (world.rank - shift) % world.size
            transport.exchange(outgoing[to], to, incoming[source], source)
        at = [0] * world.size
        for each, sender, size in zip(wanted, senders, nbytes, strict=True):
            data = incoming[sender][at[sender] : at[sender] + size]
            # A copy: the numbers of one may begin anywhere in the message.
            self._fetched[each] = data.copy().view(self._spec(each[0], each[1]).dtype)
            at[sender] += size

    def _tiles(self, part: str, name: str, elements: slice) -> Iterator[tuple[int, int, Place]]:
        """Who has which of the ``elements``, each once; this rank's own memory first."""
        places = sorted(
            self._places.get((part, name), ()), key=lambda each: each.rank not in self._slots
        )
        missing = [(elements.start, elements.stop)]
        for place in places:
            left = []
            for start, stop in missing:
                low, high = max(start, place.first), min(stop, place.last)
                if low >= high:
                    left.append((start, stop))
                    continue
                yield low, high, place
                left += [each for each in ((start, low), (high, stop)) if each[0] < each[1]]
            missing = left

    def _gather(self, ranges: Iterable[Range]) -> Any:
        """The bytes of these ranges, one behind the other."""
        found = [np.empty(0, np.uint8)]
        for part, name, low, high, place in ranges:
            values = self._here(place, self._spec(part, name).dtype, low, high)
            found.append(np.ascontiguousarray(values).view(np.uint8))
        return np.concatenate(found)

    def _nbytes(self, wanted: Range) -> int:
        part, name, low, high, _ = wanted
        return (high - low) * self._spec(part, name).dtype.itemsize

    def _here(self, place: Place, dtype: Any, low: int, high: int) -> Any:
        start = self._starts[place.rank] + place.at + (low - place.first) * dtype.itemsize
        stop = start + (high - low) * dtype.itemsize
        return self._slots[place.rank].memory[start:stop].view(dtype)

    def _spec(self, part: str, name: str) -> TensorSpec:
        found = self.specs(part).get(name)
        if found is None:
            raise ArgumentError("commit()", part, f"tensor {name!r}", "one that was committed")
        return found


def _covers(places: Sequence[Place], count: int) -> bool:
    """Do sorted places leave no element out?"""
    end = 0
    for first, last, *_ in places:
        if first > end:
            return False
        end = max(end, last)
    return end >= count
