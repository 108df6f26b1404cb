"""A stand-in for CuPy on numpy, as unhelpful about order as CUDA is allowed to be.

Work queued on a stream is *not done* until somebody waits for that stream, or for an event behind
it. So whoever forgets to wait reads old numbers, every time, where a real GPU would mostly be fast
enough to hide it. No stream waits for another by itself, not even for the default stream.

Only what mpizero and its tests use is here. ``FakeCupy()`` takes the place of the module::

    cupy = FakeCupy(gpus=2)
    device = CudaDevice(1, cupy)
    cupy.log                      # what was queued and waited for, in the order of the calls
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

Work = Callable[[], None]


class CUDARuntimeError(RuntimeError):
    """As CuPy's: an error code of CUDA."""


class FakeCupy:
    """The module ``cupy``, with ``gpus`` devices. Failures that tests ask for: ``fail_copies``."""

    def __init__(self, gpus: int = 1) -> None:
        self.gpus = gpus
        self.log: list[tuple[Any, ...]] = []
        self.fail_copies = False
        self.pinned: list[np.ndarray[Any, Any]] = []
        self._lock = threading.RLock()
        self._local = threading.local()
        self._counter = itertools.count(1)
        self._streams: dict[int, _Stream] = {}
        self.events: dict[int, _Event] = {}
        self._default = {gpu: _Stream(self, f"default{gpu}", gpu, 0) for gpu in range(gpus)}
        self.ndarray = type("ndarray", (_Array,), {"_cupy": self})
        self.cuda = SimpleNamespace(
            Device=lambda index: _DeviceHandle(self, index),
            Stream=lambda non_blocking=False: self._new_stream(),
            Event=lambda block=False, disable_timing=False: _Event(self),
            get_current_stream=lambda: self.current_stream,
            alloc_pinned_memory=self._alloc_pinned,
            runtime=_Runtime(self),
        )

    # What a test does as the user's program would.

    def asarray(self, values: Any, dtype: Any = None) -> Any:
        """A device array; complete at once, like CuPy's copy from pageable memory."""
        if isinstance(values, _Array):
            return values
        host = np.array(values, dtype)
        array = self.ndarray(host.shape, dtype=host.dtype)
        array.host[...] = host
        return array

    def empty(self, shape: Any, dtype: Any = np.float64) -> Any:
        return self.ndarray(shape, dtype=dtype)

    def from_dlpack(self, x: Any) -> Any:
        self.log.append(("from_dlpack",))
        return self.asarray(np.from_dlpack(x))

    def use_stream(self, name: str) -> _Stream:
        """A new stream, made current for this thread."""
        stream = self._new_stream(name)
        self._local.stream = stream
        return stream

    def launch(self, kernel: Work) -> None:
        """Queue a kernel on the current stream."""
        self.current_stream.add(kernel)

    # The state that CUDA keeps per thread.

    @property
    def current_device(self) -> int:
        return int(getattr(self._local, "device", 0))

    @current_device.setter
    def current_device(self, index: int) -> None:
        if not 0 <= index < self.gpus:
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        self._local.device = index

    @property
    def current_stream(self) -> _Stream:
        stream: _Stream | None = getattr(self._local, "stream", None)
        if stream is None or stream.device != self.current_device:
            return self._default[self.current_device]
        return stream

    def stack(self, name: str) -> list[Any]:
        """What this thread returns to on leaving ``with device`` or ``with stream``."""
        found: list[Any] = self._local.__dict__.setdefault(name, [])
        return found

    def stream_at(self, pointer: int) -> _Stream:
        return self._streams[pointer] if pointer else self._default[self.current_device]

    def _new_stream(self, name: str | None = None) -> _Stream:
        pointer = next(self._counter)
        stream = _Stream(self, name or f"stream{pointer}", self.current_device, pointer)
        self._streams[pointer] = stream
        return stream

    def _alloc_pinned(self, size: int) -> Any:
        memory = np.full(size, 0xAB, np.uint8)  # not zeros: forgotten copies must show
        self.pinned.append(memory)
        self.log.append(("pinned", size))
        return memory

    def is_pinned(self, address: int, size: int) -> bool:
        starts = [(block.ctypes.data, block.size) for block in self.pinned]
        return any(at <= address and address + size <= at + length for at, length in starts)


class _Stream:
    """Work in order, done only when waited for."""

    def __init__(self, cupy: FakeCupy, name: str, device: int, ptr: int) -> None:
        self._cupy, self.name, self.device, self.ptr = cupy, name, device, ptr
        self.queue: list[Work] = []
        self.done = 0

    def add(self, work: Work) -> None:
        with self._cupy._lock:
            self.queue.append(work)

    def run_to(self, position: int) -> None:
        with self._cupy._lock:
            while self.done < position:
                self.done += 1
                self.queue[self.done - 1]()

    def synchronize(self) -> None:
        self._cupy.log.append(("synchronize", self.name))
        self.run_to(len(self.queue))

    def __enter__(self) -> _Stream:
        if self.device != self._cupy.current_device:
            raise RuntimeError("The device of the stream does not match with the current device")
        local = self._cupy._local
        self._cupy.stack("streams").append(getattr(local, "stream", None))
        local.stream = self
        return self

    def __exit__(self, *_: object) -> None:
        self._cupy._local.stream = self._cupy.stack("streams").pop()


class _Event:
    def __init__(self, cupy: FakeCupy) -> None:
        self._cupy, self.device = cupy, cupy.current_device
        self.ptr = next(cupy._counter)
        cupy.events[self.ptr] = self
        self.stream: _Stream | None = None
        self.position = 0

    def synchronize(self) -> None:
        if self.stream is not None:
            self._cupy.log.append(("wait", self.stream.name))
            self.stream.run_to(self.position)


