"""``cupy.cuda.runtime`` of the stand-in: the calls that take raw pointers.

Rules, and where they come from (CUDA Runtime API, unless another is named):

* An event belongs to the device it was made on, and is recorded on that device's streams only.
* memcpyAsync of memory that is not pinned is not asynchronous ("API synchronization behavior"):
  here it is an error, since nobody means it.
* The pitch of memcpy2D is bounded (cudaDevAttrMaxPitch).
* A handle of memory is not opened by the process that made it; one of an event is of an event made
  for that (cudaEventInterprocess).
"""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from support.fake_cuda.memory import map_file
from support.fake_cuda.streams import Behind, CUDARuntimeError, Event, Stream, until

if TYPE_CHECKING:
    from support.fake_cuda import FakeCupy

_HANDLE_BYTES = 64  # CUDA_IPC_HANDLE_SIZE


class Runtime:
    """What of the module there is."""

    memcpyHostToDevice = 1  # noqa: N815
    memcpyDeviceToHost = 2  # noqa: N815
    memcpyDeviceToDevice = 3  # noqa: N815
    cudaIpcMemLazyEnablePeerAccess = 1  # noqa: N815

    def __init__(self, cupy: FakeCupy) -> None:
        self._cupy = cupy

    def getDeviceCount(self) -> int:  # noqa: N802
        if self._cupy.gpus == 0:
            raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return self._cupy.gpus

    def getDevice(self) -> int:  # noqa: N802
        return self._cupy.current_device

    def setDevice(self, index: int) -> None:  # noqa: N802
        self._cupy.current_device = index

    # -- events

    def eventRecord(self, event_ptr: int, stream_ptr: int) -> None:  # noqa: N802
        event, stream = self._cupy.events[event_ptr], self._cupy.stream_at(stream_ptr)
        if event.device != stream.device:
            raise CUDARuntimeError("cudaErrorInvalidResourceHandle: invalid resource handle")
        event.stream, event.position = stream, len(stream.queue)
        if event.shared is not None:
            event.shared.record(stream)
            event.position = len(stream.queue)

    def eventQuery(self, event_ptr: int) -> int:  # noqa: N802
        return 0 if self._cupy.events[event_ptr].done else 600  # cudaErrorNotReady

    def streamWaitEvent(self, stream_ptr: int, event_ptr: int, flags: int = 0) -> None:  # noqa: N802
        stream, event = self._cupy.stream_at(stream_ptr), self._cupy.events[event_ptr]
        self._cupy.log.append(("stream waits", stream.name))
        if event.stream is None and event.shared is not None:  # another process'
            stream.add(event.shared.waiting(), crossing=True)
        elif event.stream is not None:
            source, position = event.stream, event.position
            # Behind a kernel that waits for another process this waits for it, too.
            stream.add(Behind(source, position), crossing=source.done < source.crossing <= position)

    def streamSynchronize(self, stream_ptr: int) -> None:  # noqa: N802
        self._cupy.stream_at(stream_ptr).synchronize()

    # -- copies

    def memcpyAsync(self, dst: int, src: int, size: int, kind: int, stream_ptr: int) -> None:  # noqa: N802
        if kind != self.memcpyDeviceToDevice:
            self.memcpy2DAsync(dst, size, src, size, size, 1, kind, stream_ptr)
            return
        stream = self._cupy.stream_at(stream_ptr)
        self._cupy.log.append(("copy", size, stream.name))
        stream.add(lambda: ctypes.memmove(dst, src, size) and None)

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

    def memsetAsync(self, ptr: int, value: int, size: int, stream_ptr: int) -> None:  # noqa: N802
        self._cupy.stream_at(stream_ptr).add(lambda: ctypes.memset(ptr, value, size) and None)

    # -- between processes

    def ipcGetMemHandle(self, ptr: int) -> bytes:  # noqa: N802
        if self._cupy.no_ipc:
            raise CUDARuntimeError(f"{self._cupy.no_ipc}: IPC of memory")
        found = self._cupy.allocations.get(ptr)
        if found is None:
            raise CUDARuntimeError("cudaErrorInvalidValue: not the start of cudaMalloc's memory")
        return _handle({"path": str(found[0]), "size": found[1], "pid": os.getpid()})

    def ipcOpenMemHandle(self, handle: bytes, flags: int = 1) -> int:  # noqa: N802
        told = _told(handle)
        if told["pid"] == os.getpid():
            raise CUDARuntimeError("cudaErrorInvalidContext: a handle of this very process")
        path = Path(told["path"])
        if not path.exists():
            raise CUDARuntimeError("cudaErrorMapBufferObjectFailed: mapping of buffer failed")
        memory = map_file(path, told["size"])
        address = int(memory.ctypes.data)
        self._cupy.mapped[address] = memory
        return address

    def ipcCloseMemHandle(self, ptr: int) -> None:  # noqa: N802
        if ptr not in self._cupy.mapped:
            raise CUDARuntimeError("cudaErrorInvalidValue: not what ipcOpenMemHandle gave")
        self._cupy.synchronize_device(self._cupy.current_device)
        del self._cupy.mapped[ptr]

    def ipcGetEventHandle(self, event_ptr: int) -> bytes:  # noqa: N802
        event = self._cupy.events[event_ptr]
        if not event.interprocess:
            raise CUDARuntimeError("cudaErrorInvalidResourceHandle: invalid resource handle")
        if event.shared is None:
            name = f"fake_cuda.{os.getpid()}.event{event_ptr}.{id(self._cupy):x}"
            event.shared = SharedEvent(Path("/dev/shm", name))
            self._cupy.shared_events.append(event.shared)
        return _handle({"path": str(event.shared.path), "size": 16, "pid": os.getpid()})

    def ipcOpenEventHandle(self, handle: bytes) -> int:  # noqa: N802
        event = Event(self._cupy)
        event.shared = SharedEvent(Path(_told(handle)["path"]))
        self._cupy.opened_events[event.ptr] = event
        return event.ptr

    def eventDestroy(self, event_ptr: int) -> None:  # noqa: N802
        self._cupy.opened_events.pop(event_ptr, None)


class SharedEvent:
    """How often an event was recorded, and how often that was reached, for all processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._counts = map_file(path, 16).view(np.int64)

    def record(self, stream: Stream) -> None:
        self._counts[0] += 1
        reached, counts = int(self._counts[0]), self._counts

        def reach() -> None:
            counts[1] = max(int(counts[1]), reached)

        stream.add(reach, crossing=True)

    def waiting(self) -> Any:
        """A kernel that waits for what has been recorded so far."""
        wanted, counts = int(self._counts[0]), self._counts
        return lambda: until(lambda: int(counts[1]) >= wanted, "an event of another process")


def _handle(told: dict[str, Any]) -> bytes:
    """64 bytes that name a file: shortened to what makes it known."""
    packed = json.dumps([told["path"].removeprefix("/dev/shm/fake_cuda."), told["size"]])
    encoded = packed.replace(" ", "").encode()
    if len(encoded) > _HANDLE_BYTES:
        raise ValueError("a name too long for a handle")
    return encoded.ljust(_HANDLE_BYTES)


def _told(handle: bytes) -> dict[str, Any]:
    if len(handle) != _HANDLE_BYTES:
        raise ValueError("not a handle")
    name, size = json.loads(handle)
    path = "/dev/shm/fake_cuda." + name
    return {"path": path, "size": size, "pid": int(name.split(".")[0])}
