"""What a piece of work touches, and its order among the streams of a GPU.

Work on device memory is queued, not done, when a call returns. So whoever submits it says which
arrays it touches and on which stream they are used (``Touched``), and the order is kept on the
device: the collective's stream follows the caller's, and the caller's, when it waits, follows the
collective's (``Order``). The host waits only where it touches memory itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mpizero.memory.arrays import OpenArray, StreamOf, on_device
from mpizero.world.device import Device


@dataclass(frozen=True)
class Touched:
    """The arrays that a piece of work reads and writes, and the streams on which they are used.

    ``counterpart``: the first of them may lie in node-shared memory, and all ranks' counterparts of
    it are wanted. Made by ``NOTHING``, ``on_host``, ``on_stream`` or ``opened``: there is no device
    memory without a stream.
    """

    arrays: tuple[Any, ...]
    streams: tuple[StreamOf, ...]
    blocking: bool = False  # nobody knows on which stream the results are used: they must be there
    counterpart: bool = True

    @property
    def first(self) -> tuple[Any, ...]:
        """The array whose counterparts are wanted, if any."""
        return self.arrays[:1] if self.counterpart else ()

    @property
    def nbytes(self) -> int:
        """Of the first array: how much the work is about."""
        return int(self.arrays[0].nbytes) if self.arrays else 0


NOTHING = Touched((), ())


def on_host(*arrays: Any, counterpart: bool = False) -> Touched:
    """Host memory only. RuntimeError for device memory, whose stream must be said."""
    if any(map(on_device, arrays)):
        raise RuntimeError("work on device memory must name the stream on which it is used")
    return Touched(arrays, (), counterpart=counterpart)


def on_stream(stream: StreamOf, *arrays: Any, counterpart: bool = True) -> Touched:
    """Memory, wherever; on a device it is used on the raw ``stream()``, or CuPy's current one."""
    streams = (stream,) if any(map(on_device, arrays)) else ()
    return Touched(arrays, streams, counterpart=counterpart)


def opened(*arrays: OpenArray | None) -> Touched:
    """Users' arrays, each on the stream of its owner."""
    given = [each for each in arrays if each is not None]
    there = [each for each in given if on_device(each.array)]
    streams = tuple(each.stream for each in there if each.stream is not None)
    # What is worked on in a copy is written back: until then it must not be given out again either.
    behind = [each.array for each in given if each.is_copy]
    return Touched(
        (*(each.flat for each in given), *behind),
        streams or ((lambda: None,) if there else ()),
        blocking=len(streams) < len(there),
    )


class Order:
    """The place of one piece of work among the streams of its device.

    Made by the thread that submits it, which marks what fills the arrays. The work is done inside
    ``section``; ``wait`` is for those who use the results.
    """

    def __init__(self, device: Device, touched: Touched) -> None:
        self._device, self._touched = device, touched
        self._callers = device.current_stream()
        # Memory that CuPy has just allocated is ordered by CuPy's stream, whoever fills it.
        self._filled = [device.record(stream) for stream in self._streams()]
        self._done: Any = None

    @contextmanager
    def section(self, stream: Any = None) -> Iterator[None]:
        """Around the work: its kernels run on a communication stream, after what was marked."""
        device = self._device
        with device.communicating(stream):
            for event in self._filled:
                device.follow(event)
            try:
                yield
            finally:
                self._done = device.record()
                device.keep(self._done, self._touched.arrays)

    def room(self, allocate: Callable[[], Any]) -> Any:
        """Inside ``section``: memory for a result, which is the caller's from then on.

        CuPy hands freed memory out again in the order of the stream on which it was allocated.
        """
        with self._device.communicating(self._callers):
            found = allocate()
            allocated = self._device.record()
        self._device.follow(allocated)
        return found

    def wait(self, blocking: bool = False) -> None:
        """Let what this thread queues from now on see the results; ``blocking``: they are there."""
        if self._done is None:
            return
        if blocking or self._touched.blocking:
            self._device.wait(self._done)
            return
        for stream in self._streams():
            self._device.follow(self._done, stream)

    def is_done(self) -> bool:
        """Are the results there?"""
        return self._device.is_done(self._done)

    def _streams(self) -> Sequence[int | None]:
        return list(dict.fromkeys([None, *(stream() for stream in self._touched.streams)]))
