"""A stand-in for CuPy on numpy, as unkind as CuPy 13 and 14 and CUDA are allowed to be.

Each file names the rules that it follows, and where they come from. ``FakeCupy()`` takes the place
of the module::

    cupy = FakeCupy(gpus=2, order="early", version="13.6.0")
    device = CudaDevice(1, cupy)
    cupy.log                      # what was queued and waited for, in the order of the calls
"""

from __future__ import annotations

import itertools
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from support.fake_cuda.arrays import Array
from support.fake_cuda.memory import Memory, MemoryPointer, Pool, UnownedMemory
from support.fake_cuda.nccl import Nccl
from support.fake_cuda.runtime import Runtime, SharedEvent
from support.fake_cuda.streams import CUDARuntimeError, DeviceHandle, Event, Stream, Work

__all__ = ["Array", "CUDARuntimeError", "FakeCupy", "Stream"]


class FakeCupy:
    """The module ``cupy``, with ``gpus`` devices. Failures that tests ask for: ``fail_copies``,
    ``fail_malloc``, ``no_ipc`` (the name of the error).
    """

    def __init__(self, gpus: int = 1, order: str = "late", version: str = "14.2.0") -> None:
        self.gpus, self.order, self.__version__ = gpus, order, version
        self.log: list[tuple[Any, ...]] = []
        self.errors: list[BaseException] = []
        self.fail_copies = self.fail_malloc = False
        self.no_ipc = ""
        self.pinned: list[np.ndarray[Any, Any]] = []
        self.allocations: dict[int, tuple[Path, int]] = {}
        self.mapped: dict[int, np.ndarray[Any, Any]] = {}
        self.shared_events: list[SharedEvent] = []
        self._local = threading.local()
        self.counter = itertools.count(1)
        self._streams: dict[int, Stream] = {}
        self.events: weakref.WeakValueDictionary[int, Event] = weakref.WeakValueDictionary()
        self.opened_events: dict[int, Event] = {}
        self._default = {gpu: Stream(self, f"default{gpu}", gpu, 0) for gpu in range(gpus)}
        self._pools = {gpu: Pool(self, gpu) for gpu in range(gpus)}
        self.ndarray = type("ndarray", (Array,), {"_cupy": self})
        self.cuda = SimpleNamespace(
            Device=lambda index: DeviceHandle(self, index),
            Stream=_StreamMaker(self),
            ExternalStream=lambda ptr, device_id=-1: self.stream_at(ptr),
            Event=lambda **options: Event(self, **options),
            Memory=lambda size: Memory(self, size),
            MemoryPointer=MemoryPointer,
            UnownedMemory=UnownedMemory,
            get_current_stream=lambda: self.current_stream,
            alloc_pinned_memory=self._alloc_pinned,
            runtime=Runtime(self),
            nccl=Nccl(self),
        )

    # What a test does as the user's program would.

    def asarray(self, values: Any, dtype: Any = None) -> Any:
        """A device array; complete at once, like CuPy's copy from pageable memory."""
        if isinstance(values, Array):
            return values
        host = np.array(values, dtype)
        array = self.ndarray(host.shape, dtype=host.dtype)
        array.set(host)
        return array

    def empty(self, shape: Any, dtype: Any = np.float64) -> Any:
        return self.ndarray(shape, dtype=dtype)

    def zeros(self, shape: Any, dtype: Any = np.float64) -> Any:
        array = self.ndarray(shape, dtype=dtype)
        array.fill(0)
        return array

    def from_dlpack(self, x: Any) -> Any:
        self.log.append(("from_dlpack",))
        return self.asarray(np.from_dlpack(x))

    def use_stream(self, name: str) -> Stream:
        """A new stream, made current for this thread."""
        stream = self.new_stream(name)
        self.set_stream(stream)
        return stream

    def launch(self, kernel: Work) -> None:
        """Queue a kernel on the current stream."""
        self.log.append(("kernel", self.current_stream.name))
        self.current_stream.add(kernel)

    # The state that CUDA and CuPy keep per thread: a device, and a stream for each device.

    @property
    def current_device(self) -> int:
        return int(getattr(self._local, "device", 0))

    @current_device.setter
    def current_device(self, index: int) -> None:
        if not 0 <= index < self.gpus:
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        self._local.device = index

    def streams_of_thread(self) -> dict[int, Stream]:
        return dict(self._local.__dict__.setdefault("streams", {}))

    def set_stream(self, stream: Stream | None, device: int | None = None) -> None:
        found = self._local.__dict__.setdefault("streams", {})
        if stream is None:
            found.pop(device, None)
        else:
            found[stream.device] = stream

    @property
    def current_stream(self) -> Stream:
        at = self.current_device
        found: Stream = self._local.__dict__.get("streams", {}).get(at, self._default[at])
        return found

    def stack(self, name: str) -> list[Any]:
        """What this thread returns to on leaving ``with device`` or ``with stream``."""
        found: list[Any] = self._local.__dict__.setdefault(f"stack of {name}", [])
        return found

    def stream_at(self, pointer: int) -> Stream:
        return self._streams[pointer] if pointer else self._default[self.current_device]

    def new_stream(self, name: str | None = None) -> Stream:
        pointer = next(self.counter)
        stream = Stream(self, name or f"stream{pointer}", self.current_device, pointer)
        self._streams[pointer] = stream
        return stream

    # What goes on behind it.

    def pool(self) -> Pool:
        return self._pools[self.current_device]

    def streams(self) -> list[Stream]:
        return [*self._default.values(), *self._streams.values()]

    def run_others(self, but: Stream) -> None:
        """Order "early": all that may run on the other streams does."""
        if getattr(self._local, "running_others", False):
            return
        self._local.running_others = True
        try:
            for stream in self.streams():
                if stream is not but:
                    stream.run_if_free()
        finally:
            self._local.running_others = False

    def synchronize_device(self, device: int) -> None:
        for stream in self.streams():
            if stream.device == device:
                stream.run_to(len(stream.queue))

    def raise_errors(self) -> None:
        if self.errors:
            raise self.errors[0]

    def host_waits(self) -> int:
        """How often a host thread has waited for a stream or an event."""
        return sum(entry[0] in ("synchronize", "wait") for entry in self.log)

    def check_dtype(self, dtype: Any) -> np.dtype[Any]:
        found = np.dtype(dtype)
        if found == ml_dtypes.bfloat16 and int(self.__version__.split(".")[0]) < 14:
            raise ValueError(f"Unsupported dtype {found}")
        if found.kind in "SUOM" or (found.kind == "V" and found != ml_dtypes.bfloat16):
            raise ValueError(f"Unsupported dtype {found}")
        return found

    def check_computes(self, *dtypes: Any) -> None:
        if any(dtype == ml_dtypes.bfloat16 for dtype in dtypes):
            raise TypeError("a kernel of bfloat16 (the stand-in counts on none)")

    def _alloc_pinned(self, size: int) -> Any:
        memory = np.full(size, 0xAB, np.uint8)  # not zeros: forgotten copies must show
        self.pinned.append(memory)
        self.log.append(("pinned", size))
        return memory

    def is_pinned(self, address: int, size: int) -> bool:
        starts = [(block.ctypes.data, block.size) for block in self.pinned]
        return any(at <= address and address + size <= at + length for at, length in starts)


class _StreamMaker:
    """``cupy.cuda.Stream``: a class with constructors."""

    def __init__(self, cupy: FakeCupy) -> None:
        self._cupy = cupy

    def __call__(self, non_blocking: bool = False, null: bool = False) -> Stream:
        return self._cupy.stream_at(0) if null else self._cupy.new_stream()

    def from_external(self, obj: Any) -> Stream:
        """Since CuPy 14, by the CUDA stream protocol (cupy/cuda/stream.pyx)."""
        if int(self._cupy.__version__.split(".")[0]) < 14:
            raise AttributeError("type object 'Stream' has no attribute 'from_external'")
        version, pointer = obj.__cuda_stream__()
        if version != 0:
            raise TypeError(f"unsupported version {version}")
        return self._cupy.stream_at(pointer)
