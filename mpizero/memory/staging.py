"""Collectives on device memory through pinned host memory, in pipelined chunks.

MPI does not know CUDA streams: it reads a buffer at the moment it is called, whether or not the
kernel that fills it has run, and what it writes is ordered with no stream. So before MPI (or a
staging copy) touches the array, this thread waits for its current stream, which follows whatever
fills the array (``mpizero.memory.order``); and when a collective returns, every copy has finished
as seen from the host, which orders it before anything that any stream is given afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpizero.world.device import CudaDevice

# Large enough for PCIe and MPI to run at full speed, small enough to overlap for usual buckets.
CHUNK_BYTES = 4 * 1024 * 1024

# One chunk on its way to the host, one in MPI, one on its way back.
_SLOTS = 3

Run = Callable[[Any, Any], None]


def staged(
    device: CudaDevice,
    source: Any,
    target: Any,
    run: Run,
    chunk_bytes: int = CHUNK_BYTES,
) -> None:
    """Run a collective on device memory through the host, chunk by chunk of columns.

    ``source``: CuPy array of shape (rows_in, k), what is read. ``target``: shape (rows_out, k),
    what is written; same dtype, rows contiguous. The collective must treat columns independently:

    ==============  =================  ===================================================
    all-reduce      1 row -> 1 row     ``source is target``
    broadcast       1 row              root: ``target=None``; the others: ``source=None``
    all-gather      1 row -> n rows
    reduce-scatter  n rows -> 1 row
    all-to-all      n rows -> n rows
    ==============  =================  ===================================================

    ``run(host_in, host_out)`` performs it on one chunk: contiguous 1-D numpy arrays, the rows of
    the chunk behind one another (so that the usual blockwise algorithms fit). They are one and the
    same array where ``source is target`` or one of the two is None. Source and target may share
    memory only where equal columns do.

    While chunk i is in ``run``, chunk i + 1 travels to the host and chunk i - 1 back. All ranks
    must pass the same k, dtype, number of rows and ``chunk_bytes``, which bounds each host buffer:
    then they cut alike. Waits for the current stream before anything is read. Returns when the last
    copy has finished; if ``run`` raises, so does this, after the streams are quiet.
    """
    device.synchronize()
    parts = _cut(source, target, chunk_bytes)
    if not parts:
        return
    slots = [_Slot.borrow(device, source, target, parts[0]) for _ in range(min(_SLOTS, len(parts)))]
    try:
        _pipeline(device, source, target, run, parts, slots)
    finally:
        # Quiet before the error is seen: copies in flight would still write the caller's memory
        # and read buffers that the next collective borrows.
        device.synchronize()
        for slot in slots:
            slot.give_back(device)


@dataclass
class _Slot:
    """Pinned memory for one chunk on its way; ``incoming is outgoing`` where one buffer does."""

    incoming: Any
    outgoing: Any
    downloaded: Any = None
    uploaded: Any = None

    @classmethod
    def borrow(cls, device: CudaDevice, source: Any, target: Any, widest: slice) -> _Slot:
        """Room for a chunk as wide as ``widest``, the first and widest one."""
        width = widest.stop - widest.start
        sides = [array for array in (source, target) if array is not None]
        if len(sides) == 1 or source is target:
            buffer = _pinned(device, sides[0], width)
            return cls(buffer, buffer)
        return cls(_pinned(device, source, width), _pinned(device, target, width))

    def give_back(self, device: CudaDevice) -> None:
        device.return_pinned(self.incoming)
        if self.outgoing is not self.incoming:
            device.return_pinned(self.outgoing)


def _pipeline(
    device: CudaDevice, source: Any, target: Any, run: Run, parts: list[slice], slots: list[_Slot]
) -> None:
    def fetch(number: int) -> None:
        slot = slots[number % len(slots)]
        # The slot's last chunk must have left it: MPI writes it from the host, unordered with the
        # copy. That copy was queued before the chunk now in MPI, so this hardly ever waits.
        device.wait(slot.uploaded)
        if source is not None:
            columns = source[:, parts[number]]
            slot.downloaded = device.download(columns, _view(slot.incoming, columns))

    fetch(0)
    for number, part in enumerate(parts):
        if number + 1 < len(parts):
            fetch(number + 1)
        slot = slots[number % len(slots)]
        device.wait(slot.downloaded)
        arrived = source[:, part] if source is not None else target[:, part]
        result = target[:, part] if target is not None else arrived
        host_in = _view(slot.incoming, arrived)
        host_out = host_in if slot.outgoing is slot.incoming else _view(slot.outgoing, result)
        run(host_in, host_out)
        if target is not None:
            slot.uploaded = device.upload(host_out, result)


def _cut(source: Any, target: Any, chunk_bytes: int) -> list[slice]:
    """Column ranges of nearly equal width, none with more than ``chunk_bytes`` on either side."""
    sides = [array for array in (source, target) if array is not None]
    columns: int = sides[0].shape[1]
    column_bytes = max(array.shape[0] for array in sides) * sides[0].itemsize
    widest = max(1, chunk_bytes // column_bytes)
    chunks = -(-columns // widest)
    if chunks == 0:
        return []
    width = -(-columns // chunks)
    return [slice(at, min(at + width, columns)) for at in range(0, columns, width)]


def _pinned(device: CudaDevice, array: Any, width: int) -> Any:
    return device.borrow_pinned(array.shape[0] * width * array.itemsize)


def _view(buffer: Any, columns: Any) -> Any:
    """The front of a pinned buffer as a 1-D array of the size and dtype of ``columns``."""
    return buffer[: columns.size * columns.itemsize].view(np.dtype(columns.dtype))
