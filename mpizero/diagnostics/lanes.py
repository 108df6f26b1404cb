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

    ``memory``: of the ranks of this node, who allocate memory together.
    """

    blocking: Lane
    asynchronous: Lane
    waiting: Lane
    memory: Lane

    @classmethod
    def of(cls, group: Group, in_order: bool = False) -> Lanes:
        """New ones for a group. The same on all of its ranks."""
        name = as_ranges(group.job_ranks)
        kinds = (IN_ORDER_BLOCKING, IN_ORDER) if in_order else (BLOCKING, ASYNCHRONOUS)
        blocking, asynchronous, waiting = (
            recorder().lane(name, kind) for kind in (*kinds, WAITING)
        )
        memory = blocking
        if group.node_count > 1:
            node_ranks = as_ranges(group.job_ranks[rank] for rank in group.node_ranks)
            memory = recorder().lane(node_ranks, BLOCKING)
        return cls(blocking, asynchronous, waiting, memory)

    def between(self, group: Group, source: int, to: int) -> Lane:
        """A new one for the messages that one rank of the group sends to another.

        The two count them alike, whichever other worlds they have messages in.
        """
        both = as_ranges(group.job_ranks[rank] for rank in (source, to))
        kind = f"messages {source} to {to} of {self.blocking.name}"
        return recorder().lane(both, kind)

    @staticmethod
    def forming(group: Group, ranks: Iterable[int]) -> Lane:
        """A new one for some ranks of the group that are about to form one of their own."""
        return recorder().lane(as_ranges(group.job_ranks[rank] for rank in ranks), BLOCKING)
