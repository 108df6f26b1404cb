"""The lanes of a World: one for each order in which its ranks make calls together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpizero.diagnostics.current import recorder
from mpizero.diagnostics.recorder import Lane
from mpizero.diagnostics.views import (
    ASYNCHRONOUS,
    BLOCKING,
    IN_ORDER,
    IN_ORDER_BLOCKING,
    WAITING,
    as_ranges,
)

if TYPE_CHECKING:
    from mpizero.world import Group


@dataclass(frozen=True)
class Lanes:
    """``waiting`` is no call: this rank's program waits for an asynchronous one.

    ``memory``: of the ranks of this node, who allocate memory together. ``start``: from which
    number on calls are counted, on all ranks: those of a World that was before had smaller ones.
    """

    blocking: Lane
    asynchronous: Lane
    waiting: Lane
    memory: Lane
    start: int
    job_ranks: tuple[int, ...]

    @classmethod
    def of(cls, group: Group, in_order: bool = False) -> Lanes:
        """Those of a group, which are nobody else's. Collective."""
        name = as_ranges(group.job_ranks)
        kinds = (IN_ORDER_BLOCKING, IN_ORDER) if in_order else (BLOCKING, ASYNCHRONOUS)
        blocking, asynchronous, waiting = (
            recorder().lane(name, kind) for kind in (*kinds, WAITING)
        )
        memory = blocking
        if group.node_count > 1:
            node_ranks = as_ranges(group.job_ranks[rank] for rank in group.node_ranks)
            memory = recorder().lane(node_ranks, BLOCKING)
        four = blocking, asynchronous, waiting, memory
        start = max(group.comm.allgather(max(lane.sequence for lane in four)))
        for lane in four:
            lane.sequence = start
        return cls(*four, start, group.job_ranks)

    def between(self, source: int, to: int) -> Lane:
        """A new one for the messages that one rank of the group sends to another.

        The two count them alike, whichever other worlds they have messages in.
        """
        both = as_ranges(self.job_ranks[rank] for rank in (source, to))
        lane = recorder().lane(both, f"messages {source} to {to} of {self.blocking.name}")
        lane.sequence = self.start
        return lane

    def give_back(self, between: Iterable[Lane]) -> None:
        """They are in use no more, nor are those ``between`` two ranks."""
        every = {id(lane): lane for lane in (*self._four, *between)}.values()
        last = max(lane.sequence for lane in every)
        for lane in every:
            lane.give_back(last)

    @property
    def _four(self) -> tuple[Lane, ...]:
        return self.blocking, self.asynchronous, self.waiting, self.memory

    @staticmethod
    def forming(group: Group, ranks: Iterable[int]) -> Lane:
        """The one for ranks of the group that are about to form one of their own."""
        return recorder().forming(as_ranges(group.job_ranks[rank] for rank in ranks), BLOCKING)
