"""``Keeper``: what has been committed, over all the Worlds that the job has had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpizero.api import World
from mpizero.checkpoint import Part
from mpizero.elastic.snapshot import Needed, Snapshot
from mpizero.elastic.store import Index, Slot, Store
from mpizero.errors import ArgumentError

Id = tuple[int, int]  # of a commit: the World's generation, and the number in it


class Keeper:
    """Keeps commits for the case that ranks die; see ``Store``. ``redundancy``: 0 or 1 copies.

    Every rank's commit lies in memory of its node, twice (the last and the one before), where it is
    there as long as any rank of the node is. With ``redundancy=1`` the next node has a copy too.
    """

    def __init__(self, redundancy: int = 0) -> None:
        if redundancy not in (0, 1):
            raise ArgumentError("ElasticState()", "redundancy", repr(redundancy), "0 or 1")
        self._redundancy = redundancy
        self._stores: list[Store] = []
        self.lost = False  # has there been a commit that is nowhere whole any more?

    def begin(self, world: World, needed: Needed) -> Snapshot | None:
        """The newest commit that is whole, for the ranks of ``world``; then commits are theirs.

        Tensors that are not ``needed`` any more may have been lost, the same on all ranks. None if
        there is none: nothing has been committed, or (``lost``) too much has died.
        Collective. What is older is kept until the first commit on ``world``.
        """
        found = self._newest(world, needed)
        # Of all survivors the same: those who have missed a World have died in it.
        generation = 1 + max((each.generation for each in self._stores), default=0)
        generation = max(world.gather_objects(generation))
        self._stores.append(Store(world, generation, self._redundancy))
        return found

    def commit(self, parts: Sequence[Part], values: dict[str, Any]) -> None:
        """Keep what this rank has of the state; when it returns all ranks have. Collective."""
        self._stores[-1].commit(parts, values)
        del self._stores[:-1]

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's commits, and of those that it keeps for ranks elsewhere."""
        return sum(each.nbytes for each in self._stores)

    def _newest(self, world: World, needed: Needed) -> Snapshot | None:
        readable: dict[Id, dict[int, Slot]] = {}
        for store in self._stores:
            for commit, rank, slot in store.found():
                readable.setdefault(commit, {})[rank] = slot
        everyones = world.gather_objects({each: set(of) for each, of in readable.items()})
        self.lost = False
        for commit in sorted({each for found in everyones for each in found}, reverse=True):
            # For each old rank the first of those who can read its memory.
            senders: dict[int, int] = {}
            for reader, found in enumerate(everyones):
                for rank in found.get(commit, ()):
                    senders.setdefault(rank, reader)
            own = readable.get(commit, {})
            told: list[dict[int, Index]] = world.gather_objects(
                {rank: own[rank].index() for rank, by in senders.items() if by == world.rank}
            )
            indices = {rank: index for each in told for rank, index in each.items()}
            snapshot = Snapshot(indices, own, senders)
            if snapshot.is_whole(needed):
                return snapshot
            self.lost = True
        return None
