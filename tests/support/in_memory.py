"""Many ranks as threads of one process, with queues for a network: for the algorithms' logic."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

_PATIENCE_SECONDS = 20.0


class Network:
    """Queues between all pairs of ranks, and what has gone through them.

    With ``rendezvous``, a rank that has sent goes on only when its message has been received, as
    MPI may have it for messages of any size: then ranks that all send first wait for ever.
    """

    def __init__(self, size: int, rendezvous: bool = False) -> None:
        self.size = size
        self.rendezvous = rendezvous
        self.bytes_sent = [0] * size
        self.messages_sent = [0] * size
        self._queues: dict[tuple[int, int], queue.SimpleQueue[Any]] = {
            (a, b): queue.SimpleQueue() for a in range(size) for b in range(size)
        }

    def put(self, source: int, to: int, block: Any) -> threading.Event:
        """Send a copy of ``block``; the event says that it has been received."""
        self.bytes_sent[source] += block.nbytes
        self.messages_sent[source] += 1
        received = threading.Event()
        self._queues[source, to].put((block.copy(), received))
        return received

    def get(self, source: int, to: int) -> Any:
        block, received = self._queues[source, to].get(timeout=_PATIENCE_SECONDS)
        received.set()
        return block


class InMemoryTransport:
    """One rank's end of the network (see ``mpizero.collectives.transport.Transport``)."""

    def __init__(self, network: Network, rank: int) -> None:
        self._network, self.rank, self.size = network, rank, network.size

    def exchange(self, outgoing: Any, to: int | None, incoming: Any, source: int | None) -> None:
        sides = [side for side, rank in ((outgoing, to), (incoming, source)) if rank is not None]
        if any(side.ndim != 1 or not side.flags.c_contiguous for side in sides):
            raise ValueError("blocks must be contiguous and 1-D")
        if len(sides) == 2 and np.shares_memory(*sides):
            raise ValueError("outgoing and incoming overlap")
        received = None
        if to is not None and outgoing.size:
            received = self._network.put(self.rank, to, outgoing)
        if source is not None and incoming.size:
            arrived = self._network.get(source, self.rank)
            if arrived.shape != incoming.shape or arrived.dtype != incoming.dtype:
                raise ValueError(f"expected {incoming.shape}, {arrived.shape} came")
            incoming[...] = arrived
        if received and self._network.rendezvous and not received.wait(_PATIENCE_SECONDS):
            raise queue.Empty


def run_ranks(
    size: int, program: Callable[[InMemoryTransport], Any], rendezvous: bool = False
) -> tuple[list[Any], Network]:
    """Run ``program`` on every rank; its results in rank order, and the network it used.

    A rank's exception is raised here; ranks that wait for ever raise queue.Empty.
    """
    network = Network(size, rendezvous)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def rank_main(rank: int) -> None:
        try:
            results[rank] = program(InMemoryTransport(network, rank))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in sorted(errors, key=lambda e: isinstance(e, queue.Empty)):
        raise error  # the cause before those who waited for it
    return results, network
