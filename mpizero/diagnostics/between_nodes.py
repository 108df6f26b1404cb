"""Ranks of other nodes, seen with the help of a rank there: questions and answers over MPI.

By the watchdogs' threads alone, on a communicator of their own, so that it works while the ranks
are stuck elsewhere. Needs MPI_THREAD_MULTIPLE; without it each node sees itself only.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mpizero.diagnostics.node import NodeRecords
from mpizero.diagnostics.views import View
from mpizero.world.startup import load_mpi

if TYPE_CHECKING:
    from mpi4py import MPI

_QUESTION, _ANSWER = 1, 2
_PATIENCE_SECONDS, _NAP_SECONDS = 5.0, 0.02

# Of a node that does not answer so soon another rank is asked, too; in all so many.
_NEXT_TRY_SECONDS, _TRIES = 1.0, 3


class OtherNodes:
    """Asks other nodes what they see, and answers for ``node``. Collective over ``comm``."""

    def __init__(
        self, comm: MPI.Intracomm, nodes: Sequence[Sequence[int]], node: NodeRecords
    ) -> None:
        self._comm = comm.Dup()
        self._mpi = load_mpi()
        self._others = [list(ranks) for ranks in nodes if comm.rank not in ranks]
        self._node = node
        self._sent: list[tuple[MPI.Request, bytes]] = []

    def answer(self) -> None:
        """Answer the questions that have come, also those of ranks of this node."""
        self._node.answer()
        status = self._mpi.Status()
        while self._comm.iprobe(self._mpi.ANY_SOURCE, _QUESTION, status):
            number, with_stacks, ends = self._comm.recv(source=status.source, tag=_QUESTION)
            if ends:
                self._node.note_end(status.source)
            views = self._node.look(with_stacks=with_stacks, wake=ends)
            self._send((number, views), status.source, _ANSWER)
        self._sent = [(request, data) for request, data in self._sent if not request.Test()]

    def ask(self, *, with_stacks: bool, ends: bool = False) -> list[View]:
        """What the other nodes see of their ranks; of those that do not answer, nothing.

        ``ends``: they are told that this rank is about to report, and to end the job.
        """
        found: list[View] = []
        number = time.monotonic_ns()  # tells the answers from late ones to an earlier question
        unheard = {node: ranks[:_TRIES] for node, ranks in enumerate(self._others)}
        node_of = {rank: node for node, ranks in enumerate(self._others) for rank in ranks}
        begun = asked_again = time.monotonic()
        while unheard and time.monotonic() - begun < _PATIENCE_SECONDS:
            if time.monotonic() >= asked_again:
                asked_again += _NEXT_TRY_SECONDS
                for ranks in unheard.values():
                    if ranks:
                        self._send((number, with_stacks, ends), ranks.pop(0), _QUESTION)
            self.answer()  # they may be asking us
            status = self._mpi.Status()
            if not self._comm.iprobe(self._mpi.ANY_SOURCE, _ANSWER, status):
                time.sleep(_NAP_SECONDS)
                continue
            to, views = self._comm.recv(source=status.source, tag=_ANSWER)
            if to == number and unheard.pop(node_of[status.source], None) is not None:
                found += views
        silent = [rank for node in unheard for rank in self._others[node]]
        return found + [View(rank) for rank in silent]

    def _send(self, value: object, to: int, tag: int) -> None:
        data = pickle.dumps(value)
        self._sent.append((self._comm.Isend([data, self._mpi.BYTE], to, tag), data))
