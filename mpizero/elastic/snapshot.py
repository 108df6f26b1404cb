"""``Snapshot``: a commit, read like a checkpoint by those who are left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpizero.api import World
from mpizero.checkpoint import TensorSpec
from mpizero.collectives.transport import MpiTransport
from mpizero.elastic.store import Index, Slot, data_start
from mpizero.errors import ArgumentError

Place = tuple[int, int, int, int]  # first element, last, the rank that wrote it, place in its slot
Range = tuple[str, str, int, int]  # part, tensor, elements


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
                known.append((first, first + count, rank, place))
        for known in self._places.values():
            known.sort()
        self._wanted: list[Range] = []
        self._fetched: dict[tuple[str, str], list[tuple[int, Any]]] = {}

    @property
    def is_whole(self) -> bool:
        """Is every element of every tensor in somebody's memory?"""
        return all(
            _covers(self._places.get((part, name), ()), spec.count)
            for part, specs in self._index.specs.items()
            for name, spec in specs.items()
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
        for first, last, rank, place in self._places.get((part, name), ()):
            low, high = max(first, elements.start), min(last, elements.stop)
            if low < high:
                into = out[low - elements.start : high - elements.start]
                if rank in self._slots:
                    into[...] = self._here(rank, place, spec.dtype, first, low, high)
                else:
                    self._from_afar(part, name, low, high, into)
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
            self._gather(ranges, only=world.rank, requester=rank)
            for rank, ranges in enumerate(everyones)
        ]
        incoming = [
            np.empty(self._nbytes(wanted, sender, world.rank), np.uint8)
            for sender in range(world.size)
        ]
        transport = MpiTransport(world.comm, world.device)
        for shift in range(1, world.size):
            to, source = (world.rank + shift) % world.size, (world.rank - shift) % world.size
            transport.exchange(outgoing[to], to, incoming[source], source)
        at = [0] * world.size
        for part, name, first, last in wanted:
            out = np.empty(last - first, self._spec(part, name).dtype)
            for low, high, _, _, sender in self._pieces(part, name, first, last):
                nbytes = (high - low) * out.itemsize
                data = incoming[sender][at[sender] : at[sender] + nbytes]
                out.view(np.uint8)[(low - first) * out.itemsize :][:nbytes] = data
                at[sender] += nbytes
            self._fetched.setdefault((part, name), []).append((first, out))

    def _gather(self, ranges: Sequence[Range], only: int, requester: int) -> Any:
        """The bytes that this rank has to send for another's ranges, in their order."""
        found = [np.empty(0, np.uint8)]
        for part, name, first, last in ranges:
            dtype = self._spec(part, name).dtype
            for low, high, rank, place, sender in self._pieces(part, name, first, last):
                if sender == only != requester:
                    begin = self._first_of(part, name, rank, place)
                    values = self._here(rank, place, dtype, begin, low, high)
                    found.append(np.ascontiguousarray(values).view(np.uint8))
        return np.concatenate(found)

    def _nbytes(self, ranges: Sequence[Range], sender: int, requester: int) -> int:
        return sum(
            (high - low) * self._spec(part, name).dtype.itemsize
            for part, name, first, last in ranges
            for low, high, _, _, each in self._pieces(part, name, first, last)
            if each == sender != requester
        )

    def _pieces(
        self, part: str, name: str, first: int, last: int
    ) -> list[tuple[int, int, int, int, int]]:
        """What overlaps a range: elements, the old rank, the place in its slot, and who sends."""
        return [
            (max(start, first), min(stop, last), rank, place, self._senders[rank])
            for start, stop, rank, place in self._places[part, name]
            if max(start, first) < min(stop, last)
        ]

    def _first_of(self, part: str, name: str, rank: int, place: int) -> int:
        return next(s for s, _, r, at in self._places[part, name] if (r, at) == (rank, place))

    def _here(self, rank: int, place: int, dtype: Any, first: int, low: int, high: int) -> Any:
        start = self._starts[rank] + place + (low - first) * dtype.itemsize
        return self._slots[rank].memory[start : start + (high - low) * dtype.itemsize].view(dtype)

    def _from_afar(self, part: str, name: str, low: int, high: int, into: Any) -> None:
        for first, values in self._fetched.get((part, name), ()):
            if first <= low and high <= first + values.size:
                into[...] = values[low - first : high - first]
                return
        self._wanted.append((part, name, low, high))

    def _spec(self, part: str, name: str) -> TensorSpec:
        found = self.specs(part).get(name)
        if found is None:
            raise ArgumentError("commit()", part, f"tensor {name!r}", "one that was committed")
        return found


def _covers(places: Sequence[Place], count: int) -> bool:
    """Do sorted places leave no element out?"""
    end = 0
    for first, last, _, _ in places:
        if first > end:
            return False
        end = max(end, last)
    return end >= count
