"""Collectives whose parts go from rank to rank as they are: with a root, or of uneven parts.

No tree and no pipeline: each byte crosses the network once, straight to where it belongs, which is
all that can be had where the root's link is what limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpizero.collectives.transport import Transport


class Direct:
    """Messages of blocks over ``transport``."""

    name = "direct"

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def gather(self, block: Any, out: Any, blocks: Sequence[slice], root: int) -> None:
        """Put every rank's ``block`` into ``out[blocks[r]]`` of the root."""
        own = self._transport.rank
        if own != root:
            self._transport.exchange(block, root, None, None)
            return
        out[blocks[own]] = block
        for rank in self._others():
            self._transport.exchange(None, None, out[blocks[rank]], rank)

    def scatter(self, array: Any, out: Any, blocks: Sequence[slice], root: int) -> None:
        """Give rank r ``array[blocks[r]]`` of the root in ``out``."""
        own = self._transport.rank
        if own != root:
            self._transport.exchange(None, None, out, root)
            return
        out[...] = array[blocks[own]]
        for rank in self._others():
            self._transport.exchange(array[blocks[rank]], rank, None, None)

    def exchange_all(
        self, array: Any, blocks: Sequence[slice], out: Any, places: Sequence[slice]
    ) -> None:
        """Send ``array[blocks[r]]`` to rank r; ``out[places[s]]`` comes from rank s.

        With the partner at distance 1, then 2, ...: every block moves once.
        """
        own, size = self._transport.rank, self._transport.size
        out[places[own]] = array[blocks[own]]
        for step in range(1, size):
            to, source = (own + step) % size, (own - step) % size
            self._transport.exchange(array[blocks[to]], to, out[places[source]], source)

    def _others(self) -> list[int]:
        return [rank for rank in range(self._transport.size) if rank != self._transport.rank]
