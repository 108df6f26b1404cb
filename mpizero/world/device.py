"""The device of a rank: the host, or one GPU. The only file that calls CuPy.

CuPy is looked for, never required, and imported only if it is there. MPI knows nothing of CUDA
streams: it reads and writes memory when it is called. So the thread that submits a collective
records an event on the stream that fills the array, and the stream on which the collective's
kernels run follows it. Only where the host itself touches memory (MPI, a staging copy) a thread
waits. ``mpizero.memory.order`` puts these together.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import threading
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike

from mpizero.errors import ArgumentError

# CUDA's memcpy2D takes rows no further apart than this (cudaDevAttrMaxPitch).
_MAX_PITCH = 2**31 - 1


class Device(ABC):
    """Where a rank's arrays live and what must be done around communicating them."""

    kind: Literal["cpu", "cuda"]
    index: int | None
    name: str

    def is_device_array(self, x: object) -> bool:
        """True if ``x`` is GPU memory of any library."""
        return hasattr(x, "__cuda_array_interface__")

    @abstractmethod
    def check(self, array: Any, function: str, argument: str) -> None:
        """Raise ArgumentError if ``array`` (numpy or CuPy) is GPU memory of another device."""

    @abstractmethod
    def record(self, stream: int | None = None) -> Any:
        """Mark what has been queued so far; called on the thread that submits a collective.

        On CuPy's current stream, or on the raw ``stream`` (a cudaStream_t as an integer) of another
        library. Returns an event for ``wait``.
        """

    @abstractmethod
    def wait(self, event: Any) -> None:
        """Block until what ``event`` marks is done; None marks nothing."""

    @abstractmethod
    def follow(self, event: Any, stream: int | None = None) -> None:
        """Let what is queued from now on run after what ``event`` marks. Does not block.

        On CuPy's current stream, or on the raw ``stream``, which is of this device.
        """

    @abstractmethod
    def is_done(self, event: Any) -> bool:
        """Is what ``event`` marks done? Does not block."""

    @abstractmethod
    def keep(self, event: Any, owners: Sequence[object]) -> None:
        """Let ``owners`` of memory live until what ``event`` marks is done."""

    @abstractmethod
    def activate(self) -> None:
        """Make this the calling thread's device: CUDA's current device is per thread."""

    @abstractmethod
    def using(self, stream: int | None) -> AbstractContextManager[None]:
        """Inside, this thread's kernels run on the raw ``stream``; None: on CuPy's current one."""

    @abstractmethod
    def new_stream(self) -> Any:
        """A stream on which the kernels of collectives are to run, for ``communicating``."""

    @abstractmethod
    def current_stream(self) -> Any:
        """CuPy's current stream of this thread, for ``communicating``."""

    @abstractmethod
    def communicating(self, stream: Any = None) -> AbstractContextManager[None]:
        """Inside, this is the thread's device, and its kernels run on a communication stream."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block until the communication streams are quiet, and this thread's current one."""

    def settle(self, *arrays: object) -> None:
        """Before MPI is handed ``arrays``: finish the kernels that still write or read them.

        Those of a collective run on the current stream, which follows the caller's.
        """
        if any(self.is_device_array(array) for array in arrays):
            self.synchronize()

    @abstractmethod
    def empty(self, size: int, dtype: DTypeLike) -> Any:
        """An uninitialised 1-D array on this device."""

    @abstractmethod
    def to_host(self, array: Any) -> Any:
        """An array of this device as numpy, after what is queued on the current stream."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name})"


class HostDevice(Device):
    """No GPU: nothing is queued anywhere, so there is nothing to wait for."""

    kind = "cpu"
    index = None
    name = "cpu"

    def check(self, array: Any, function: str, argument: str) -> None:
        if self.is_device_array(array):
            raise ArgumentError(
                function,
                argument,
                "an array on a GPU",
                "an array in host memory",
                "This rank is bound to the host: unset MPIZERO_DEVICE, or set it to cuda.",
            )

    def record(self, stream: int | None = None) -> None:
        return None

    def wait(self, event: Any) -> None:
        pass

    def follow(self, event: Any, stream: int | None = None) -> None:
        pass

    def is_done(self, event: Any) -> bool:
        return True

    def keep(self, event: Any, owners: Sequence[object]) -> None:
        pass

    def activate(self) -> None:
        pass

    def using(self, stream: int | None) -> AbstractContextManager[None]:
        return nullcontext()

    def new_stream(self) -> Any:
        return None

    def current_stream(self) -> Any:
        return None

    def communicating(self, stream: Any = None) -> AbstractContextManager[None]:
        return nullcontext()

    def synchronize(self) -> None:
        pass

    def settle(self, *arrays: object) -> None:
        pass

    def empty(self, size: int, dtype: DTypeLike) -> Any:
        return np.empty(size, dtype)

    def to_host(self, array: Any) -> Any:
        return array


class CudaDevice(Device):
    """GPU ``index`` of those that this process sees, reached through the module ``cupy``."""

    kind = "cuda"
    index: int

    def __init__(self, index: int, cupy: Any) -> None:
        self.index = index
        self.name = f"cuda:{index}"
        self._cupy = cupy
        self._runtime = cupy.cuda.runtime
        self._handle = cupy.cuda.Device(index)
        self.activate()
        # Non-blocking: CUDA's default stream would otherwise make communication and compute wait
        # for each other. One per direction, because a GPU has a copy engine for each. Creating
        # them also creates the CUDA context, which some MPIs look for when they start.
        self._stream = cupy.cuda.Stream(non_blocking=True)  # to the host; kernels beside MPI
        self._uploads = cupy.cuda.Stream(non_blocking=True)
        self._idle: defaultdict[int, list[Any]] = defaultdict(list)
        self._lock = threading.Lock()
        # Events, and who must live until they are done, in the order in which they were recorded.
        self._kept: deque[tuple[Any, Sequence[object]]] = deque()

    def check(self, array: Any, function: str, argument: str) -> None:
        if isinstance(array, self._cupy.ndarray) and array.device.id != self.index:
            raise ArgumentError(
                function,
                argument,
                f"an array on GPU {array.device.id}",
                f"an array on GPU {self.index} or in host memory",
                f"This rank is bound to GPU {self.index}; MPIZERO_DEVICE=cuda:N binds another.",
            )

    def record(self, stream: int | None = None) -> Any:
        with self._handle:  # an event belongs to the device that is current when it is made
            if stream is None:
                stream = self._cupy.cuda.get_current_stream().ptr
            return self._mark(stream)

    def wait(self, event: Any) -> None:
        if event is not None:
            event.synchronize()

    def follow(self, event: Any, stream: int | None = None) -> None:
        if event is None:
            return
        with self._handle:
            if stream is None:
                stream = self._cupy.cuda.get_current_stream().ptr
            self._runtime.streamWaitEvent(stream, event.ptr)

    def is_done(self, event: Any) -> bool:
        return event is None or bool(event.done)

    def keep(self, event: Any, owners: Sequence[object]) -> None:
        done = []
        with self._lock:
            self._kept.append((event, owners))
            while self._kept[0][0].done:
                done.append(self._kept.popleft())
                if not self._kept:
                    break
        del done  # outside of the lock: memory is freed here, which may take other locks

    def activate(self) -> None:
        self._handle.use()

    @contextmanager
    def using(self, stream: int | None) -> Iterator[None]:
        with self._handle:
            if stream is None:
                yield
                return
            with self._external(stream):
                yield

    def new_stream(self) -> Any:
        with self._handle:
            return self._cupy.cuda.Stream(non_blocking=True)

    def current_stream(self) -> Any:
        with self._handle:
            return self._cupy.cuda.get_current_stream()

    @contextmanager
    def communicating(self, stream: Any = None) -> Iterator[None]:
        with self._handle, stream or self._stream:
            yield

    def synchronize(self) -> None:
        with self._handle:
            current = self._cupy.cuda.get_current_stream().ptr
            for stream in {current, self._stream.ptr, self._uploads.ptr}:
                self.wait(self._mark(stream))

    def finish(self) -> None:
        """Block until everything that has been queued on this device, by anybody, is done."""
        with self._handle:
            self._handle.synchronize()

    @property
    def nccl(self) -> Any:
        """CuPy's module of NCCL; None where there is no NCCL."""
        found = getattr(self._cupy.cuda, "nccl", None)
        if found is None:
            try:
                found = importlib.import_module("cupy.cuda.nccl")
            except ImportError:
                return None
        return found if found.available else None

    @property
    def bus_id(self) -> str:
        """Where the GPU is plugged in: what tells it from the others of its host."""
        return str(self._handle.pci_bus_id)

    def _external(self, stream: int) -> Any:
        """Another library's stream as CuPy's."""
        if hasattr(self._cupy.cuda.Stream, "from_external"):  # since CuPy 14
            return self._cupy.cuda.Stream.from_external(_Foreign(stream))
        return self._cupy.cuda.ExternalStream(stream, self.index)

    def empty(self, size: int, dtype: DTypeLike) -> Any:
        with self._handle:
            return self._cupy.empty(size, dtype)

    def to_host(self, array: Any) -> Any:
        with self._handle:
            return array.get()

    def download(self, rows: Any, host: Any) -> Any:
        """Queue a copy of a device array to pinned memory; returns its event.

        ``rows``: CuPy array of shape (n, w), each row contiguous. ``host``: contiguous numpy array
        of n * w elements of the same dtype. Runs after the kernels queued on the communication
        stream; other streams must have been waited for.
        """
        return self._copy(rows, host, self._runtime.memcpyDeviceToHost, self._stream)

    def upload(self, host: Any, rows: Any) -> Any:
        """Queue a copy of pinned memory to a device array, forms as in ``download``."""
        return self._copy(rows, host, self._runtime.memcpyHostToDevice, self._uploads)

    def borrow_pinned(self, nbytes: int) -> Any:
        """Page-locked host memory, as at least ``nbytes`` of uint8; give it back after use.

        Only that is copied asynchronously. It is slow to allocate, so it is kept for the next one
        who wants as much (sizes are powers of two).
        """
        size = 1 << max(12, (nbytes - 1).bit_length())
        with self._lock:
            if self._idle[size]:
                return self._idle[size].pop()
        with self._handle:
            memory = self._cupy.cuda.alloc_pinned_memory(size)
        return np.frombuffer(memory, np.uint8, size)

    def return_pinned(self, buffer: Any) -> None:
        """Give back what ``borrow_pinned`` gave, when no copy uses it any more."""
        with self._lock:
            self._idle[buffer.size].append(buffer)

    def _mark(self, stream: int) -> Any:
        # Blocking: the waiting thread sleeps instead of spinning on a core that compute needs.
        event = self._cupy.cuda.Event(block=True, disable_timing=True)
        self._runtime.eventRecord(event.ptr, stream)
        return event

    def _copy(self, rows: Any, host: Any, kind: int, stream: Any) -> Any:
        height, width = rows.shape[0], rows.shape[1] * rows.itemsize
        # (address, distance of the rows) on either side
        ends = [(rows.data.ptr, max(rows.strides[0], width)), (host.ctypes.data, width)]
        if kind == self._runtime.memcpyDeviceToHost:
            ends.reverse()
        (into, into_pitch), (source, source_pitch) = ends
        with self._handle:
            if max(into_pitch, source_pitch) <= _MAX_PITCH:
                self._runtime.memcpy2DAsync(
                    into, into_pitch, source, source_pitch, width, height, kind, stream.ptr
                )
            else:
                for row in range(height):
                    places = into + row * into_pitch, source + row * source_pitch
                    self._runtime.memcpyAsync(*places, width, kind, stream.ptr)
            return self._mark(stream.ptr)


