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
    """The slots of this rank's node, and those that it keeps for another node.

    ``generation``: the number of the World, of those that there have been.
    """

    def __init__(self, world: World, generation: int, redundancy: int) -> None:
        self._world, self.generation = world, generation
        self._ranks = world.node_ranks
        self.number = 0  # of the last commit that all ranks have finished
        self._own: list[list[Slot]] = [[], []]  # of all ranks of the node
        self._copies: list[dict[int, Slot]] = [{}, {}]  # by rank, of another node
        # To whom each rank gives a copy; nobody, where all memory is one node's.
        self._keeper_of = _neighbours(world) if redundancy and world.node_count > 1 else {}

    def commit(self, parts: Sequence[Part], values: dict[str, Any]) -> None:
        """Keep this; when it returns all ranks have. Collective."""
        number = self.number + 1
        at = number % 2
        packed = Packed(parts, values)
        needed = int(self._world.allreduce(packed.nbytes, "max"))
        if not self._own[at] or len(self._own[at][0].memory) < needed:
            self._make_room(at, -(-needed // _ROUND_TO) * _ROUND_TO)
        own = self._own[at][self._world.local_rank]
        own.write(number, packed)
        if self._keeper_of:
            self._exchange(own, at, needed)
        self._world.barrier()
        self.number = number

    def found(self) -> Iterator[tuple[tuple[int, int], int, Slot]]:
        """Every whole commit that this rank can read: (generation, number), whose, and where."""
        for own, copies in zip(self._own, self._copies, strict=True):
            for rank, slot in [*zip(self._ranks, own, strict=False), *copies.items()]:
                if slot.number:
                    yield (self.generation, slot.number), rank, slot

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's slots, and of those that it keeps for others."""
        own = sum(len(slots[0].memory) for slots in self._own if slots)
        kept = [rank for rank, keeper in self._keeper_of.items() if keeper == self._world.rank]
        return own + sum(len(of[rank].memory) for of in self._copies for rank in kept if of)

    def _make_room(self, at: int, nbytes: int) -> None:
        """Slots of so many bytes. The whole node's, so that all of it can read them."""
        world = self._world
        self._own[at], self._copies[at] = [], {}  # before there are others: they may be large
        self._own[at] = [Slot(part) for part in open_shared(world.node_comm, nbytes).parts]
        kept = [
            [rank for rank, keeper in self._keeper_of.items() if keeper == each]
            for each in self._ranks
        ]
        most = max(map(len, kept))
        if most:
            parts = open_shared(world.node_comm, most * nbytes).parts
            self._copies[at] = {
                rank: Slot(part[place * nbytes : (place + 1) * nbytes])
                for part, ranks in zip(parts, kept, strict=True)
                for place, rank in enumerate(ranks)
            }

    def _exchange(self, own: Slot, at: int, nbytes: int) -> None:
        """Give this rank's slot to its keeper, and keep those of others."""
        world, keeper_of = self._world, self._keeper_of
        transport = MpiTransport(world.comm, world.device)
        for shift in range(1, world.size):
            to, source = (world.rank + shift) % world.size, (world.rank - shift) % world.size
            outgoing = own.memory[:nbytes] if keeper_of[world.rank] == to else None
            copy = self._copies[at][source] if keeper_of[source] == world.rank else None
            # The head comes last, so that what is not whole does not look so.
            head = np.empty(_HEAD_BYTES, np.uint8)
            if copy is not None:
                copy.memory[:_HEAD_BYTES] = 0
                fence()
            for part, into in (
                (slice(_HEAD_BYTES, nbytes), None if copy is None else copy.memory),
                (slice(0, _HEAD_BYTES), None if copy is None else head),
            ):
                transport.exchange(
                    None if outgoing is None else outgoing[part],
                    None if outgoing is None else to,
                    None if into is None else into[part],
                    None if into is None else source,
                )
            if copy is not None:
                fence()
                copy.memory[:_HEAD_BYTES] = head


def data_start(index_bytes: int) -> int:
    """Where in a slot the tensors' bytes begin."""
    return _aligned(_HEAD_BYTES + index_bytes)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _neighbours(world: World) -> dict[int, int]:
    """For each rank one of the next node, which keeps a copy of its commits."""
    nodes, found = world.nodes, {}
    for at, ranks in enumerate(nodes):
        keepers = nodes[(at + 1) % len(nodes)]
        for place, rank in enumerate(ranks):
            found[rank] = keepers[place % len(keepers)]
    return found
