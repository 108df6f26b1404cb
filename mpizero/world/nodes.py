"""Which ranks share a node: what MPI says, or what is pretended to try out several nodes.

``MPIZERO_RANKS_PER_NODE=k`` cuts the ranks of each communicator, in their order, into nodes of k.
``MPIZERO_NODES=a,b,b,a`` names a node for each rank of the job, so that all communicators agree on
who shares one. Ranks that really are on different nodes stay so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpizero.errors import ArgumentError, MismatchError
from mpizero.world.startup import load_mpi
from mpizero.world.survival import track

if TYPE_CHECKING:
    from mpi4py import MPI

RANKS_PER_NODE, NODES = "MPIZERO_RANKS_PER_NODE", "MPIZERO_NODES"

Nodes = tuple[tuple[int, ...], ...]  # the ranks of each, ascending; nodes by their first ranks


def node_comm_of(comm: MPI.Intracomm, job_ranks: Sequence[int]) -> MPI.Intracomm:
    """A communicator of the ranks of ``comm`` on this one's node, in their order. Collective.

    ``job_ranks``: the ranks' numbers in the job. Raises, on every rank, ArgumentError for what the
    variables cannot mean, and MismatchError where they are not the same on all.
    """
    mpi = load_mpi()
    node: MPI.Intracomm = track(comm.Split_type(mpi.COMM_TYPE_SHARED, key=comm.rank))
    ours = [rank for rank, of_job in enumerate(job_ranks) if of_job != mpi.UNDEFINED]
    if len(ours) < comm.size:
        # Ranks of several jobs that have been merged (MPI_Comm_spawn, for instance): MPICH says
        # that they share a node, and refuses them memory in common.
        node = _part(node, ours[0])
    everyones: list[tuple[str, str]] = comm.allgather(_pretended(os.environ))
    if len(set(everyones)) > 1:
        raise _differ(everyones, comm.rank)
    per_node, names = everyones[0]
    if per_node and names:
        raise _wrong(NODES, names, f"unset where {RANKS_PER_NODE} is set", "Unset one of them.")
    if per_node:
        return _part(node, node.rank // _count(per_node))
    if names:
        return _part(node, _numbers(names, job_ranks)[job_ranks[comm.rank]])
    return node


def list_nodes(comm: MPI.Intracomm, node_comm: MPI.Intracomm) -> Nodes:
    """The ranks of ``comm`` by nodes, from the communicators of the nodes. Collective."""
    return _alike(comm.allgather(node_comm.bcast(comm.rank)))


def _part(node: MPI.Intracomm, color: int) -> MPI.Intracomm:
    """The ranks of a node that give this color, in its place. Collective."""
    part: MPI.Intracomm = track(node.Split(color, node.rank))
    node.Free()
    return part


def _alike(keys: Sequence[Any]) -> Nodes:
    """The ranks that have the same key, in groups; ``keys`` by rank."""
    groups: dict[Any, list[int]] = {}
    for rank, key in enumerate(keys):
        groups.setdefault(key, []).append(rank)
    return tuple(tuple(ranks) for ranks in groups.values())


def _pretended(environ: Mapping[str, str]) -> tuple[str, str]:
    return environ.get(RANKS_PER_NODE, "").strip(), environ.get(NODES, "").strip()


def _count(text: str) -> int:
    count = int(text) if text.isdecimal() else 0
    if count < 1:
        raise _wrong(RANKS_PER_NODE, text, "a number >= 1")
    return count


def _numbers(text: str, job_ranks: Sequence[int]) -> list[int]:
    """The number of the node of each rank of the job."""
    names = [name.strip() for name in text.split(",")]
    size = load_mpi().COMM_WORLD.size
    if len(names) != size or not all(names):
        raise _wrong(NODES, text, f"{size} names separated by commas, one for each rank of the job")
    if not {*job_ranks} <= {*range(size)}:
        raise _wrong(NODES, text, "unset where ranks of several jobs work together", "Unset it.")
    return [names.index(name) for name in names]


def _wrong(variable: str, given: str, allowed: str, hint: str = "") -> ArgumentError:
    return ArgumentError("init()", variable, repr(given), allowed, hint)


def _differ(everyones: Sequence[tuple[str, str]], rank: int) -> MismatchError:
    lines = []
    for ranks in _alike(everyones):
        per_node, names = everyones[ranks[0]]
        who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        lines.append(f"  {who}: {RANKS_PER_NODE}={per_node!r}, {NODES}={names!r}")
    error = MismatchError(
        "The ranks do not pretend the same nodes:\n" + "\n".join(lines) + "\nSet the variables for "
        "all ranks alike, in the launcher's command, or unset them."
    )
    error.reported_elsewhere = rank != 0
    return error
