"""The records of all ranks of this node, and who may speak for it."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from mpizero.diagnostics import stacks
from mpizero.diagnostics.record import AT_ENDED_BY, Record
from mpizero.diagnostics.views import View, look_at

if TYPE_CHECKING:
    from mpi4py import MPI


class NodeRecords:
    """``records[i]``: of the node's local rank i; None if the system does not let us see it.

    ``ranks[i]``: its rank in the job. ``claim_fd``: a file that all have open, whose lock says who
    reports; the kernel takes the lock back from who dies.
    """

    def __init__(
        self, ranks: Sequence[int], records: Sequence[Record | None], claim_fd: int
    ) -> None:
        self.ranks, self.records = list(ranks), list(records)
        self._claim_fd = claim_fd
        self.host = socket.gethostname()

    @classmethod
    def gather(cls, node: MPI.Intracomm, rank: int, own: Record, fd: int) -> NodeRecords:
        """Open every rank's record. Collective over the node."""
        known = node.allgather((rank, own.pid, fd))
        records = [
            own if pid == own.pid else Record.of_process(pid, of_it) for _, pid, of_it in known
        ]
        _, pid, first = known[0]
        try:
            claim = os.open(f"/proc/{pid}/fd/{first}", os.O_RDWR)
        except OSError:
            claim = fd  # every rank speaks for itself
        node.Barrier()  # all have opened what they need: from here on ranks may die
        return cls([rank for rank, _, _ in known], records, claim)

    def look(self, *, with_stacks: bool = False, wake: bool = False) -> list[View]:
        """All ranks of the node. ``wake``: see ``stacks.collect``."""
        views = [
            View(rank, self.host) if record is None else look_at(record, self.host)
            for rank, record in zip(self.ranks, self.records, strict=True)
        ]
        if not with_stacks:  # asked for last: a signal may make a rank move
            return views
        found = stacks.collect(self.records, wake=wake)
        return [replace(view, stack=stack) for view, stack in zip(views, found, strict=True)]

    def answer(self) -> None:
        """If somebody wants this rank's stacks, show them."""
        for record in self.records:
            if record is not None and record.pid == os.getpid():
                stacks.answer(record)

    @property
    def was_asked(self) -> bool:
        """Has somebody asked a rank for its stacks, by a signal from outside?"""
        return any(record is not None and record.has_new_stacks for record in self.records)

    def note_end(self, rank: int) -> None:
        """A rank of another node is about to report, and to end the job."""
        for record in self.records:
            if record is not None and not 0 < record.header[AT_ENDED_BY] <= rank:
                record.header[AT_ENDED_BY] = rank + 1

    @contextmanager
    def speak(self) -> Iterator[bool]:
        """Be the one of the node who reports; False if another is."""
        try:
            fcntl.flock(self._claim_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(self._claim_fd, fcntl.LOCK_UN)
