"""Process sets: which ranks take part in an operation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mpizero import ArgumentError, LaunchError, World
from mpizero_torch.horovod.negotiation import Negotiation
from mpizero_torch.runtime import init


class ProcessSet:
    """Some of the ranks: a list of their numbers, or an mpi4py communicator of theirs.

    It can be used once ``hvd.init(process_sets=[...])`` or ``hvd.add_process_set`` has registered
    it, on all ranks in the same order.
    """

    process_set_id: int | None = None

    def __init__(self, ranks_or_comm: Any) -> None:
        self.ranks: list[int] | None = None
        self.mpi_comm: Any = None
        if isinstance(ranks_or_comm, Iterable) and not hasattr(ranks_or_comm, "Get_rank"):
            self.ranks = sorted({int(rank) for rank in ranks_or_comm})
        else:
            self.mpi_comm = ranks_or_comm
        self._world: World | None = None
        self._negotiation: Negotiation | None = None

    def included(self) -> bool:
        """Is this rank one of the set?"""
        self._require_registered()
        return self._world is not None

    def size(self) -> int:
        """How many ranks the set has."""
        self._require_registered()
        return len(self.ranks or ())

    def rank(self) -> int:
        """This rank's number in the set. ArgumentError where it is none of it."""
        return self.world.rank

    @property
    def world(self) -> World:
        """The set's ranks, for the operations among them. ArgumentError on other ranks."""
        self._require_registered()
        if self._world is None:
            raise ArgumentError(
                "hvd", "process_set", f"{self}, of which this rank is none",
                "a set with this rank: call it under `if process_set.included():`",
            )  # fmt: skip
        return self._world

    @property
    def negotiation(self) -> Negotiation:
        """What this rank has submitted among the set's ranks."""
        world = self.world
        if self._negotiation is None:
            self._negotiation = Negotiation(world)
        return self._negotiation

    def local(self, rank: int, function: str) -> int:
        """The number in the set of the rank that all ranks know by ``rank``."""
        ranks = self.ranks or []
        if rank not in ranks:
            raise ArgumentError(function, "root_rank", str(rank), f"one of {ranks}")
        return ranks.index(rank)

    def __str__(self) -> str:
        return (
            f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks}, "
            f"mpi_comm={self.mpi_comm})"
        )

    __repr__ = __str__

    def _require_registered(self) -> None:
        if self.process_set_id is None:
            raise LaunchError(
                "Call hvd.init() first."
                if self is global_process_set
                else f"{self} is not registered: give it to hvd.init(process_sets=[...]) or to "
                "hvd.add_process_set()."
            )

    def _bind(self, number: int, ranks: Sequence[int], world: World | None) -> None:
        self.process_set_id, self.ranks, self._world = number, list(ranks), world
        self._negotiation = None

    def _unbind(self) -> None:
        self.process_set_id = self._world = self._negotiation = None


global_process_set = ProcessSet([])
_registered: dict[int, ProcessSet] = {}


def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Register a process set, or one of these ranks, and return it.

    Collective over all ranks, which call it with the same sets in the same order. (A set made of a
    communicator may be another one on each rank.) Raises ArgumentError for ranks that there are
    not, and for a set that is registered already.
    """
    function = "hvd.add_process_set()"
    world = global_process_set.world
    new = process_set if isinstance(process_set, ProcessSet) else ProcessSet(process_set)
    if new.process_set_id is not None:
        raise ArgumentError(function, "process_set", f"{new}, registered already", "a new one")
    number = 1 + max(_registered)
    for known, each in _registered.items():
        # (Of all ranks there may be another: operations of two threads can be kept apart by sets.)
        if known and new.ranks is not None and each.ranks == new.ranks:
            raise ArgumentError(
                function, "process_set", f"ranks {new.ranks}, of which set {known} is already",
                "other ranks, or the ProcessSet that there is",
            )  # fmt: skip
    if new.mpi_comm is not None:
        part = init(new.mpi_comm)
        of_job = {each: rank for rank, each in enumerate(world.job_ranks)}
        new._bind(number, [of_job[each] for each in part.job_ranks], part)
    else:
        ranks = new.ranks or []
        with world.telling():
            if not ranks or ranks[0] < 0 or ranks[-1] >= world.size:
                raise ArgumentError(
                    function, "process_set", str(ranks), f"ranks from 0 to {world.size - 1}"
                )
        new._bind(number, ranks, world.split(0 if world.rank in ranks else None))
    _registered[number] = new
    return new


def remove_process_set(process_set: ProcessSet) -> bool:
    """Deregister a process set; False for the global one and for one that is not registered.

    Collective over all ranks. What is under way in it must have been waited for.
    """
    number = process_set.process_set_id
    if number is None or process_set is global_process_set:
        return False
    del _registered[number]
    if process_set._world is not None and process_set.mpi_comm is None:
        process_set._world.close()
    process_set._unbind()
    return True


def process_set_included(process_set_id: int = 0) -> bool:
    """Is this rank one of the set with this number?"""
    return _registered[process_set_id].included()


def get_process_set_ids_and_ranks() -> dict[int, list[int]]:
    """The ranks of each registered set, by its number."""
    return {number: list(each.ranks or []) for number, each in _registered.items()}


def begin(world: World) -> None:
    """All ranks are those of ``world``; there is no other set yet."""
    end()
    global_process_set._bind(0, range(world.size), world)
    _registered[0] = global_process_set


def end() -> None:
    """There are no sets any more."""
    for each in _registered.values():
        each._unbind()
    _registered.clear()
    global_process_set.ranks = None
