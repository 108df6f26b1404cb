"""Do all ranks mean the same? Asked before MPI sees the data, because afterwards it is too late.

MPI does not notice when ranks call different collectives, or the same with other shapes, dtypes
or operations: it hangs, or mixes the data up. So every collective on users' arrays begins with
one 24-byte all-reduce of a fingerprint of the call. Checking only first uses would leave a hole:
a call that is new on one rank and known on another would have only one of them checking.
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from mpizero.errors import MismatchError
from mpizero.world.startup import load_mpi

if TYPE_CHECKING:
    from mpi4py import MPI


def agree(comm: MPI.Intracomm, call: str, vote: bool = False) -> bool:
    """Compare ``call`` (a description of what this rank is about to do) over the ranks.

    Returns whether all ranks voted yes. Collective. Raises MismatchError, on every rank, naming the
    ranks and what each passed.
    """
    mpi = load_mpi()
    fingerprint = _fingerprint(call)
    # The maximum of f and of -f: equal up to sign exactly if all ranks have the same f.
    extremes = np.array((fingerprint, -fingerprint, -vote), np.int64)
    comm.Allreduce(mpi.IN_PLACE, extremes, mpi.MAX)
    most, negated_least, negated_votes = extremes.tolist()
    if most != -negated_least:
        raise_mismatch(comm, comm.allgather(call))
    return bool(negated_votes)


def raise_mismatch(
    comm: MPI.Intracomm, calls: list[str], what: str = "The ranks do not do the same"
) -> None:
    """Raise a MismatchError that groups the ranks by what each of them passed."""
    ranks_by_call: dict[str, list[int]] = {}
    for rank, call in enumerate(calls):
        ranks_by_call.setdefault(call, []).append(rank)
    lines = [f"  {_name(ranks)}: {call}" for call, ranks in ranks_by_call.items()]
    error = MismatchError(f"{what}:\n" + "\n".join(lines))
    error.reported_elsewhere = comm.rank != 0
    raise error


def _name(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(str(rank) for rank in ranks[:8])
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"ranks {shown}{more}"


@lru_cache(maxsize=4096)
def _fingerprint(call: str) -> int:
    data = call.encode()
    return zlib.crc32(data) << 30 | (zlib.adler32(data) & 0x3FFFFFFF)


def agree_on_items(comm: MPI.Intracomm, items: list[str], what: str) -> None:
    """Compare lists of descriptions and name the first that differs.

    For long descriptions such as a model's parameters: only a fingerprint travels unless the
    ranks disagree. Collective; raises MismatchError on every rank.
    """
    try:
        agree(comm, f"{what}: " + "; ".join(items))
    except MismatchError:
        everyone = comm.allgather(items)
    else:
        return
    for position in range(max(len(theirs) for theirs in everyone)):
        calls = [
            theirs[position] if position < len(theirs) else "(nothing more)" for theirs in everyone
        ]
        if len(set(calls)) > 1:
            raise_mismatch(
                comm, calls, f"{what} differ between the ranks, first at item {position}"
            )
    raise_mismatch(comm, [f"{len(theirs)} {what}" for theirs in everyone])