class _Foreign:
    """A raw stream, by the CUDA stream protocol."""

    def __init__(self, stream: int) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self._stream)


def import_cupy() -> Any:
    """CuPy, or None where it is not installed (or, with a warning, where it is broken)."""
    if "cupy" in sys.modules:  # asked for every device array that comes in: keep it quick
        return sys.modules["cupy"]
    if importlib.util.find_spec("cupy") is None:
        return None
    try:
        return importlib.import_module("cupy")
    except Exception as error:  # a missing CUDA library shows as ImportError, OSError, ...
        warnings.warn(
            f"CuPy is installed but cannot be imported, so the host is used ({error}). "
            "MPIZERO_DEVICE=cpu says that this is intended.",
            stacklevel=2,
        )
        return None


def bind_device(local_rank: int, import_cupy: Callable[[], Any] = import_cupy) -> Device:
    """The device of the rank that is ``local_rank``-th on its node; call it before MPI starts.

    The GPU local rank modulo visible GPUs, where CuPy is installed and sees one (a launcher that
    shows each rank only its own GPU is right with that too); else the host.
    ``MPIZERO_DEVICE=cpu|cuda|cuda:N`` decides otherwise; ArgumentError if that cannot be had.
    """
    wish = os.environ.get("MPIZERO_DEVICE", "")
    if not re.fullmatch(r"(cpu|cuda(:[0-9]+)?)?", wish):
        raise ArgumentError("init()", "MPIZERO_DEVICE", repr(wish), "cpu, cuda, cuda:N")
    kind, _, number = wish.partition(":")
    if kind == "cpu":
        return HostDevice()
    cupy = import_cupy()
    gpus = 0 if cupy is None else _visible_gpus(cupy)
    if gpus == 0:
        if not wish:
            return HostDevice()
        hint = "No GPU is visible here: see nvidia-smi, CUDA_VISIBLE_DEVICES and the job's request."
        if cupy is None:
            hint = "CuPy cannot be imported here: pip install 'mpizero[cuda]'."
        raise ArgumentError("init()", "MPIZERO_DEVICE", repr(wish), "cpu", hint)
    index = int(number) if number else local_rank % gpus
    if index >= gpus:
        allowed = f"cpu, cuda, cuda:0 to cuda:{gpus - 1}"
        raise ArgumentError("init()", "MPIZERO_DEVICE", repr(wish), allowed)
    return CudaDevice(index, cupy)


def _visible_gpus(cupy: Any) -> int:
    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except RuntimeError:  # CUDARuntimeError: no driver or no device, as on a login node
        return 0


def as_device_array(x: Any) -> Any:
    """GPU memory of any library as a CuPy array that shares it.

    By DLPack where there is a way: its exchange makes CuPy's current stream wait for the owner's,
    which ``__cuda_array_interface__`` leaves to chance in libraries that name no stream. Raises
    RuntimeError without CuPy, and what CuPy raises for memory it cannot take.
    """
    cupy = import_cupy()
    if cupy is None:
        raise RuntimeError("GPU memory needs CuPy: pip install 'mpizero[cuda]'")
    if isinstance(x, cupy.ndarray):
        return x
    if hasattr(x, "__dlpack__"):
        try:
            return cupy.from_dlpack(x)
        except (TypeError, BufferError, ValueError):  # a dtype or form that DLPack cannot carry
            if not hasattr(x, "__cuda_array_interface__"):
                raise
    return cupy.asarray(x)
