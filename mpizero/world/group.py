"""``Group``: some ranks of the job, and where they sit. For collectives see ``mpizero.api``.

Everything that needs talking (which ranks share a node) is found out once, when the group is
made, so that reading a property on one rank only can never hang.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mpizero.errors import ArgumentError
from mpizero.world import holdings
from mpizero.world.device import Device
from mpizero.world.nodes import list_nodes, node_comm_of
from mpizero.world.startup import load_mpi, thread_level
from mpizero.world.survival import track

if TYPE_CHECKING:
    from mpi4py import MPI


class Group:
    """Ranks that work together, with their node topology and this rank's device.

    Owns duplicates of the communicator it is given, so that its messages never mix with those of
    other users of that communicator. Making one is collective over ``comm``; what these ranks have
    let go of is given back by that.
    """

    def __init__(self, comm: MPI.Intracomm, device: Device) -> None:
        self.comm = track(comm.Dup())  # blocking collectives
        self.job_ranks = self._find_job_ranks()
        holdings.settle(self.comm, self.job_ranks)  # first: MPIs run out of communicators
        # Asynchronous ones: an order of their own, agreed by all.
        self.background = track(comm.Dup())
        self.messages = track(comm.Dup())  # between two ranks, in no order
        self.device = device
        self.rank: int = comm.rank
        self.size: int = comm.size
        self.thread_level = thread_level()
        self._find_nodes()
        self._list_nodes()

    def _find_job_ranks(self) -> tuple[int, ...]:
        """The ranks' numbers among all of the job."""
        mpi = load_mpi()
        ours, all_ranks = self.comm.Get_group(), mpi.COMM_WORLD.Get_group()
        ranks = mpi.Group.Translate_ranks(ours, list(range(ours.size)), all_ranks)
        ours.Free()
        all_ranks.Free()
        return tuple(ranks)

    def _find_nodes(self) -> None:
        self.node_comm = node_comm_of(self.comm, self.job_ranks)
        self.local_rank: int = self.node_comm.rank
        self.local_size: int = self.node_comm.size
        cores = frozenset().union(*self.node_comm.allgather(frozenset(_own_cores())))
        self.cores_per_rank: float = len(cores) / self.local_size

    def _list_nodes(self) -> None:
        """All nodes of the group. Nothing is taken for granted of which ranks lie on which."""
        self.nodes = list_nodes(self.comm, self.node_comm)
        self.node_count = len(self.nodes)
        self.node_index = next(at for at, ranks in enumerate(self.nodes) if self.rank in ranks)
        self.node_ranks = self.nodes[self.node_index]
        self.node_leaders = tuple(ranks[0] for ranks in self.nodes)
        self.is_leader = self.node_ranks[0] == self.rank

    @property
    def even_nodes(self) -> bool:
        """Have all nodes the same number of ranks?"""
        return len({len(ranks) for ranks in self.nodes}) == 1

    def split_comm(self, color: int | None, key: int) -> MPI.Intracomm | None:
        """Split the ranks into one communicator per ``color`` (MPI_Comm_split), ordered by ``key``.

        None for ranks that gave no color. Collective.
        """
        if color is not None and color < 0:
            raise ArgumentError("split()", "color", str(color), "None or an integer >= 0")
        holdings.settle(self.comm, self.job_ranks)
        mpi = load_mpi()
        part: Any = self.comm.Split(mpi.UNDEFINED if color is None else color, key)
        return None if part == mpi.COMM_NULL else track(part)

    def comm_of(self, ranks: Sequence[int]) -> Any:
        """A communicator of some ranks, this one among them. Collective over those alone."""
        ours = self.comm.Get_group()
        some = ours.Incl(list(ranks))
        try:
            return track(self.comm.Create_group(some))
        finally:
            some.Free()
            ours.Free()

    def holds(self, other: Group) -> bool:
        """True if every rank of ``other`` is one of this group's."""
        mpi = load_mpi()
        ours, theirs = self.comm.Get_group(), other.comm.Get_group()
        ranks = mpi.Group.Translate_ranks(theirs, list(range(theirs.size)), ours)
        ours.Free()
        theirs.Free()
        return mpi.UNDEFINED not in ranks

    @property
    def comms(self) -> tuple[MPI.Intracomm, ...]:
        """Its communicators."""
        return self.node_comm, self.messages, self.background, self.comm

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(rank {self.rank} of {self.size}, local rank {self.local_rank} "
            f"of {self.local_size} on node {self.node_index} of {self.node_count}, "
            f"device {self.device.name})"
        )


def _own_cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
