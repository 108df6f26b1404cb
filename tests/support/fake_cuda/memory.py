"""Memory of the stand-in: addresses of this process, given out again as soon as they are free.

Rules, and where they come from:

* CuPy's pool keeps what is freed for the *stream* it was allocated on, and gives it out again at
  once, since what follows on that stream comes later (cupy/cuda/memory.pyx, SingleDeviceMemoryPool;
  user guide, "Memory Management"). Another stream that still reads it reads what comes next: here,
  nonsense, which is put there behind the stream's other work when the last owner has gone.
* ``Memory`` is cudaMalloc's, and freeing it waits for the device (CUDA Runtime API, cudaFree).
* A queued kernel holds an address, and keeps nothing alive.
* ``ipcGetMemHandle`` is for cudaMalloc's memory, whose handle another process may open, not the one
  that it belongs to (CUDA Runtime API, cudaIpcGetMemHandle, cudaIpcOpenMemHandle).
"""

from __future__ import annotations

import atexit
import ctypes
import mmap
import os
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from support.fake_cuda.streams import CUDARuntimeError, Stream

if TYPE_CHECKING:
    from support.fake_cuda import FakeCupy

FRESH, FREED = 0xCD, 0xDE  # what nobody has written, and what is nobody's, look wrong

_HEAP_BYTES = 1 << 28  # mapped, and used page by page
_UNIT = 512  # of CuPy's pool
_SHARED = Path("/dev/shm")


def at_address(address: int, nbytes: int) -> np.ndarray[Any, Any]:
    """Bytes of this process, not kept alive."""
    if nbytes == 0:
        return np.empty(0, np.uint8)
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8)


class OutOfMemoryError(MemoryError):
    """As cupy.cuda.memory.OutOfMemoryError."""


class Pool:
    """Memory of one device, as CuPy's default pool hands it out."""

    def __init__(self, cupy: FakeCupy, device: int) -> None:
        self._cupy, self._device = cupy, device
        self._heap: np.ndarray[Any, Any] | None = None
        self._used = 0
        self._free: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        self.in_use = 0

    def malloc(self, nbytes: int) -> PooledMemory:
        if self._heap is None:
            self._heap = np.frombuffer(mmap.mmap(-1, _HEAP_BYTES), np.uint8)
        size = -(-max(nbytes, 1) // _UNIT) * _UNIT
        stream = self._cupy.current_stream
        found = self._free[stream.ptr, size]
        if found:
            at = found.pop()
        else:
            at, self._used = self._used, self._used + size
            if self._used > _HEAP_BYTES:
                raise OutOfMemoryError(f"Out of memory allocating {size} bytes")
            self._heap[at : at + size] = FRESH
        self.in_use += size
        return PooledMemory(self, self._heap[at : at + size], at, stream, self._device)

    def free(self, block: PooledMemory) -> None:
        memory = block.memory

        def spoil() -> None:
            memory[...] = FREED

        with suppress(CUDARuntimeError):
            block.stream.add(spoil)
        self._free[block.stream.ptr, memory.size].append(block.at)
        self.in_use -= memory.size


class PooledMemory:
    """A piece of a pool: free again when nothing refers to it."""

    def __init__(
        self, pool: Pool, memory: np.ndarray[Any, Any], at: int, stream: Stream, device: int
    ) -> None:
        self._pool, self.memory, self.at, self.stream = pool, memory, at, stream
        self.device_id, self.ptr, self.size = device, memory.ctypes.data, memory.size

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():
            self._pool.free(self)


class Memory:
    """``cupy.cuda.Memory``: cudaMalloc's, which other processes may map."""

    def __init__(self, cupy: FakeCupy, size: int) -> None:
        if cupy.fail_malloc:
            raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
        self._cupy, self.size, self.device_id = cupy, size, cupy.current_device
        self._path = _SHARED / f"fake_cuda.{os.getpid()}.{next(cupy.counter)}.{id(cupy):x}"
        self._memory = map_file(self._path, max(size, 1))
        self._memory[...] = FRESH
        self.ptr = self._memory.ctypes.data
        cupy.allocations[self.ptr] = (self._path, size)
        self._unname = weakref.finalize(self, _unlink, self._path)
        atexit.register(_unlink, self._path)

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if getattr(self, "_memory", None) is not None and not is_finalizing():
            self._cupy.synchronize_device(self.device_id)
            self._memory[...] = FREED
            self._cupy.allocations.pop(self.ptr, None)


class UnownedMemory:
    """``cupy.cuda.UnownedMemory``: an address that somebody else looks after."""

    def __init__(self, ptr: int, size: int, owner: Any, device_id: int = -1) -> None:
        self.ptr, self.size, self._owner = ptr, size, owner
        self.device_id = max(device_id, 0)


class MemoryPointer:
    """``cupy.cuda.MemoryPointer``: a place in memory, which it keeps."""

    def __init__(self, mem: Any, offset: int) -> None:
        self.mem, self.ptr, self.device_id = mem, mem.ptr + offset, mem.device_id


def map_file(path: Path, size: int) -> np.ndarray[Any, Any]:
    """A file as memory, which it has ``size`` bytes of."""
    with path.open("a+b") as file:
        file.truncate(max(size, path.stat().st_size))
        return np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