class _DeviceHandle:
    def __init__(self, cupy: FakeCupy, index: int) -> None:
        self._cupy, self.id = cupy, index

    def use(self) -> _DeviceHandle:
        self._cupy.current_device = self.id
        return self

    def __enter__(self) -> _DeviceHandle:
        self._cupy.stack("devices").append(self._cupy.current_device)
        return self.use()

    def __exit__(self, *_: object) -> None:
        self._cupy.current_device = self._cupy.stack("devices").pop()


class _Runtime:
    """``cupy.cuda.runtime``: the calls that take raw pointers."""

    memcpyHostToDevice = 1  # noqa: N815
    memcpyDeviceToHost = 2  # noqa: N815

    def __init__(self, cupy: FakeCupy) -> None:
        self._cupy = cupy

    def getDeviceCount(self) -> int:  # noqa: N802
        if self._cupy.gpus == 0:
            raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return self._cupy.gpus

    def eventRecord(self, event_ptr: int, stream_ptr: int) -> None:  # noqa: N802
        event, stream = self._cupy.events[event_ptr], self._cupy.stream_at(stream_ptr)
        if event.device != stream.device:  # an event belongs to the device it was made on
            raise CUDARuntimeError("cudaErrorInvalidResourceHandle: invalid resource handle")
        event.stream, event.position = stream, len(stream.queue)

    def memcpyAsync(self, dst: int, src: int, size: int, kind: int, stream_ptr: int) -> None:  # noqa: N802
        self.memcpy2DAsync(dst, size, src, size, size, 1, kind, stream_ptr)

    def memcpy2DAsync(  # noqa: N802
        self,
        dst: int,
        dpitch: int,
        src: int,
        spitch: int,
        width: int,
        height: int,
        kind: int,
        stream_ptr: int,
    ) -> None:
        if self._cupy.fail_copies:
            raise CUDARuntimeError("cudaErrorIllegalAddress: an illegal memory access")
        if max(dpitch, spitch) > 2**31 - 1 or min(dpitch, spitch) < width:
            raise CUDARuntimeError("cudaErrorInvalidPitchValue: invalid pitch argument")
        download = kind == self.memcpyDeviceToHost
        host, pitch = (dst, dpitch) if download else (src, spitch)
        if not self._cupy.is_pinned(host, pitch * (height - 1) + width):
            raise CUDARuntimeError("host memory is not pinned: the copy would not be asynchronous")

        def copy() -> None:
            for row in range(height):
                ctypes.memmove(dst + row * dpitch, src + row * spitch, width)

        stream = self._cupy.stream_at(stream_ptr)
        self._cupy.log.append(
            ("download" if download else "upload", width * height, height, stream.name)
        )
        stream.add(copy)


class _Array:
    """``cupy.ndarray``: kernels on it are queued on the current stream of the calling thread."""

    _cupy: FakeCupy

    def __init__(self, shape: Any, dtype: Any = np.float64) -> None:
        host = np.empty(shape, dtype)
        host.reshape(-1).view(np.uint8)[...] = 0xCD  # what nobody has written looks wrong
        self._take(host, self._cupy.current_device)

    def _take(self, host: np.ndarray[Any, Any], device: int) -> None:
        self.host = host
        self.device = SimpleNamespace(id=device)
        self.data = SimpleNamespace(ptr=host.ctypes.data)

    def _wrap(self, host: np.ndarray[Any, Any]) -> Any:
        array = object.__new__(type(self))
        array._take(host, self.device.id)
        return array

    # Seen without a kernel: the form and views.
    shape = property(lambda self: self.host.shape)
    strides = property(lambda self: self.host.strides)
    dtype = property(lambda self: self.host.dtype)
    itemsize = property(lambda self: self.host.itemsize)
    size = property(lambda self: self.host.size)
    nbytes = property(lambda self: self.host.nbytes)
    ndim = property(lambda self: self.host.ndim)
    flags = property(lambda self: self.host.flags)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return dict(self.host.__array_interface__, version=3)

    def __getitem__(self, key: Any) -> Any:
        return self._wrap(self._place(key))

    def _place(self, key: Any) -> np.ndarray[Any, Any]:
        place = self.host[key]
        if isinstance(place, np.ndarray):
            return place
        view: np.ndarray[Any, Any] = self.host[key : key + 1].reshape(())
        return view

    def reshape(self, *shape: Any) -> Any:
        return self._wrap(self.host.reshape(*shape))

    def view(self, dtype: Any) -> Any:
        return self._wrap(self.host.view(dtype))

    # Done by kernels.

    def __setitem__(self, key: Any, value: Any) -> None:
        place = self._place(key)
        self._queue(lambda: np.copyto(place, _host(value), casting="unsafe"))

    def astype(self, dtype: Any) -> Any:
        result = type(self)(self.shape, dtype=dtype)
        result[...] = self
        return result

    def copy(self) -> Any:
        return self.astype(self.dtype)

    def ravel(self) -> Any:
        return self.reshape(-1) if self.flags.c_contiguous else self.copy().reshape(-1)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        (out,) = options.get("out", (None,))
        if method != "__call__" or out is None:
            return NotImplemented
        self._queue(lambda: ufunc(*map(_host, inputs), out=out.host))
        return out

    def get(self) -> np.ndarray[Any, Any]:
        """The numbers, after what is queued on the current stream (and on no other)."""
        self._cupy.current_stream.synchronize()
        return self.host.copy()

    def _queue(self, kernel: Work) -> None:
        if self.device.id != self._cupy.current_device:
            raise CUDARuntimeError("the array's device is not the current device")
        self._cupy.launch(kernel)


def _host(value: Any) -> Any:
    return value.host if isinstance(value, _Array) else value
