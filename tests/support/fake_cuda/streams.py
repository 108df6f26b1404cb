"""Streams and events of the stand-in: work runs as late, or as early, as CUDA allows.

Rules, and where they come from:

* Work on one stream runs in order; streams know nothing of each other, unless an event is recorded
  on one and waited for on the other (CUDA C++ Programming Guide, "Asynchronous Concurrent
  Execution"). Stricter than CUDA: that holds for the default stream, too.
* ``eventRecord`` captures what has been queued at that moment, ``streamWaitEvent`` what the event
  has captured at *that* moment (CUDA Runtime API, "Event Management", "Stream Management").
* The current stream and device are the thread's own (cupy/cuda/stream.pyx, device.pyx).

Order "late": nothing runs before somebody waits for it. "early": before anything runs, all else
runs that may, on the other streams. Whoever is right in both has ordered what must be ordered. Only
what other *processes* wait for runs by itself, a little later, as it would on a GPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from support.fake_cuda import FakeCupy

Work = Callable[[], None]

# How long other processes wait for this one's kernels: long beside the calls that a test makes.
_LATE_SECONDS = 0.002

# Asked so often whether it is done, an event is.
_PATIENCE = 3

NAP_SECONDS, STUCK_SECONDS = 0.0002, 60.0


class CUDARuntimeError(RuntimeError):
    """As CuPy's: an error code of CUDA."""


def until(condition: Callable[[], bool], what: str) -> None:
    """A kernel that waits for another process."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > STUCK_SECONDS:
            raise CUDARuntimeError(f"cudaErrorLaunchTimeout: {what}")
        time.sleep(NAP_SECONDS)


@dataclass(frozen=True)
class Behind:
    """In a stream's queue: what follows waits for another stream."""

    source: Stream
    position: int


class Stream:
    """Work in order. ``eager`` ones, a framework's that computes on the host, run it at once."""

    def __init__(self, cupy: FakeCupy, name: str, device: int, ptr: int) -> None:
        self._cupy, self.name, self.device, self.ptr = cupy, name, device, ptr
        self.queue: list[Work | Behind | None] = []
        self.done = 0
        self.crossing = -1  # up to where it must not be run by way of something else
        self.eager = False
        self._running = threading.RLock()

    def add(self, work: Work | Behind, *, crossing: bool = False) -> None:
        """Queue ``work``; ``crossing``: it waits for other processes, or they for it."""
        self._cupy.raise_errors()
        self.queue.append(work)
        if self.eager:
            self.run_to(len(self.queue))
        elif crossing:
            self.crossing = len(self.queue)
            timer = threading.Timer(_LATE_SECONDS, self._run_by_itself, (len(self.queue),))
            timer.daemon = True
            timer.start()

    def run_to(self, position: int) -> None:
        # What is waited for of other streams runs while this one is not held: threads that hold one
        # each would wait for each other.
        while self.done < position:
            if self._cupy.order == "early":
                self._cupy.run_others(self)
            at = self.done
            if at >= position:
                return
            work = self.queue[at]
            if isinstance(work, Behind):
                work.source.run_to(work.position)
            with self._running:
                if self.done != at:
                    continue
                try:
                    if work is not None and not isinstance(work, Behind):
                        work()
                finally:
                    self.queue[at] = None
                    self.done = at + 1

    def run_if_free(self) -> None:
        """What is queued now, unless it would wait, or another thread is at it."""
        if self.done < self.crossing or not self._running.acquire(blocking=False):
            return
        try:
            self.run_to(len(self.queue))
        finally:
            self._running.release()

    def synchronize(self) -> None:
        self._cupy.log.append(("synchronize", self.name))
        self.run_to(len(self.queue))
        self._cupy.raise_errors()

    def record(self, event: Event | None = None) -> Event:
        found = event or Event(self._cupy)
        self._cupy.cuda.runtime.eventRecord(found.ptr, self.ptr)
        return found

    def wait_event(self, event: Event) -> None:
        self._cupy.cuda.runtime.streamWaitEvent(self.ptr, event.ptr)

    def __enter__(self) -> Stream:
        if self.device != self._cupy.current_device:
            raise RuntimeError("The device of the stream does not match with the current device")
        self._cupy.stack("streams").append((self.device, self._cupy.streams_of_thread()))
        self._cupy.set_stream(self)
        return self

    def __exit__(self, *_: object) -> None:
        device, before = self._cupy.stack("streams").pop()
        self._cupy.set_stream(before.get(device), device)

    def _run_by_itself(self, position: int) -> None:
        try:
            self.run_to(position)
        except BaseException as error:  # CUDA tells of it in the next call
            self._cupy.errors.append(error)


class Event:
    """``cupy.cuda.Event``; see ``ipc`` for those of other processes."""

    def __init__(
        self,
        cupy: FakeCupy,
        block: bool = False,
        disable_timing: bool = False,
        interprocess: bool = False,
    ) -> None:
        if interprocess and not disable_timing:  # cupy/cuda/stream.pyx, Event.__init__
            raise ValueError("Timing must be disabled for interprocess events")
        self._cupy, self.device, self.interprocess = cupy, cupy.current_device, interprocess
        self.ptr = next(cupy.counter)
        cupy.events[self.ptr] = self
        self.stream: Stream | None = None
        self.position = 0
        self._asked = 0
        self.shared: Any = None  # what other processes see of it

    @property
    def done(self) -> bool:
        if self.stream is None or self.stream.done >= self.position:
            return True
        self._asked += 1
        if self._asked >= _PATIENCE:
            self.stream.run_to(self.position)
        return self.stream.done >= self.position

    def record(self, stream: Stream | None = None) -> None:
        (stream or self._cupy.current_stream).record(self)

    def synchronize(self) -> None:
        if self.stream is not None:
            self._cupy.log.append(("wait", self.stream.name))
            self.stream.run_to(self.position)
            self._cupy.raise_errors()


class DeviceHandle:
    """``cupy.cuda.Device``."""

    def __init__(self, cupy: FakeCupy, index: int) -> None:
        self._cupy, self.id = cupy, index
        self.compute_capability = "90"
        self.pci_bus_id = f"0000:{index:02x}:00.0"

    def use(self) -> DeviceHandle:
        self._cupy.current_device = self.id
        return self

    def synchronize(self) -> None:
        self._cupy.synchronize_device(self.id)

    def __enter__(self) -> DeviceHandle:
        self._cupy.stack("devices").append(self._cupy.current_device)
        return self.use()

    def __exit__(self, *_: object) -> None:
        self._cupy.current_device = self._cupy.stack("devices").pop()
