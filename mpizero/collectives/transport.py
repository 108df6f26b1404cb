"""How blocks travel between ranks: the small interface that algorithms are written against."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

from mpizero.memory.dtypes import as_bytes
from mpizero.world.device import Device
from mpizero.world.startup import load_mpi
from mpizero.world.survival import lifeline, wait_each

if TYPE_CHECKING:
    from mpi4py import MPI

# Below the 2^31 - 1 elements that an MPI-3 count can say (Open MPI 5 offers no larger ones).
MAX_MESSAGE_BYTES = 1 << 30

_TAG = 7


class Transport(Protocol):
    """Point-to-point messages among ``size`` ranks, in order between any two of them."""

    rank: int
    size: int

    def exchange(self, outgoing: Any, to: int | None, incoming: Any, source: int | None) -> None:
        """Send ``outgoing`` to rank ``to`` while receiving ``incoming`` from rank ``source``.

        Both are contiguous 1-D arrays and must not overlap; the partner knows the length. A side
        whose rank is None, or whose array is empty, does not take place.
        """
        ...


class MpiTransport:
    """Messages of bytes over an MPI communicator, cut where a count would overflow."""

    def __init__(self, comm: MPI.Intracomm, device: Device) -> None:
        self._comm = comm
        self._device = device
        self._mpi = load_mpi()
        self.rank = comm.rank
        self.size = comm.size

    def exchange(self, outgoing: Any, to: int | None, incoming: Any, source: int | None) -> None:
        self._device.settle(outgoing, incoming)
        requests = []
        if source is not None:
            requests += [self._comm.Irecv(piece, source, _TAG) for piece in self._cut(incoming)]
        if to is not None:
            requests += [self._comm.Isend(piece, to, _TAG) for piece in self._cut(outgoing)]
        if lifeline() is None:
            self._mpi.Request.Waitall(requests)
        else:
            wait_each(requests)

    def _cut(self, block: Any) -> Iterator[list[Any]]:
        octets = as_bytes(block)
        for start in range(0, octets.size, MAX_MESSAGE_BYTES):
            yield [octets[start : start + MAX_MESSAGE_BYTES], self._mpi.BYTE]


def cut_evenly(count: int, parts: int) -> list[slice]:
    """``count`` elements as ``parts`` consecutive slices whose lengths differ by one at most."""
    short, longer = divmod(count, parts)
    bounds = [part * short + min(part, longer) for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]
