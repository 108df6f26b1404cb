"""The MPI library's own collectives, for every dtype: what MPI cannot sum, we sum.

MPI has no bfloat16, sums float16 one number at a time, and may lose a NaN in MAX and MIN. So
16-bit data travels as bytes to the rank that sums it (all-to-all), in float32 with one rounding,
and back (all-gather); and floating max and min call numpy from an MPI operation of our own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from mpizero.collectives import transport
from mpizero.collectives.interface import Algorithm
from mpizero.collectives.transport import cut_evenly
from mpizero.memory.arrays import empty_like
from mpizero.memory.dtypes import as_bytes, is_half, kind_of
from mpizero.reduction import Operation
from mpizero.world.device import Device
from mpizero.world.startup import load_mpi

if TYPE_CHECKING:
    from mpi4py import MPI

# What MPI calls the operations (MPI 4.1, section 6.9.2).
_NAMES = {"sum": "SUM", "mean": "SUM", "product": "PROD", "max": "MAX", "min": "MIN"}
_NAMES |= {"band": "BAND", "bor": "BOR", "bxor": "BXOR"}
_BOOLEAN = {"max": "LOR", "min": "LAND", "band": "LAND", "bor": "LOR", "bxor": "LXOR"}


class Native(Algorithm):
    name = "native"

    def __init__(self, comm: MPI.Intracomm, device: Device) -> None:
        self._comm = comm
        self._device = device
        self._mpi = load_mpi()
        self.rank, self.size = comm.rank, comm.size

    def all_reduce(self, array: Any, op: Operation) -> None:
        if is_half(array.dtype):
            self._all_reduce_half(array, op)
            return
        mpi_op, temporary = self._mpi_op(op, array.dtype)
        self._device.settle(array)
        for piece in _pieces(array):
            self._comm.Allreduce(self._mpi.IN_PLACE, piece, mpi_op)
        if temporary:
            mpi_op.Free()
        op.finish(array)

    def prepared(self, array: Any, op: Operation) -> Callable[[Any], None]:
        """``all_reduce`` for host arrays of this form, with all that can be looked up before."""
        plain = not is_half(array.dtype) and op.divisor is None
        if not plain or array.nbytes > transport.MAX_MESSAGE_BYTES:
            return lambda array: self.all_reduce(array, op)
        mpi_op, temporary = self._mpi_op(op, array.dtype)
        if temporary:
            mpi_op.Free()
            return lambda array: self.all_reduce(array, op)
        reduce, in_place = self._comm.Allreduce, self._mpi.IN_PLACE
        return lambda array: reduce(in_place, array, mpi_op)

    def reduce_scatter(self, array: Any, out: Any, op: Operation) -> None:
        if is_half(array.dtype):
            rows = empty_like(array, (array.size,))
            self.all_to_all(array, rows)
            op.reduce_rows([rows[block] for block in cut_evenly(rows.size, self.size)], out)
            return
        mpi_op, temporary = self._mpi_op(op, array.dtype)
        for piece, result in self._columns(array, out):
            self._device.settle(piece, result)
            self._comm.Reduce_scatter_block(piece, result, mpi_op)
        if temporary:
            mpi_op.Free()
        op.finish(out)

    def all_gather(self, block: Any, out: Any) -> None:
        if out.nbytes <= transport.MAX_MESSAGE_BYTES:
            self._comm.Allgather(self._bytes(block), self._bytes(out))
            return
        for root, place in enumerate(cut_evenly(out.size, self.size)):
            if root == self.rank:
                out[place] = block
            self.broadcast(out[place], root)

    def broadcast(self, array: Any, root: int) -> None:
        for piece in _pieces(as_bytes(array)):
            self._comm.Bcast(self._bytes(piece), root)

    def all_to_all(self, array: Any, out: Any) -> None:
        for piece, result in self._columns(array, out):
            self._comm.Alltoall(self._bytes(piece), self._bytes(result))

    def _all_reduce_half(self, array: Any, op: Operation) -> None:
        """All-to-all of slices, one float32 sum in rank order, all-gather of the results."""
        each = -(-array.size // self.size)  # equal blocks: the last ones are padded
        padded = empty_like(array, (each * self.size,))
        padded[: array.size] = array
        padded[array.size :] = 0
        block = empty_like(array, (each,))
        self.reduce_scatter(padded, block, op)
        self.all_gather(block, padded)
        array[...] = padded[: array.size]

    def _mpi_op(self, op: Operation, dtype: Any) -> tuple[MPI.Op, bool]:
        """MPI's operation for ``op``, and whether it is ours to free."""
        kind = kind_of(dtype)
        if op.name in ("max", "min") and kind == "float":
            # "auto" sends device memory elsewhere: see choose.py
            return self._nan_keeping(op, dtype), True
        names = _BOOLEAN if kind == "bool" else _NAMES
        return getattr(self._mpi, names[op.name]), False

    def _nan_keeping(self, op: Operation, dtype: Any) -> MPI.Op:
        def combine(incoming: Any, into: Any, _: MPI.Datatype) -> None:
            op.combine(np.frombuffer(into, dtype), np.frombuffer(incoming, dtype))

        created: MPI.Op = self._mpi.Op.Create(combine, commute=True)
        return created

    def _bytes(self, block: Any) -> list[Any]:
        self._device.settle(block)
        return [as_bytes(block), self._mpi.BYTE]

    def _columns(self, wide: Any, narrow: Any) -> Iterator[tuple[Any, Any]]:
        """Cut blockwise arrays into column ranges whose messages stay below the largest count.

        Yields (contiguous piece of ``wide``, place for its result); results that had to be
        received aside are put into ``narrow`` afterwards.
        """
        if wide.nbytes <= transport.MAX_MESSAGE_BYTES:
            yield wide, narrow
            return
        rows = wide.reshape(self.size, -1)
        results = narrow.reshape(-1, rows.shape[1])
        width = max(1, transport.MAX_MESSAGE_BYTES // (self.size * wide.itemsize))
        for start in range(0, rows.shape[1], width):
            columns = slice(start, start + width)
            piece = rows[:, columns].ravel()
            result = empty_like(piece, results[:, columns].shape)
            yield piece, result.reshape(-1)
            results[:, columns] = result


def _pieces(array: Any) -> Iterator[Any]:
    width = max(1, transport.MAX_MESSAGE_BYTES // array.itemsize)
    for start in range(0, array.size, width):
        yield array[start : start + width]
