"""Messages between two ranks: sent and received in any order, many at a time.

They are not collectives and have no order that all ranks share: so none of them waits in the
progress thread, where it would hold up what is behind it. Each is a non-blocking MPI request from
the start, and a handle that tests it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from mpizero.collectives import transport
from mpizero.diagnostics import Lane, Lanes, recorded
from mpizero.errors import ArgumentError, MismatchError
from mpizero.memory.arrays import OpenArray
from mpizero.memory.dtypes import as_bytes
from mpizero.world import Group, in_flight
from mpizero.world.startup import load_mpi

if TYPE_CHECKING:
    from mpi4py import MPI

# After so many looks give the core away between two of them, and in the end take short naps.
_EAGER_LOOKS, _YIELDING_LOOKS, _NAP_SECONDS = 2_000, 20_000, 50e-6


class Message:
    """One message under way. ``wait`` and ``done`` as of a Handle; a received one tells from whom.

    The array must not be changed before a sent message, nor used before a received one is done.
    """

    def __init__(
        self, what: str, request: MPI.Request, array: OpenArray, memory: Any, received: bool
    ) -> None:
        self.what = what
        self._request = request
        self._array, self._memory, self._received = array, memory, received
        self._status = load_mpi().Status()
        self._lane: Lane | None = None
        self._sequence = 0
        self._waiting: Lane | None = None
        self._source: int | None = None
        self._error: BaseException | None = None
        self._finished = False
        self._lock = threading.Lock()  # MPI allows one thread to ask for a request at a time
        in_flight.under_way.add(self)

    def record_in(self, lane: Lane | None, waiting: Lane) -> None:
        """Write the message down where those of the same two ranks and direction are counted."""
        self._lane, self._waiting = lane, waiting
        if lane is not None:
            at = lane.begin(self.what, self._array.flat.nbytes, lane.recorder.here())
            lane.end(at)
            self._sequence = lane.sequence

    def done(self) -> bool:
        """True once the message has been sent or received (or has failed: ``wait`` tells)."""
        if not self._finished and self._lock.acquire(blocking=False):
            try:
                if not self._finished:
                    self._look()
            finally:
                self._lock.release()
        return self._finished

    def wait(self) -> int | None:
        """Wait for it; return the rank that sent it, None for one of this rank's own.

        Raises MismatchError for a received one of another size than the array.
        """
        if not self.done():
            self._wait()
        if self._error is not None:
            raise self._error
        return self._source

    def _wait(self) -> None:
        looks = 0
        while looks < _EAGER_LOOKS and not self.done():  # most have come by then
            looks += 1
        if self._finished:
            return
        if self._lane is None:
            assert self._waiting is not None
            with recorded(self._waiting, f"waiting for {self.what}"):
                self._look_patiently()
            return
        at = self._lane.again(self._sequence, self.what, self._lane.recorder.here())
        try:
            self._look_patiently()
        finally:
            self._lane.end(at)

    def _look_patiently(self) -> None:
        looks = 0
        while not self.done():
            looks += 1
            if looks > _YIELDING_LOOKS:
                time.sleep(_NAP_SECONDS)
            else:
                os.sched_yield()

    def _look(self) -> None:
        """Ask MPI; finish what there is to finish."""
        mpi = load_mpi()
        try:
            if not self._request.Test(self._status):
                return
            if self._received:
                self._take()
        except mpi.Exception as error:
            self._error = error
            if error.Get_error_class() == mpi.ERR_TRUNCATE:
                self._error = self._mismatch("more than")
        except Exception as error:
            self._error = error
        self._finished = True
        in_flight.under_way.discard(self)
        self._memory = None

    def _take(self) -> None:
        self._source = int(self._status.Get_source())
        expected, came = self._array.flat.nbytes, self._status.Get_elements(load_mpi().BYTE)
        if came not in (expected, load_mpi().UNDEFINED):
            raise self._mismatch(f"{came} of")
        if not isinstance(self._array.flat, np.ndarray) and isinstance(self._memory, np.ndarray):
            self._array.flat.set(self._memory)
        self._array.commit()

    def _mismatch(self, came: str) -> MismatchError:
        return MismatchError(
            f"{self.what}: the message from rank {self._status.Get_source()} has {came} the "
            f"{self._array.flat.nbytes} bytes that x holds. Sender and receiver must pass arrays "
            "of one size."
        )


class Messages:
    """The messages of a group, on a communicator of their own. Collective to make and to close."""

    def __init__(self, group: Group, cuda_aware: bool, lanes: Lanes) -> None:
        self._group, self._cuda_aware, self._lanes = group, cuda_aware, lanes
        self._comm = group.messages
        self._mpi = load_mpi()
        self.largest_tag = int(self._mpi.COMM_WORLD.Get_attr(self._mpi.TAG_UB))
        self._pairs: dict[tuple[int, int], Lane] = {}

    def check_tag(self, function: str, tag: int | None) -> None:
        """Raise ArgumentError for what is no tag of this MPI's."""
        if tag is not None and not 0 <= tag <= self.largest_tag:
            raise ArgumentError(function, "tag", str(tag), f"0 to {self.largest_tag}")

    def send(self, array: OpenArray, to: int, tag: int, what: str) -> Message:
        """Start to send the array."""
        memory = self._settled(array)
        request = self._start(self._comm.Isend, memory, to, tag)
        return self._started(what, request, array, memory, (self._group.rank, to))

    def receive(self, array: OpenArray, source: int | None, tag: int | None, what: str) -> Message:
        """Start to receive into the array, from ``source`` (None: from any rank)."""
        memory = array.flat
        if not isinstance(memory, np.ndarray) and not self._cuda_aware:
            memory = np.empty(array.flat.shape, array.dtype)
        any_source, any_tag = self._mpi.ANY_SOURCE, self._mpi.ANY_TAG
        request = self._start(
            self._comm.Irecv,
            memory,
            any_source if source is None else source,
            any_tag if tag is None else tag,
        )
        pair = None if source is None else (source, self._group.rank)
        return self._started(what, request, array, memory, pair, received=True)

    def _started(
        self,
        what: str,
        request: MPI.Request,
        array: OpenArray,
        memory: Any,
        pair: tuple[int, int] | None,
        received: bool = False,
    ) -> Message:
        in_flight.move()  # those that nobody waits for are done, too, in the end
        message = Message(what, request, array, memory, received)
        lane = None if pair is None else self._lane(pair)
        message.record_in(lane, self._lanes.waiting)
        return message

    def _lane(self, pair: tuple[int, int]) -> Lane:
        found = self._pairs.get(pair)
        if found is None:
            found = self._pairs[pair] = self._lanes.between(self._group, *pair)
        return found

    def _settled(self, array: OpenArray) -> Any:
        """The memory to send from: the array's own, or a copy on the host."""
        if isinstance(array.flat, np.ndarray):
            return array.flat
        device = self._group.device
        if not self._cuda_aware:
            return device.to_host(array.flat)
        device.wait(device.record())
        device.settle(array.flat)
        return array.flat

    def _start(self, call: Callable[..., MPI.Request], flat: Any, rank: int, tag: int) -> Any:
        """Call MPI for the memory as bytes: in large units where a count would overflow."""
        octets, limit = as_bytes(flat), transport.MAX_MESSAGE_BYTES
        if octets.size <= limit:
            return call([octets, self._mpi.BYTE], rank, tag)
        large = _large_type(octets.size, limit)
        try:
            return call([octets, 1, large], rank, tag)
        finally:
            large.Free()  # MPI keeps it until the message is done


def _large_type(nbytes: int, unit: int) -> MPI.Datatype:
    """``nbytes`` bytes as one element of a type: to be freed by the caller."""
    mpi = load_mpi()
    whole, rest = divmod(nbytes, unit)
    block = mpi.BYTE.Create_contiguous(unit)
    blocks = block.Create_contiguous(whole)
    large: MPI.Datatype = mpi.Datatype.Create_struct(
        [1, rest], [0, whole * unit], [blocks, mpi.BYTE]
    ).Commit()
    block.Free()
    blocks.Free()
    return large
