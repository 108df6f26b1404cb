"""NCCL's collectives: enqueued on a stream, from GPU to GPU, by way of CuPy.

What NCCL sums as we do, it sums: numbers of 32 and 64 bits, and 8-bit integers. For the rest, which
it does not know (16-bit integers, operations of bits), rounds at every hop (float16, bfloat16) or
loses a NaN in (max and min), it moves blocks to the rank that combines them, in rank order, with
one rounding, and back: as many bytes on each link as a ring of reductions would take.

``NCCL_*`` variables are the user's. NCCL wants a GPU for each rank (the same one for two ranks only
where ``NCCL_HOSTID`` differs, which is right for tests and slow).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from mpizero.collectives.interface import Algorithm
from mpizero.collectives.transport import cut_evenly
from mpizero.errors import MpizeroError
from mpizero.memory.arrays import empty_like
from mpizero.memory.dtypes import is_half, kind_of
from mpizero.reduction import Operation
from mpizero.world.device import CudaDevice

if TYPE_CHECKING:
    from mpi4py import MPI

_OPERATIONS = {"sum": "NCCL_SUM", "mean": "NCCL_SUM", "product": "NCCL_PROD"}
_ORDERED = {"max": "NCCL_MAX", "min": "NCCL_MIN"}  # of integers, which have no NaN

_DTYPES = {
    "int8": "NCCL_INT8", "uint8": "NCCL_UINT8", "bool": "NCCL_UINT8", "int32": "NCCL_INT32",
    "uint32": "NCCL_UINT32", "int64": "NCCL_INT64", "uint64": "NCCL_UINT64",
    "float32": "NCCL_FLOAT32", "float64": "NCCL_FLOAT64", "complex64": "NCCL_FLOAT32",
    "complex128": "NCCL_FLOAT64",
}  # fmt: skip


class Nccl(Algorithm):
    """NCCL among the ranks of ``comm``, if ``reason`` is empty: else that is why not.

    Collective to make, to ``connect`` and to close. The communicator is made when all need it
    first; belongs to one thread at a time, like ``comm``, and works on the current stream.
    """

    name = "nccl"

    def __init__(self, comm: MPI.Intracomm, device: CudaDevice) -> None:
        self._mpi_comm, self._device = comm, device
        self.rank, self.size = comm.rank, comm.size
        self._nccl = device.nccl
        host = os.environ.get("NCCL_HOSTID") or platform.node()
        missing = "" if self._nccl is not None else "CuPy finds no NCCL"
        told = comm.allgather((missing, host, device.bus_id))
        self.reason = _why_not(told)
        self._comm: Any = None

    def connect(self) -> bool:
        """Make the communicator, unless it has been. False, on all ranks, if it cannot be had."""
        if self.reason or self._comm is not None:
            return not self.reason
        nccl, made, why = self._nccl, None, ""
        number = None
        try:
            number = nccl.get_unique_id() if self.rank == 0 else None
        except Exception as error:
            why = str(error)
        number = self._mpi_comm.bcast(number)
        try:
            if number is not None:
                with self._device.communicating():
                    made = nccl.NcclCommunicator(self.size, number, self.rank)
        except Exception as error:  # NcclError, and what the CUDA runtime says
            why = str(error)
        reasons = self._mpi_comm.allgather(why)
        failed = [f"rank {rank}: {each}" for rank, each in enumerate(reasons) if each]
        if failed:
            self.reason = f"NCCL could not start on {failed[0]}"
            if made is not None:
                made.abort()
            return False
        self._comm = made
        return True

    def offers(self, collective: str) -> bool:
        return not self.reason and super().offers(collective)

    def close(self) -> None:
        """Give the communicator back, when what is under way is done. Collective."""
        if self._comm is not None:
            self._device.finish()
            self._comm.destroy()
            self._comm = None

    def abandon(self) -> None:
        """A rank has died: end what waits for it."""
        if self._comm is not None:
            with suppress(Exception):
                self._comm.abort()
            self._comm = None

    def all_reduce(self, array: Any, op: Operation) -> None:
        form = self._form(array, op)
        if form is None:
            blocks = cut_evenly(array.size, self.size)
            op.reduce_rows(self._rows(array, blocks), array[blocks[self.rank]])
            self.gather_blocks(array, blocks)
            return
        kind, operation, factor = form
        with self._calling() as (comm, stream):
            count = array.size * factor
            comm.allReduce(array.data.ptr, array.data.ptr, count, kind, operation, stream)
        op.finish(array)

    def reduce_scatter(self, array: Any, out: Any, op: Operation) -> None:
        blocks = cut_evenly(array.size, self.size)
        form = self._form(array, op)
        if form is None:
            op.reduce_rows(self._rows(array, blocks), out)
            return
        kind, operation, factor = form
        with self._calling() as (comm, stream):
            count = out.size * factor
            comm.reduceScatter(array.data.ptr, out.data.ptr, count, kind, operation, stream)
        op.finish(out)

    def all_gather(self, block: Any, out: Any) -> None:
        with self._calling() as (comm, stream):
            comm.allGather(block.data.ptr, out.data.ptr, block.nbytes, self._bytes, stream)

    def broadcast(self, array: Any, root: int) -> None:
        with self._calling() as (comm, stream):
            place = array.data.ptr
            comm.broadcast(place, place, array.nbytes, self._bytes, root, stream)

    def all_to_all(self, array: Any, out: Any) -> None:
        blocks = cut_evenly(array.size, self.size)
        self.exchange_all(array, blocks, out, blocks)

    def combine_block(
        self, array: Any, blocks: Sequence[slice], op: Operation, use: Callable[[list[Any]], None]
    ) -> None:
        form = self._form(array, op)
        if form is None:
            use(self._rows(array, blocks))
            return
        kind, operation, factor = form
        own = blocks[self.rank]
        total = empty_like(array, (own.stop - own.start,))
        with self._calling() as (comm, stream), self._group():
            for root, block in enumerate(blocks):
                count = (block.stop - block.start) * factor
                if count:
                    source = array[block].data.ptr
                    comm.reduce(source, total.data.ptr, count, kind, operation, root, stream)
        use([total])

    def gather_blocks(self, array: Any, blocks: Sequence[slice]) -> None:
        with self._calling() as (comm, stream), self._group():
            for root, block in enumerate(blocks):
                piece = array[block]
                if piece.size:
                    place = piece.data.ptr
                    comm.broadcast(place, place, piece.nbytes, self._bytes, root, stream)

    # As ``Direct``: blocks of any size, to and from anybody.

    def exchange_all(
        self, array: Any, blocks: Sequence[slice], out: Any, places: Sequence[slice]
    ) -> None:
        """Send ``array[blocks[r]]`` to rank r; ``out[places[s]]`` comes from rank s."""
        out[places[self.rank]] = array[blocks[self.rank]]
        others = [rank for rank in range(self.size) if rank != self.rank]
        self._messages(
            [(rank, array[blocks[rank]]) for rank in others],
            [(rank, out[places[rank]]) for rank in others],
        )

    def gather(self, block: Any, out: Any, blocks: Sequence[slice], root: int) -> None:
        """Put every rank's ``block`` into ``out[blocks[r]]`` of the root."""
        if self.rank != root:
            self._messages([(root, block)], [])
            return
        out[blocks[root]] = block
        others = [rank for rank in range(self.size) if rank != root]
        self._messages([], [(rank, out[blocks[rank]]) for rank in others])

    def scatter(self, array: Any, out: Any, blocks: Sequence[slice], root: int) -> None:
        """Give rank r ``array[blocks[r]]`` of the root in ``out``."""
        if self.rank != root:
            self._messages([], [(root, out)])
            return
        out[...] = array[blocks[root]]
        others = [rank for rank in range(self.size) if rank != root]
        self._messages([(rank, array[blocks[rank]]) for rank in others], [])

    def _messages(
        self, leaving: Sequence[tuple[int, Any]], arriving: Sequence[tuple[int, Any]]
    ) -> None:
        with self._calling() as (comm, stream), self._group():
            for rank, block in leaving:
                if block.size:
                    comm.send(block.data.ptr, block.nbytes, self._bytes, rank, stream)
            for rank, block in arriving:
                if block.size:
                    comm.recv(block.data.ptr, block.nbytes, self._bytes, rank, stream)

    def _rows(self, array: Any, blocks: Sequence[slice]) -> list[Any]:
        """Every rank's block that is this rank's to combine, in rank order."""
        width = blocks[self.rank].stop - blocks[self.rank].start
        rows = empty_like(array, (self.size * width,))
        places = [slice(rank * width, (rank + 1) * width) for rank in range(self.size)]
        self.exchange_all(array, blocks, rows, places)
        return [rows[place] for place in places]

    def _form(self, array: Any, op: Operation) -> tuple[int, int, int] | None:
        """NCCL's dtype and operation, and its numbers in each of ours. None: it cannot."""
        name = _OPERATIONS.get(op.name)
        if kind_of(array.dtype) in ("integer", "bool"):
            name = name or _ORDERED.get(op.name)
        dtype = _DTYPES.get(array.dtype.name)
        is_complex = kind_of(array.dtype) == "complex"
        if name is None or dtype is None or is_half(array.dtype):
            return None
        if is_complex and op.name == "product":
            return None
        kind, operation = getattr(self._nccl, dtype), getattr(self._nccl, name)
        return int(kind), int(operation), 2 if is_complex else 1

    @property
    def _bytes(self) -> int:
        return int(self._nccl.NCCL_UINT8)

    @contextmanager
    def _calling(self) -> Iterator[tuple[Any, int]]:
        """Around calls of NCCL's: its communicator, and the current stream."""
        if not self.connect():
            raise MpizeroError(f"algorithm='nccl': {self.reason}.")
        try:
            self._comm.check_async_error()
            yield self._comm, self._device.current_stream().ptr
        except Exception as error:
            raise MpizeroError(
                f"rank {self.rank}: NCCL: {error}. NCCL_DEBUG=WARN says more."
            ) from error

    @contextmanager
    def _group(self) -> Iterator[None]:
        """Calls that are one: they may wait for each other."""
        self._nccl.groupStart()
        try:
            yield
        finally:
            self._nccl.groupEnd()


def _why_not(told: Sequence[tuple[str, str, str]]) -> str:
    """From what each rank says (what is missing, its host, its GPU): why NCCL is out."""
    seen: dict[tuple[str, str], int] = {}
    for rank, (missing, host, gpu) in enumerate(told):
        if missing:
            return f"rank {rank}: {missing}"
        other = seen.setdefault((host, gpu), rank)
        if other != rank:
            return f"ranks {other} and {rank} share a GPU ({gpu})"
    return ""
