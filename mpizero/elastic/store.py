"""``Store``: the last two commits of every rank of a World, in memory that outlives the rank.

Two, because a rank may die while the next is being written. A commit that all have come to the end
of is there on all ranks, and only then is the memory of the one before it used again.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpizero.api import World
from mpizero.checkpoint import Part, TensorSpec
from mpizero.collectives.transport import MpiTransport
from mpizero.memory.node_shared import open_shared
from mpizero.memory.shared_file import fence

# A slot begins with its commit's number (0: none that is whole) and the length of its index.
_HEAD_BYTES = 64
_ALIGNMENT = 64
_ROUND_TO = 64 << 10  # the index of the next commit may be a little longer


@dataclass(frozen=True)
class Index:
    """What a slot holds: ``pieces`` are (part, tensor, first element, elements, place in bytes).

    The rest is the same on all ranks.
    """

    specs: dict[str, dict[str, TensorSpec]]
    metadata: dict[str, dict[str, str]]
    values: dict[str, Any]
    pieces: list[tuple[str, str, int, int, int]]


class Slot:
    """Memory for one commit of one rank (1-D, bytes)."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self._head = memory[:_HEAD_BYTES].view(np.int64)

    @property
    def number(self) -> int:
        """The commit that it holds, whole; or 0."""
        return int(self._head[0])

    def index(self) -> Index:
        """What it holds."""
        found = pickle.loads(self.memory[_HEAD_BYTES : _HEAD_BYTES + int(self._head[1])])
        assert isinstance(found, Index)
        return found

    def write(self, number: int, packed: Packed) -> None:
        """Make it hold this commit. Whoever dies in here leaves one that holds none."""
        self._head[0] = 0
        fence()
        self._head[1] = len(packed.index)
        self.memory[_HEAD_BYTES : _HEAD_BYTES + len(packed.index)] = np.frombuffer(
            packed.index, np.uint8
        )
        for place, values in packed.arrays:
            own = values if isinstance(values, np.ndarray) else values.get()
            # As bytes of the array's own dtype: no copy in between.
            self.memory[place : place + own.nbytes].view(own.dtype)[...] = own.reshape(-1)
        fence()
        self._head[0] = number


class Packed:
    """A rank's part of a commit, laid out: what goes where in a slot of ``nbytes``."""

    def __init__(self, parts: Sequence[Part], values: dict[str, Any]) -> None:
        specs = {part.name: {spec.name: spec for spec in part.specs} for part in parts}
        metadata = {part.name: dict(part.metadata or {}) for part in parts}
        flat = [(part.name, piece) for part in parts for piece in part.pieces if piece.values.size]
        # Places are counted from the end of the index, whose length depends on them.
        ends = np.cumsum([_aligned(piece.values.nbytes) for _, piece in flat], dtype=np.int64)
        starts = [0, *ends[:-1].tolist()] if flat else []
        pieces = [
            (part, piece.name, piece.start, int(piece.values.size), start)
            for (part, piece), start in zip(flat, starts, strict=True)
        ]
        self.index = pickle.dumps(Index(specs, metadata, values, pieces), pickle.HIGHEST_PROTOCOL)
        first = data_start(len(self.index))
        self.arrays = [
            (first + start, piece.values) for (_, piece), start in zip(flat, starts, strict=True)
        ]
        self.nbytes = first + (int(ends[-1]) if flat else 0)


class Store:
    """The slots of this rank's node, and those that it keeps for a rank of another one.

    ``generation``: the number of the World, of those that there have been.
    """

    def __init__(self, world: World, generation: int, redundancy: int) -> None:
        self._world, self.generation = world, generation
        self._ranks = world.node_ranks
        self.number = 0  # of the last commit that all ranks have finished
        self._own: list[list[Slot]] = [[], []]  # of all ranks of the node
        self._kept: list[Slot | None] = [None, None]
        self._to: int | None = None
        self._kept_rank: int | None = None
        if redundancy:
            self._to, self._kept_rank = _neighbours(world)

    def commit(self, parts: Sequence[Part], values: dict[str, Any]) -> None:
        """Keep this; when it returns all ranks have. Collective."""
        number = self.number + 1
        at = number % 2
        packed = Packed(parts, values)
        needed = int(self._world.allreduce(packed.nbytes, "max"))
        if not self._own[at] or len(self._own[at][0].memory) < needed:
            room = -(-needed // _ROUND_TO) * _ROUND_TO
            self._own[at] = []  # before there are others: they may be large
            shared = open_shared(self._world.node_comm, room)
            self._own[at] = [Slot(part) for part in shared.parts]
        own = self._own[at][self._world.local_rank]
        own.write(number, packed)
        if self._to is not None:
            self._exchange(own, at, needed)
        self._world.barrier()
        self.number = number

    def found(self) -> Iterator[tuple[tuple[int, int], int, Slot]]:
        """Every whole commit that this rank can read: (generation, number), whose, and where."""
        for slots in self._own:
            for rank, slot in zip(self._ranks, slots, strict=False):
                if slot.number:
                    yield (self.generation, slot.number), rank, slot
        for kept in self._kept:
            if kept is not None and self._kept_rank is not None and kept.number:
                yield (self.generation, kept.number), self._kept_rank, kept

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes of this rank's slots, and of those that it keeps for another."""
        own = sum(len(slots[0].memory) for slots in self._own if slots)
        return own, sum(len(kept.memory) for kept in self._kept if kept is not None)

    def _exchange(self, own: Slot, at: int, nbytes: int) -> None:
        """Give this rank's slot to its neighbour, and keep another's."""
        kept = self._kept[at]
        if kept is None or len(kept.memory) < nbytes:
            self._kept[at] = None
            kept = Slot(np.zeros(len(own.memory), np.uint8))
        self._kept[at] = None  # not before it is whole
        transport = MpiTransport(self._world.comm, self._world.device)
        transport.exchange(own.memory[:nbytes], self._to, kept.memory[:nbytes], self._kept_rank)
        self._kept[at] = kept


def data_start(index_bytes: int) -> int:
    """Where in a slot the tensors' bytes begin."""
    return _aligned(_HEAD_BYTES + index_bytes)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _neighbours(world: World) -> tuple[int, int] | tuple[None, None]:
    """To whom this rank gives a copy, and whose it keeps: of other nodes, if there are any."""
    nodes = world.gather_objects((world.node_index, world.rank))
    if world.node_count == 1:
        return None, None  # whoever dies, its memory is the node's
    order = [rank for _, rank in sorted(nodes)]
    step = max(sum(node == each for node, _ in nodes) for each in range(world.node_count))
    at = order.index(world.rank)
    return order[(at + step) % world.size], order[(at - step) % world.size]
