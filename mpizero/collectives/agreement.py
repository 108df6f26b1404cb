"""Do all ranks mean the same? Asked before MPI sees the data, because afterwards it is too late.

MPI does not notice when ranks call different collectives, or the same with other shapes, dtypes
or operations: it hangs, or mixes the data up. So every collective on users' arrays begins with an
exchange of fingerprints of the call: over the node's board, where it costs no more than the barrier
that shared memory needs anyway, else as one 16-byte all-reduce. Checking only first uses would
leave a hole: a call that is new on one rank and known on another would have only one of them
checking.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from mpizero.errors import MismatchError, settle
from mpizero.memory.board import Board
from mpizero.memory.node_shared import NOWHERE
from mpizero.world.startup import load_mpi

if TYPE_CHECKING:
    from mpi4py import MPI


class Agreement:
    """What the ranks of ``comm`` tell each other; ``board``: theirs, if they are one node."""

    def __init__(self, comm: MPI.Intracomm, board: Board | None) -> None:
        self._comm = comm
        self._board = board
        self._mpi = load_mpi()

    def reach(self, call: str, spot: int = NOWHERE, items: Sequence[str] = ()) -> int | None:
        """Compare ``call``, a description of what this rank is about to do, over the ranks.

        Returns the ``spot`` of node-shared memory that all ranks named; None if they named several.
        ``items`` are the parts of a long description, of which the first that differs is named.
        Collective. Raises MismatchError, on every rank, naming the ranks and what each passed.
        """
        mine = fingerprint(f"{call}: {'; '.join(items)}" if items else call)
        if self._board is not None:
            return self.compare(mine, spot, call, items)
        # The maximum of f and of -f: equal up to sign exactly if all ranks have the same f.
        extremes = np.array((mine, -mine), np.int64)
        self._comm.Allreduce(self._mpi.IN_PLACE, extremes, self._mpi.MAX)
        if extremes[0] != -extremes[1]:
            self.explain(call, items)
        return NOWHERE

    def compare(self, mine: int, spot: int, call: str, items: Sequence[str] = ()) -> int | None:
        """``reach`` over the board, for a call whose fingerprint is known."""
        assert self._board is not None
        common: int | None = spot
        for note in self._board.exchange(mine, spot).notes:
            if note[1] != mine:
                self.explain(call, items)
            if note[2] != spot:
                common = None
        return common

    def explain(self, call: str, items: Sequence[str] = ()) -> NoReturn:
        """Raise the MismatchError that every rank raises when the fingerprints differ."""
        calls, lists = zip(*self._comm.allgather((call, list(items))), strict=True)
        if len(set(calls)) == 1:
            _explain_items(self._comm, call, lists)
        _raise_mismatch(self._comm, list(calls))


@lru_cache(maxsize=4096)
def fingerprint(call: str) -> int:
    """62 bits that tell one call from another."""
    data = call.encode(errors="backslashreplace")  # names of files may be no proper text
    return zlib.crc32(data) << 30 | (zlib.adler32(data) & 0x3FFFFFFF)


def _explain_items(comm: MPI.Intracomm, what: str, lists: Sequence[list[str]]) -> NoReturn:
    for position, theirs in enumerate(zip_longest(*lists, fillvalue="(nothing more)")):
        if len(set(theirs)) > 1:
            what = f"{what} differ between the ranks, first at item {position}"
            _raise_mismatch(comm, list(theirs), what)
    _raise_mismatch(comm, [f"{len(items)} {what}" for items in lists])


def _raise_mismatch(
    comm: MPI.Intracomm, calls: list[str], what: str = "The ranks do not do the same"
) -> NoReturn:
    """Raise a MismatchError that groups the ranks by what each of them passed."""
    ranks_by_call: dict[str, list[int]] = {}
    for rank, call in enumerate(calls):
        ranks_by_call.setdefault(call, []).append(rank)
    lines = [f"  {_name(ranks)}: {call}" for call, ranks in ranks_by_call.items()]
    error = MismatchError(f"{what}:\n" + "\n".join(lines)).told_by(comm.rank == 0)
    try:
        settle(error, comm.py2f())
        raise error
    finally:
        del error  # it refers to this frame: all that is in it would stay until cycles are sought


def _name(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(str(rank) for rank in ranks[:8])
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"ranks {shown}{more}"
