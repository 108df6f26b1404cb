"""Messages between two ranks: sent and received in any order, many at a time.

They are not collectives and have no order that all ranks share: so none of them waits in the
progress thread, where it would hold up what is behind it. Each is a non-blocking MPI request from
the start, and a handle that tests it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from mpizero.collectives import transport
from mpizero.diagnostics import Lane, Lanes, recorded
from mpizero.errors import ArgumentError, LaunchError, MismatchError
from mpizero.memory.arrays import OpenArray, assign, on_device
from mpizero.memory.dtypes import as_bytes
from mpizero.world import Group, in_flight
from mpizero.world.startup import load_mpi

if TYPE_CHECKING:
    from mpi4py import MPI

# After so many looks give the core away between two of them, and in the end take short naps.
_EAGER_LOOKS, _YIELDING_LOOKS, _NAP_SECONDS = 2_000, 20_000, 50e-6


class Transfer:
    """What MPI has of one message, until it is done: whether anybody waits for it or not.

    The array must not be changed before a sent message, nor used before a received one is done.
    """

    def __init__(
        self,
        what: str,
        request: MPI.Request,
        array: OpenArray,
        memory: Any,
        messages: Messages,
        received: bool,
    ) -> None:
        self.what, self.array, self.received = what, array, received
        self.messages = messages
        self.source: int | None = None
        self.error: BaseException | None = None
        self.finished = False
        self._request, self._memory = request, memory
        self._status = load_mpi().Status()
        self._lock = threading.Lock()  # MPI allows one thread to ask for a request at a time
        in_flight.under_way.add(self)

    def done(self) -> bool:
        """Ask MPI; True once the message has been sent or received, or has failed."""
        if not self.finished and self._lock.acquire(blocking=False):
            try:
                if not self.finished:
                    self._look(self._request.Test)
            finally:
                self._lock.release()
        return self.finished

    def cancel(self) -> None:
        """Do not receive what has not come. For a received one, of which no rank is asked."""
        with self._lock:
            if not self.finished:
                self._request.Cancel()
                self._look(self._request.Wait)

    def _look(self, ask: Callable[[MPI.Status], bool]) -> None:
        """Ask MPI; finish what there is to finish."""
        mpi = load_mpi()
        try:
            if not ask(self._status):
                return
            if self._status.Is_cancelled():
                raise LaunchError(f"{self.what}: its World has been closed, and nothing had come.")
            if self.received:
                self._take()
        except mpi.Exception as error:
            self.error = error
            if error.Get_error_class() == mpi.ERR_TRUNCATE:
                self.messages.count(self._status)
                self.error = self._mismatch("more than")
        except Exception as error:
            self.error = error
        self.finished = True
        in_flight.under_way.discard(self)
        self._memory = None

    def _take(self) -> None:
        self.source = self.messages.count(self._status)
        expected, came = self.array.flat.nbytes, self._status.Get_elements(load_mpi().BYTE)
        if came not in (expected, load_mpi().UNDEFINED):
            raise self._mismatch(f"{came} of")
        with self.messages.putting(self.array):
            if on_device(self.array.flat) and not on_device(self._memory):
                assign(self.array.flat, self._memory)
            self.array.commit()

    def _mismatch(self, came: str) -> MismatchError:
        return MismatchError(
            f"{self.what}: the message from rank {self._status.Get_source()} has {came} the "
            f"{self.array.flat.nbytes} bytes that x holds. Sender and receiver must pass arrays "
            "of one size."
        )


class Message:
    """One message under way. ``wait`` and ``done`` as of a Handle; a received one tells from whom.

    Who has one that is not done holds its World, too.
    """

    def __init__(self, transfer: Transfer, hold: object, lane: Lane | None, waiting: Lane) -> None:
        self.what = transfer.what
        self._transfer = transfer
        self._hold: object | None = hold
        self._lane, self._waiting = lane, waiting
        self._sequence = 0
        if lane is not None:  # where those of the same two ranks and direction are counted
            at = lane.begin(self.what, transfer.array.flat.nbytes, lane.recorder.here())
            lane.end(at)
            self._sequence = lane.sequence

    def done(self) -> bool:
        """True once the message has been sent or received (or has failed: ``wait`` tells)."""
        if self._transfer.done():
            self._hold = None
        return self._transfer.finished

    def wait(self) -> int | None:
        """Wait for it; return the rank that sent it, None for one of this rank's own.

        Raises MismatchError for a received one of another size than the array.
        """
        if not self.done():
            self._wait()
        if self._transfer.error is not None:
            raise self._transfer.error
        return self._transfer.source

    def _wait(self) -> None:
        looks = 0
        while looks < _EAGER_LOOKS and not self.done():  # most have come by then
            looks += 1
        if self._transfer.finished:
            return
        if self._lane is None:
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


class Messages:
    """The messages of a group, on a communicator of their own. Collective to make and to close."""

    def __init__(self, group: Group, cuda_aware: bool, lanes: Lanes) -> None:
        self._cuda_aware, self._lanes = cuda_aware, lanes
        self._rank, self._device = group.rank, group.device
        self._comm = group.messages
        self._mpi = load_mpi()
        self.largest_tag = int(self._mpi.COMM_WORLD.Get_attr(self._mpi.TAG_UB))
        self._pairs: dict[tuple[int, int], Lane] = {}
        # To and from each rank, so far.
        self._sent, self._received = np.zeros((2, group.size), np.int64)
        self._lock = threading.Lock()

    @property
    def lanes(self) -> Sequence[Lane]:
        """Those of pairs of ranks."""
        return list(self._pairs.values())

    def check_tag(self, function: str, tag: int | None) -> None:
        """Raise ArgumentError for what is no tag of this MPI's."""
        if tag is not None and not 0 <= tag <= self.largest_tag:
            raise ArgumentError(function, "tag", str(tag), f"0 to {self.largest_tag}")

    def send(self, array: OpenArray, to: int, tag: int, what: str, hold: object) -> Message:
        """Start to send the array. ``hold``: what keeps these messages from being closed."""
        memory = self._settled(array)
        request = self._start(self._comm.Isend, memory, to, tag)
        with self._lock:
            self._sent[to] += 1
        transfer = self._started(what, request, array, memory)
        return Message(transfer, hold, self._lane((self._rank, to)), self._lanes.waiting)

    def receive(
        self, array: OpenArray, source: int | None, tag: int | None, what: str, hold: object
    ) -> Message:
        """Start to receive into the array, from ``source`` (None: from any rank)."""
        memory = array.flat
        if on_device(memory):
            self._device.settle(memory)  # what is queued on it comes before what MPI writes
        if on_device(memory) and not self._cuda_aware:
            memory = np.empty(array.flat.shape, array.dtype)
        any_source, any_tag = self._mpi.ANY_SOURCE, self._mpi.ANY_TAG
        request = self._start(
            self._comm.Irecv,
            memory,
            any_source if source is None else source,
            any_tag if tag is None else tag,
        )
        transfer = self._started(what, request, array, memory, received=True)
        lane = None if source is None else self._lane((source, self._rank))
        return Message(transfer, hold, lane, self._lanes.waiting)

    def count(self, status: MPI.Status) -> int:
        """Note that a message has been received; from whom."""
        source = int(status.Get_source())
        with self._lock:
            self._received[source] += 1
        return source

    @contextmanager
    def putting(self, array: OpenArray) -> Iterator[None]:
        """Around what puts a message into its array: it is there afterwards, for every stream."""
        if not on_device(array.array):
            yield
            return
        with self._device.communicating():
            yield
            self._device.synchronize()

    def close(self) -> None:
        """Take what has been sent and not received, and receive nothing more. Collective.

        Or it would come to who gets the communicator's place: MPICH tells messages apart by a
        number that the next communicator gets.
        """
        all_there_are = [*in_flight.under_way]
        mine = [t for t in all_there_are if isinstance(t, Transfer) and t.messages is self]
        for each in mine:
            if each.received:
                each.cancel()
        told = np.zeros_like(self._sent)
        self._comm.Alltoall(self._sent, told)
        for source, missing in enumerate((told - self._received).tolist()):
            for _ in range(missing):
                self._drop(source)
        while not all(each.done() for each in mine):  # the others are taking them
            os.sched_yield()

    def _drop(self, source: int) -> None:
        """Receive a message that has been sent, wherever to."""
        status = self._mpi.Status()
        message = self._comm.Mprobe(source, self._mpi.ANY_TAG, status)
        octets = np.empty(status.Get_elements(self._mpi.BYTE), np.uint8)
        self._counted(octets, message.Recv)

    def _started(
        self,
        what: str,
        request: MPI.Request,
        array: OpenArray,
        memory: Any,
        received: bool = False,
    ) -> Transfer:
        in_flight.move()  # those that nobody waits for are done, too, in the end
        return Transfer(what, request, array, memory, self, received)

    def _lane(self, pair: tuple[int, int]) -> Lane:
        found = self._pairs.get(pair)
        if found is None:
            found = self._pairs[pair] = self._lanes.between(*pair)
        return found

    def _settled(self, array: OpenArray) -> Any:
        """The memory to send from: the array's own, or a copy on the host."""
        if isinstance(array.flat, np.ndarray):
            return array.flat
        if not self._cuda_aware:
            return self._device.to_host(array.flat)
        self._device.settle(array.flat)
        return array.flat

    def _start(self, call: Callable[..., MPI.Request], flat: Any, rank: int, tag: int) -> Any:
        """Call MPI for the memory as bytes."""
        return self._counted(as_bytes(flat), lambda buffer: call(buffer, rank, tag))

    def _counted(self, octets: Any, call: Callable[[list[Any]], Any]) -> Any:
        """Call MPI for these bytes: in large units where a count would overflow."""
        limit = transport.MAX_MESSAGE_BYTES
        if octets.size <= limit:
            return call([octets, self._mpi.BYTE])
        large = _large_type(octets.size, limit)
        try:
            return call([octets, 1, large])
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
