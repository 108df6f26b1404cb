"""How far the clocks of other nodes are from rank 0's."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpizero.world import Group

_ROUNDS, _TAG = 20, 11


def offset_to_root(group: Group) -> int:
    """What to add to this rank's ``time.monotonic_ns`` to get rank 0's. Collective.

    Each node's first rank asks rank 0 for the time, and takes the round that took least: the answer
    is at most half of that round off (Cristian 1989). Ranks of a node have one clock.
    """
    offset = 0
    for leader in group.node_leaders:
        if leader == 0:
            continue
        if group.rank == 0:
            _tell(group.comm, leader)
        elif group.rank == leader:
            offset = _ask(group.comm)
    return int(group.node_comm.bcast(offset))


def _tell(comm: MPI.Intracomm, leader: int) -> None:
    for _ in range(_ROUNDS):
        comm.recv(source=leader, tag=_TAG)
        comm.send(time.monotonic_ns(), leader, _TAG)


def _ask(comm: MPI.Intracomm) -> int:
    best: tuple[int, int] | None = None
    for _ in range(_ROUNDS):
        asked = time.monotonic_ns()
        comm.send(None, 0, _TAG)
        told = comm.recv(source=0, tag=_TAG)
        answered = time.monotonic_ns()
        took, offset = answered - asked, told - (asked + answered) // 2
        if best is None or took < best[0]:
            best = took, offset
    return best[1] if best is not None else 0
